"""`Member`: all experts of a detector, trained on one division of the normals; K-fold calibration needs several."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_vae.expert import Batch as Batch
from anomaly_vae.expert import Batches as Batches
from anomaly_vae.expert import Expert, Seeing
from anomaly_vae.expert import References as References
from anomaly_vae.images import inside
from anomaly_vae.model import AutoEncoder
from anomaly_vae.recipe import FUSED, DetectorSpec
from anomaly_vae.tiling import Tiling

Floats = npt.NDArray[np.float64]

_TILES_AT_ONCE = 32
"""However many tiles a picture has, memory holds the models' work on so many."""


class Opinion(NamedTuple):
    """What a member says of a batch: `columns` (B, parts), the verdict's `score` (B,), `heat` (B, H, W) or None.

    `code`: the latents (B, n) that were asked for.
    """

    columns: Floats
    score: Floats
    heat: Tensor | None
    code: Floats | None = None


class Native(NamedTuple):
    """Scores of all experts of a member at once, in their order: uint8 images as the models see them -> (B, columns).

    `exact`: they are the experts' own, so that these may tell them where they are asked for heat anyway. Columns after
    those of the scores are the watched latents.
    """

    columns: Callable[[Tensor], Tensor]
    exact: bool


@dataclass(frozen=True)
class Member:
    """`experts[name]`: the models of one kind, more than one in an ensemble. `native`: a faster way to their scores."""

    experts: Mapping[str, tuple[Expert, ...]]
    native: Native | None = None

    @classmethod
    def fit(
        cls,
        spec: DetectorSpec,
        models: Mapping[str, Sequence[AutoEncoder]],
        batches: Batches,
        trained: Batches | None = None,
    ) -> "Member":
        """Measure on the *fit* split what the scores of all models need to know about normals.

        `trained`: pictures that the models were trained on, for the scores that may have them as references too.
        """
        of_one, seen = spec.tiling.count if spec.tiling else 1, _as_seen(spec, batches)
        more = _as_seen(spec, trained) if trained else None
        return cls(
            {
                name: tuple(Expert.fit(own, model, seen, spec.heat_blur, of_one, more) for model in models[name])
                for name, own in spec.experts.items()
            }
        )

    @property
    def model(self) -> AutoEncoder:
        """The first model of the first kind."""
        return self.experts[""][0].model

    def models(self) -> Iterator[AutoEncoder]:
        """All of them."""
        for experts in self.experts.values():
            yield from (expert.model for expert in experts)

    def judge(self, spec: DetectorSpec, batch: Batch, heat: bool = False, latents: Sequence[int] = ()) -> Opinion:
        """Scores, and the one the verdict goes by, of a batch of whole pictures; `latents` of the first model."""
        if spec.tiling is None:
            return self._judge(spec, batch, heat, latents)
        # One by one: a picture's tiles are judged in the same company whatever other pictures there are.
        tiled = [self._judge_tiles(spec, spec.tiling, image, heat) for image in batch.images]
        heats = [one.heat for one in tiled if one.heat is not None]
        columns, score = np.stack([one.columns for one in tiled]), np.array([one.score for one in tiled])
        return Opinion(columns, score, torch.stack(heats) if heats else None)

    def _judge_tiles(self, spec: DetectorSpec, tiling: Tiling, image: Tensor, heat: bool) -> Opinion:
        """The most unusual of all tiles of an image (C, H, W), for each score by itself; without the batch's axis."""
        parts = [self._judge(spec, Batch(tiles), heat) for tiles in torch.split(tiling.cut(image), _TILES_AT_ONCE)]
        heats = [one.heat for one in parts if one.heat is not None]
        columns, score = (np.concatenate(values) for values in zip(*(one[:2] for one in parts), strict=True))
        return Opinion(columns.max(0), score.max(0), tiling.stitch(torch.cat(heats)) if heats else None)

    def reconstruct(self, spec: DetectorSpec, batch: Batch) -> Tensor | None:
        """What the first model of pixels makes of whole pictures, in [0, 1], (B, C, H, W) as it sees them; None where
        all model features."""
        model = next((model for model in self.models() if model.backbone is None), None)
        if model is None:
            return None
        if spec.tiling is None:
            return batch.seen_by(model).reconstruction.clamp(0, 1)
        return torch.stack([_rebuilt(model, spec.tiling, image) for image in batch.images])

    def _judge(self, spec: DetectorSpec, batch: Batch, heat: bool, latents: Sequence[int] = ()) -> Opinion:
        """As `judge`, of what the models see."""
        mapped, (known, code) = self.finest() if heat else set(), self._known(batch, heat)
        of_experts = {
            name: [expert.judge(batch, spec.heat_blur if name in mapped else None, next(known)) for expert in experts]
            for name, experts in self.experts.items()
        }
        seen = {name: _averaged(one) for name, one in of_experts.items()}
        first = of_experts[""][0].code
        if latents and first is not None:
            code = first[:, list(latents)].double().cpu().numpy()
        columns = np.concatenate([one.columns for one in seen.values()], 1)
        heats = [one.heat for one in seen.values() if one.heat is not None]
        if spec.verdict == FUSED:
            of_kind = [spec.experts[name].fusion.fuse(one.z) for name, one in seen.items()]
            score = np.max(np.stack(of_kind, 1), 1)
        else:
            score = columns[:, spec.parts.index(spec.verdict)]
        return Opinion(columns, score, torch.stack(heats).mean(0) if heats else None, code if latents else None)

    def _known(self, batch: Batch, heat: bool) -> tuple[Iterator[Floats | None], Floats | None]:
        """The scores of one expert after the other, and the watched latents, where there is a native way to them; else
        None for each."""
        if self.native is None or (heat and self.native.exact):
            return itertools.repeat(None), None
        sizes = [len(expert.spec.columns) for of_kind in self.experts.values() for expert in of_kind]
        found = self.native.columns(batch.images)
        *scores, code = torch.split(found, [*sizes, found.shape[1] - sum(sizes)], 1)
        return (columns.cpu().numpy() for columns in scores), code.cpu().numpy()

    def finest(self) -> set[str]:
        """The kinds that see pictures at the finest resolution: another's map would only blur theirs."""
        pixels = {name: math.prod(experts[0].model.picture_shape[1:]) for name, experts in self.experts.items()}
        return {name for name, count in pixels.items() if count == max(pixels.values())}

    def on(self, device: torch.device) -> "Member":
        """The same on `device`."""
        experts = {name: tuple(expert.on(device) for expert in of_kind) for name, of_kind in self.experts.items()}
        return Member(experts)


def member_scores(spec: DetectorSpec, member: Member, batches: Iterator[Batch]) -> Floats:
    """The verdict's scores of all images in `batches` by one member; shape (n,)."""
    return member_opinions(spec, member, batches)[0]


def member_opinions(spec: DetectorSpec, member: Member, batches: Iterator[Batch]) -> tuple[Floats, Floats]:
    """The same, and all parts of them, shape (n, parts)."""
    with torch.inference_mode():
        opinions = [member.judge(spec, batch) for batch in batches]
    if not opinions:
        return np.zeros(0), np.zeros((0, len(spec.parts)))
    return np.concatenate([one.score for one in opinions]), np.concatenate([one.columns for one in opinions])


def _as_seen(spec: DetectorSpec, batches: Batches) -> Batches:
    """Batches of what the models see of pictures, whole or all their tiles in order, and what of it counts."""
    tiling, counts = spec.tiling, inside(spec.image) if spec.image else None
    if tiling is None:
        if counts is None:
            return batches
        return lambda: (batch._replace(inside=counts.expand(len(batch.images), -1, -1)) for batch in batches())
    parts = itertools.repeat(None) if counts is None else torch.split(tiling.cut(counts), _TILES_AT_ONCE)

    def seen() -> Iterator[Batch]:
        for image in itertools.chain.from_iterable(batch.images for batch in batches()):
            for tiles, part in zip(torch.split(tiling.cut(image), _TILES_AT_ONCE), parts, strict=False):
                yield Batch(tiles, None, part)

    return seen


def _rebuilt(model: AutoEncoder, tiling: Tiling, image: Tensor) -> Tensor:
    """A picture (C, H, W) put together from what a model makes of its tiles."""
    seen = [Batch(tiles).seen_by(model).reconstruction for tiles in torch.split(tiling.cut(image), _TILES_AT_ONCE)]
    tiles = F.interpolate(torch.cat(seen), size=(tiling.side, tiling.side), mode="bilinear", align_corners=False)
    return torch.stack([tiling.stitch(channel) for channel in tiles.clamp(0, 1).unbind(1)])


def _averaged(seen: Sequence[Seeing]) -> Seeing:
    """The mean over an ensemble."""
    heats = [one.heat for one in seen if one.heat is not None]
    columns, z = np.mean([one.columns for one in seen], 0), np.mean([one.z for one in seen], 0)
    return Seeing(columns, z, torch.stack(heats).mean(0) if heats else None)

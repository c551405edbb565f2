"""`Member`: one trained model and what its scores learned from normals of the *fit* split."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anomaly_vae.fusion import fit_scale, standardise
from anomaly_vae.model import AutoEncoder
from anomaly_vae.observations import Seen, observe, wide
from anomaly_vae.recipe import FUSED, DetectorSpec
from anomaly_vae.scores import measure

Floats = npt.NDArray[np.float64]
OfScores = dict[str, dict[str, Tensor]]


class Batch(NamedTuple):
    """uint8 images (B, C, H, W), and their classes (B,) for detectors that want them given."""

    images: Tensor
    label: Tensor | None = None

    def seen_by(self, model: AutoEncoder) -> Seen:
        """What the model makes of them."""
        return observe(model, normalise(self.images, model.device), on(model.device, self.label))


Batches = Callable[[], Iterator[Batch]]
"""Batches as often as they are asked for."""

_HEAT_QUANTILE = 0.995
"""Share of the normals' pixels whose heat is at most 1."""
_HEAT_PIXELS = 500
"""So many pixels of each image tell the quantile as well as all of them, and fit in memory however many images."""

_FOLDS = 5


@dataclass(frozen=True)
class References:
    """What the scores of one member know about normals, all from the *fit* split.

    `of_scores[kind]`: tensors a score fitted. `scales[kind]`: quantiles for fusing. `heat_scale`: see `Judgement`.
    """

    of_scores: dict[str, dict[str, Tensor]]
    scales: dict[str, Floats]
    heat_scale: float


@dataclass(frozen=True)
class Member:
    """One trained model and its references; K-fold calibration needs several."""

    model: AutoEncoder
    references: References

    @classmethod
    def fit(cls, spec: DetectorSpec, model: AutoEncoder, batches: Batches) -> "Member":
        """Measure references on the *fit* split: first what scores fit, then the scores' own spread.

        A reference flatters the pictures it was fitted on, the more the fewer they are; so the spread is measured
        crosswise, each picture against references from the other folds.
        """
        model.eval()
        with torch.inference_mode():
            statistics = _statistics(spec, model, batches)
            crossed = [_fitted(spec, model, statistics, leave_out=k) for k in range(_FOLDS)] if statistics else []
            columns, heat = _crosswise(spec, model, batches, crossed)
            of_scores = _fitted(spec, model, statistics)
        scales = {kind: fit_scale(_natural(spec, kind, columns[:, i])) for i, kind in enumerate(spec.parts)}
        return cls(model, References(of_scores, scales, max(float(np.quantile(heat, _HEAT_QUANTILE)), 1e-12)))

    def judge(self, spec: DetectorSpec, seen: Seen) -> tuple[Floats, Floats]:
        """Columns of all scores, (B, parts), and the score the verdict goes by, (B,)."""
        columns = _columns(spec, seen, self.references.of_scores)
        if spec.verdict != FUSED:
            return columns, columns[:, spec.parts.index(spec.verdict)]
        z = [
            standardise(_natural(spec, kind, columns[:, spec.parts.index(kind)]), self.references.scales[kind])
            for kind in spec.fusion.parts
        ]
        return columns, spec.fusion.fuse(np.stack(z, 1))

    def on(self, device: torch.device) -> "Member":
        """Model and references on `device`."""
        of_scores = {
            kind: {name: tensor.to(device) for name, tensor in tensors.items()}
            for kind, tensors in self.references.of_scores.items()
        }
        return Member(self.model.to(device), replace(self.references, of_scores=of_scores))


def normalise(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, C, H, W) to floats in [0, 1] on `device`, channels last; the bytes travel, the floats do not.

    Floats are taken for normalised already.
    """
    x = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return x if x.is_floating_point() else x.float() / 255


def on(device: torch.device, label: Tensor | None) -> Tensor | None:
    """Classes on `device`, where there are any."""
    return None if label is None else label.to(device)


def member_scores(spec: DetectorSpec, member: Member, batches: Iterator[Batch]) -> Floats:
    """The verdict's scores of all images in `batches` by one member; shape (n,)."""
    with torch.inference_mode():
        scores = [member.judge(spec, batch.seen_by(member.model))[1] for batch in batches]
    return np.concatenate(scores) if scores else np.zeros(0)


def _statistics(spec: DetectorSpec, model: AutoEncoder, batches: Batches) -> dict[str, Floats]:
    """For each score that fits anything, what it wants to see of all fit images, one row an image."""
    found: dict[str, list[Floats]] = {}
    for batch in batches():
        seen = batch.seen_by(model)
        for score in spec.scores:
            statistic = score.statistic(seen)
            if statistic is not None:
                found.setdefault(score.kind, []).append(statistic.double().cpu().numpy())
    return {kind: np.concatenate(rows) for kind, rows in found.items()}


def _fitted(
    spec: DetectorSpec, model: AutoEncoder, statistics: dict[str, Floats], leave_out: int | None = None
) -> OfScores:
    """References from all rows, or from all but those of one fold (row number modulo `_FOLDS`)."""
    fitted: OfScores = {}
    for score in spec.scores:
        if score.kind in statistics:
            rows = statistics[score.kind]
            keep = np.arange(len(rows)) % _FOLDS != leave_out
            found = score.fit(rows[keep] if keep.any() else rows)
            fitted[score.kind] = {name: torch.from_numpy(value).to(model.device) for name, value in found.items()}
    return fitted


def _crosswise(
    spec: DetectorSpec, model: AutoEncoder, batches: Batches, crossed: list[OfScores]
) -> tuple[Floats, npt.NDArray[np.float32]]:
    """All scores of all fit images, each by the references that left its fold out; and a sample of their heat."""
    rows, heats, before = [], [], 0
    for batch in batches():
        seen = batch.seen_by(model)
        by_fold = np.stack([_columns(spec, seen, references) for references in crossed or [{}]])
        position = np.arange(before, before + len(batch.images))
        rows.append(by_fold[position % len(by_fold), np.arange(len(batch.images))])
        heat = seen.heat(spec.heat_blur).flatten(1)
        # A stride that shares no factor with the width wanders over rows and columns alike.
        heats.append(heat[:, :: max(1, heat.shape[1] // _HEAT_PIXELS) | 1].flatten().cpu().numpy())
        before += len(batch.images)
    return np.concatenate(rows), np.concatenate(heats)


def _columns(spec: DetectorSpec, seen: Seen, of_scores: OfScores) -> Floats:
    columns = [wide(measure(score, seen, of_scores.get(score.kind, {}))) for score in spec.scores]
    return np.asarray(torch.stack(columns, 1).cpu().numpy(), np.float64)


def _natural(spec: DetectorSpec, kind: str, column: Floats) -> Floats:
    """A score on the scale where normals are most nearly bell-shaped."""
    score = spec.scores[spec.parts.index(kind)]
    return np.log(np.maximum(column, 1e-300)) if score.log_scale else column

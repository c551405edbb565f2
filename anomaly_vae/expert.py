"""`Expert`: one trained model and what its scores learned from normals of the *fit* split."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anomaly_vae.expert_spec import ExpertSpec
from anomaly_vae.fusion import fit_scale, standardise
from anomaly_vae.model import AutoEncoder
from anomaly_vae.observations import Observation, Seen, gaussian_blur, observe, shorter_side, wide
from anomaly_vae.score_base import of_classes
from anomaly_vae.scores import ScoreSpec, measure

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
OfScores = dict[str, dict[str, Tensor]]


class Batch(NamedTuple):
    """uint8 images (B, C, H, W), and their classes (B,) for detectors that want them given.

    `inside` (B, H, W) bool: the pixels that count, where not all do.
    """

    images: Tensor
    label: Tensor | None = None
    inside: Tensor | None = None

    def seen_by(self, model: AutoEncoder) -> Seen:
        """What the model makes of them."""
        return observe(model, model.view(self.images), on(model.device, self.label))


Batches = Callable[[], Iterator[Batch]]
"""Batches as often as they are asked for."""

_HEAT_QUANTILE = 0.995
"""Share of the normals' pixels whose heat is at most 1."""
_HEAT_PIXELS = 500
"""So many pixels of each image tell the quantile as well as all of them, and fit in memory however many images."""

_FOLDS = 5
_SAMPLE_BYTES = 2**28


@dataclass(frozen=True)
class References:
    """What the scores of one model know about normals, all from the *fit* split.

    `of_scores[kind]`: tensors a score fitted. `scales[kind]`: for fusing, see `fit_scale`. `heat_scales` (maps,): the
    values that 99.5% of the normals' pixels do not exceed.
    """

    of_scores: OfScores
    scales: dict[str, Floats]
    heat_scales: Floats


class Seeing(NamedTuple):
    """What an expert says of a batch: `columns` (B, scores), `z` (B, fused scores), `heat` (B, H, W) or None.

    `code`: the posterior means (B, D), where the model was asked.
    """

    columns: Floats
    z: Floats
    heat: Tensor | None
    code: Tensor | None = None


@dataclass(frozen=True)
class Expert:
    """One trained model and its references."""

    spec: ExpertSpec
    model: AutoEncoder
    references: References

    @classmethod
    def fit(
        cls,
        spec: ExpertSpec,
        model: AutoEncoder,
        batches: Batches,
        blur: float,
        of_one: int = 1,
        trained: Batches | None = None,
    ) -> "Expert":
        """Measure references on the *fit* split: first what scores fit, then the scores' own spread.

        A reference flatters the pictures it was fitted on, the more the fewer they are; so the spread is measured
        crosswise, each picture against references from the other folds. `of_one` rows each are of one picture, and stay
        in one fold. `trained` are pictures the model was trained on, for the scores that owe nothing to the model.
        """
        model.eval()
        with torch.inference_mode():
            statistics = _statistics(spec.scores, model, batches, of_one)
            untaught = [score for score in spec.scores if score.untaught]
            more = _statistics(untaught, model, trained, of_one) if trained and untaught else {}
            left_out = range(_FOLDS) if statistics else ()
            crossed = [_fitted(spec, model, statistics, more, leave_out=k) for k in left_out]
            of_scores = _fitted(spec, model, statistics, more)
            columns, heat = _crosswise(spec, model, batches, crossed, of_scores, blur, of_one)
        scales = {kind: fit_scale(_natural(spec, kind, columns[:, i])) for i, kind in enumerate(spec.columns)}
        references = References(of_scores, scales, np.maximum(np.quantile(heat, _HEAT_QUANTILE, axis=0), 1e-12))
        return cls(spec, model, references)

    def columns(self, images: Tensor) -> Tensor:
        """All scores of uint8 images (B, C, H, W) whose class nobody tells, float64 (B, scores), on their device."""
        return self.columns_and_code(images)[0]

    def columns_and_code(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the posterior means (B, D)."""
        seen = Batch(images).seen_by(self.model)
        return _measured(self.spec, seen, self.references.of_scores), seen.code.flatten(1)

    def judge(self, batch: Batch, blur: float | None, given: Floats | None = None) -> Seeing:
        """Scores of images, and with a `blur` (share of the shorter side) their heat at the images' own resolution.

        `given`: the scores (B, scores), where they are known already.
        """
        if given is not None and blur is None:
            return Seeing(given, self._standardised(given), None)
        seen = batch.seen_by(self.model)
        columns = _columns(self.spec, seen, self.references.of_scores) if given is None else given
        heat = None if blur is None else self._heat(seen, batch.images, blur)
        return Seeing(columns, self._standardised(columns), heat, seen.code.flatten(1))

    def look(self, images: Tensor, blur: float | None) -> tuple[Tensor, Tensor | None]:
        """`columns`, and with a `blur` the heat, of uint8 images (B, C, H, W): all in tensors."""
        seen = Batch(images).seen_by(self.model)
        columns = _measured(self.spec, seen, self.references.of_scores)
        return columns, None if blur is None else self._heat(seen, images, blur)

    def _heat(self, seen: Seen, images: Tensor, blur: float) -> Tensor:
        maps = _maps(self.spec, seen, self.references.of_scores, blur)
        scales = torch.from_numpy(self.references.heat_scales).to(maps)
        return enlarged(compressed(maps / scales[:, None, None]).mean(1), images)

    def standing(self, columns: Floats) -> Floats:
        """Where scores (B, scores) stand among those of normals, as z of the same shape."""
        return self._z(self.spec.columns, columns)

    def _standardised(self, columns: Floats) -> Floats:
        return self._z(self.spec.fused, columns)

    def _z(self, kinds: Sequence[str], columns: Floats) -> Floats:
        of_kind, scales = dict(zip(self.spec.columns, columns.T, strict=True)), self.references.scales
        return np.stack([standardise(_natural(self.spec, kind, of_kind[kind]), scales[kind]) for kind in kinds], 1)

    def on(self, device: torch.device) -> "Expert":
        """Model and references on `device`."""
        of_scores = {
            kind: {name: tensor.to(device) for name, tensor in tensors.items()}
            for kind, tensors in self.references.of_scores.items()
        }
        return replace(self, model=self.model.to(device), references=replace(self.references, of_scores=of_scores))


def on(device: torch.device, label: Tensor | None) -> Tensor | None:
    """Classes on `device`, where there are any."""
    return None if label is None else label.to(device)


def compressed(heat: Tensor) -> Tensor:
    """Heat whose excess over 1 grows by its logarithm, so that one model's shout does not drown the others."""
    return torch.where(heat > 1, 1 + heat.clamp_min(1).log(), heat)


def enlarged(heat: Tensor, images: Tensor) -> Tensor:
    """Heat (B, h, w) at the resolution of `images` (B, C, H, W)."""
    size = images.shape[2:]
    if heat.shape[1:] == size:
        return heat
    return torch.nn.functional.interpolate(heat[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


class Sample:
    """Statistics of images (n, ...) with the number of the picture that each is of.

    Of many more than `most`, or more than fit in 256 MiB, half are dropped as often as it takes, by a hash of their
    numbers: a regular step would drop the same tile of every picture.
    """

    def __init__(self, most: int | None) -> None:
        self.most, self.share, self.seen, self.kept = most, 1.0, 0, 0
        self.parts: list[tuple[Indices, Indices, Floats]] = []

    def add(self, pictures: Indices, rows: Floats) -> None:
        """Rows, and the numbers of their pictures."""
        numbers = np.arange(self.seen, self.seen + len(rows))
        self.seen += len(rows)
        self.parts.append(self._thinned(numbers, pictures, rows))
        self.kept += len(self.parts[-1][0])
        if self.most is None:
            return
        most = max(1, min(self.most, _SAMPLE_BYTES // max(rows[:1].nbytes, 1)))
        while self.kept > 2 * most:
            self.share /= 2
            self.parts = [self._thinned(*part) for part in self.parts]
            self.kept = sum(len(part[0]) for part in self.parts)

    def _thinned(self, numbers: Indices, pictures: Indices, rows: Floats) -> tuple[Indices, Indices, Floats]:
        # Knuth's multiplicative hash: the first number is always kept.
        keep = numbers * 2654435761 % 2**32 < self.share * 2**32
        return numbers[keep], pictures[keep], rows[keep]

    def rows(self, leave_out: int | None) -> Floats:
        """All rows, or all but those of one fold (the picture's number modulo `_FOLDS`)."""
        pictures, rows = (np.concatenate([part[k] for part in self.parts]) for k in (1, 2))
        keep = pictures % _FOLDS != leave_out
        return np.asarray(rows[keep] if keep.any() else rows)


def _statistics(scores: Sequence[ScoreSpec], model: AutoEncoder, batches: Batches, of_one: int) -> dict[str, Sample]:
    """For each score that fits anything, what it wants to see of images."""
    found: dict[str, Sample] = {}
    before = 0
    for batch in batches():
        seen = batch.seen_by(model)
        pictures = np.arange(before, before + len(batch.images)) // of_one
        for score in scores:
            statistic = score.statistic(seen)
            if statistic is not None:
                sample = found.setdefault(score.column, Sample(score.shown))
                sample.add(pictures, statistic.cpu().numpy())
        before += len(batch.images)
    return found


def _fitted(
    spec: ExpertSpec,
    model: AutoEncoder,
    statistics: dict[str, Sample],
    more: dict[str, Sample],
    leave_out: int | None = None,
) -> OfScores:
    """References from all rows, or from all but those of one fold; those of `more` are of other pictures, and count in
    every fold."""
    fitted: OfScores = {}
    for score in spec.scores:
        if score.column in statistics:
            rows = statistics[score.column].rows(leave_out)
            if score.column in more:
                rows = np.concatenate([rows, more[score.column].rows(None)])
            rows = rows if score.untaught else rows.astype(np.float64)
            fitted[score.column] = {
                name: torch.from_numpy(value).to(model.device) for name, value in score.fit(rows).items()
            }
    return fitted


def _crosswise(
    spec: ExpertSpec,
    model: AutoEncoder,
    batches: Batches,
    crossed: list[OfScores],
    references: OfScores,
    blur: float,
    of_one: int,
) -> tuple[Floats, npt.NDArray[np.float32]]:
    """All scores of all fit images, each by the references that left its fold out; and a sample of their heat."""
    rows, heats, before = [], [], 0
    for batch in batches():
        seen = batch.seen_by(model)
        by_fold = np.stack([_columns(spec, seen, of_fold) for of_fold in crossed or [{}]])
        position = np.arange(before, before + len(batch.images)) // of_one
        rows.append(by_fold[position % len(by_fold), np.arange(len(batch.images))])
        # A stride that shares no factor with the width wanders over rows and columns alike. What is measured are maps
        # by all references: leaving a fold out would move their extremes by less than their own spread.
        heats.append(_sample(_maps(spec, seen, references, blur), batch.inside).cpu().numpy())
        before += len(batch.images)
    return np.concatenate(rows), np.concatenate(heats)


def _sample(maps: Tensor, inside: Tensor | None) -> Tensor:
    """Some pixels (n, maps) of maps (B, maps, h, w), of those that count."""
    if inside is None:
        heat = maps.flatten(2)
        return heat[:, :, :: max(1, heat.shape[2] // _HEAT_PIXELS) | 1].transpose(1, 2).flatten(0, 1)
    counts = torch.nn.functional.adaptive_max_pool2d(inside[:, None].float(), maps.shape[2:])[:, 0] > 0
    heat = maps.permute(0, 2, 3, 1)[counts.to(maps.device)]
    return heat[:: max(1, len(heat) // (_HEAT_PIXELS * len(maps))) | 1]


def _maps(spec: ExpertSpec, seen: Seen, of_scores: OfScores, blur: float) -> Tensor:
    """The maps that make the heat, blurred, (B, maps, h, w): of the scores in `spec.mapped`, or the deviation."""
    if not spec.mapped:
        return seen.heat(blur)[:, None]
    maps = [of_classes(seen, partial(_map, score, of_scores.get(score.column, {}))) for score in spec.mapped]
    return torch.stack([gaussian_blur(one, blur * shorter_side(one)) for one in maps], 1)


def _map(score: ScoreSpec, references: Mapping[str, Tensor], seen: Observation) -> Tensor:
    found = score.map(seen, references)
    assert found is not None  # the spec has made sure
    return found.float()


def _measured(spec: ExpertSpec, seen: Seen, of_scores: OfScores) -> Tensor:
    return torch.stack([wide(measure(score, seen, of_scores.get(score.column, {}))) for score in spec.scores], 1)


def _columns(spec: ExpertSpec, seen: Seen, of_scores: OfScores) -> Floats:
    return np.asarray(_measured(spec, seen, of_scores).cpu().numpy(), np.float64)


def _natural(spec: ExpertSpec, kind: str, column: Floats) -> Floats:
    """A score on the scale where normals are most nearly bell-shaped."""
    score = spec.scores[spec.columns.index(kind)]
    return np.log(np.maximum(column, 1e-300)) if score.log_scale else column

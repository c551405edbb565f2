"""All that a detector says of pictures, reckoned by tensors alone, so that a graph can hold it: `Judging`.

`Detector.judge` reckons what comes after the models in NumPy. What is here repeats it to within rounding; `exporting`
compares the two.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_vae.detector import Detector
from anomaly_vae.expert import Expert
from anomaly_vae.fusion import Floats, FusionSpec, spread_beyond
from anomaly_vae.images import inside, masked
from anomaly_vae.member import Member
from anomaly_vae.recipe import FUSED
from anomaly_vae.tiling import Tiling


class Verdicts(NamedTuple):
    """Of a batch: `score`, `p_value` (float64) and `outlier` (bool), each (B,); `parts` (B, parts) float64, `heat`
    (B, H, W) float32."""

    score: Tensor
    p_value: Tensor
    outlier: Tensor
    parts: Tensor
    heat: Tensor


class _Opinion(NamedTuple):
    """What a member says: (B, parts), (B,), (B, H, W)."""

    columns: Tensor
    score: Tensor
    heat: Tensor


class Judging(nn.Module):
    """A detector's verdicts of uint8 pictures (B, C, H, W) of its own size, at its own policy; see `Verdicts`."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        self.models = nn.ModuleList(model for member in detector.members for model in member.models())
        spec = detector.spec
        self._tiling = None if spec.tiling is None else _Tiles(spec.tiling)
        self._counts = inside(detector.image)
        shape = (detector.image.channels, detector.image.height, detector.image.width)
        # All that does not count, as every picture has it.
        self._blank = masked(torch.zeros(shape, dtype=torch.uint8), detector.image)
        self._ranks = _Ranks(detector)

    def forward(self, images: Tensor) -> Verdicts:
        """Verdicts of a batch."""
        if self._counts is not None:
            images = torch.where(self._counts, images, self._blank)
        opinions = [self._opinion(member, images) for member in self.detector.members]
        scores = torch.stack([one.score for one in opinions], 1)
        heat = torch.stack([one.heat for one in opinions]).mean(0)
        heat = heat if self._counts is None else torch.where(self._counts, heat, 0.0)
        columns = torch.stack([one.columns for one in opinions]).mean(0)
        p_value, outlier = self._ranks(scores)
        return Verdicts(scores.mean(1), p_value, outlier, columns, heat)

    def _opinion(self, member: Member, images: Tensor) -> _Opinion:
        if self._tiling is None:
            return self._seen(member, images)
        tiled = self._seen(member, self._tiling.cut(images))
        columns, score, heat = (one.reshape(self._tiling.count, -1, *one.shape[1:]) for one in tiled)
        return _Opinion(columns.amax(0), score.amax(0), self._tiling.stitch(heat))

    def _seen(self, member: Member, images: Tensor) -> _Opinion:
        """Of what the models see."""
        spec, mapped = self.detector.spec, member.finest()
        columns, scores, heats = [], [], []
        for name, experts in member.experts.items():
            blur = spec.heat_blur if name in mapped else None
            looked = [expert.look(images, blur) for expert in experts]
            z = [_standing(expert, one) for expert, (one, _) in zip(experts, looked, strict=True)]
            columns.append(torch.stack([one for one, _ in looked]).mean(0))
            scores.append(_fused(spec.experts[name].fusion, torch.stack(z).mean(0)))
            own = [heat for _, heat in looked if heat is not None]
            heats += [torch.stack(own).mean(0)] if own else []
        all_columns = torch.cat(columns, 1)
        fused = torch.stack(scores, 1).amax(1)
        score = fused if spec.verdict == FUSED else all_columns[:, spec.parts.index(spec.verdict)]
        return _Opinion(all_columns, score, torch.stack(heats).mean(0).float())


class _Ranks(nn.Module):
    """p-values and verdicts of scores (B, members), as `Calibration` tells them."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        calibration, policy = detector.calibration, detector.policy
        self.folds = [torch.from_numpy(np.array(fold)) for fold in calibration.scores]
        self.ties, self.crossed, self.n = calibration.ties, calibration.crossed, calibration.n
        self.most = calibration.rank(policy.alpha, policy.mode)

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) each."""
        ranked = scores if self.crossed else scores.mean(1, keepdim=True)
        at_least = [
            (fold >= ranked[:, i : i + 1] - tie).sum(1)
            for i, (fold, tie) in enumerate(zip(self.folds, self.ties, strict=True))
        ]
        count = 1 + torch.stack(at_least).sum(0)
        return count.double() / (self.n + 1), count <= self.most


class _Tiles:
    """The tiles of a batch's pictures, all pictures' first tiles before all second ones; their maps in one again."""

    def __init__(self, tiling: Tiling) -> None:
        self.count, self._side, (self._height, self._width) = tiling.count, tiling.side, tiling.size
        self._corners: list[tuple[int, int]] = [(int(y), int(x)) for y, x in tiling.corners.tolist()]
        weights = tiling.cut(tiling.weight())
        self._shares = torch.where(weights > 0, tiling.window() / weights, 0.0)

    def cut(self, images: Tensor) -> Tensor:
        """(T B, C, side, side) of images (B, C, H, W)."""
        side = self._side
        return torch.cat([images[:, :, y : y + side, x : x + side] for y, x in self._corners])

    def stitch(self, maps: Tensor) -> Tensor:
        """Maps (B, H, W) of maps (T, B, side, side), as `Tiling.stitch`."""
        side, found = self._side, []
        for i, (y, x) in enumerate(self._corners):
            beside = (x, self._width - x - side, y, self._height - y - side)
            found.append(F.pad(maps[i].float() * self._shares[i], beside))
        return torch.stack(found).sum(0)


def _standing(expert: Expert, columns: Tensor) -> Tensor:
    """z (B, fused scores) of columns (B, scores), as `fusion.standardise` tells it."""
    found = []
    for kind in expert.spec.fused:
        place = expert.spec.columns.index(kind)
        column, scale = columns[:, place], expert.references.scales[kind]
        natural = column.clamp_min(1e-300).log() if expert.spec.scores[place].log_scale else column
        found.append(_standardised(natural, scale))
    return torch.stack(found, 1)


def _standardised(s: Tensor, scale: Floats) -> Tensor:
    knots, level = (torch.from_numpy(row.copy()) for row in scale)
    slopes, spread = level.diff() / knots.diff(), spread_beyond(scale)
    # Each step adds what lies of it below s.
    below = torch.minimum((s[:, None] - knots[:-1]).clamp_min(0), knots.diff())
    z = level[0] + (below * slopes).sum(1)
    z = torch.where(s > knots[-1], level[-1] + (s - knots[-1]) / spread, z)
    return torch.where(s < knots[0], level[0] - (knots[0] - s) / spread, z)


def _fused(fusion: FusionSpec, z: Tensor) -> Tensor:
    """As `FusionSpec.fuse`."""
    positive = (z.clamp_min(0) ** fusion.power).mean(1) ** (1 / fusion.power)
    return positive + fusion.leak * z.clamp(-3.0, 0.0).mean(1)

"""`LocalSurprise`: an error held against what is normal at this place and for texture as rough as here."""

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from anomaly_vae.observations import Observation, Seen, gaussian_blur, shorter_side, wide
from anomaly_vae.score_base import Array, Fitted, References, Score, mean_of_largest, of_classes

_CELLS = 24
"""Cells along the longer side of the grid on which normal errors are remembered."""
_PRIOR = 10.0
"""So many pictures the pooled spread is worth beside a cell's own."""
_FLOOR = 0.25 / 255**2
"""Half a grey level squared: smaller errors and contrasts are those of quantisation."""


class LocalSurprise(Score):
    """Mean of the largest (log error - expected) / sd, errors being blurred over `window` of the shorter side.

    Expected is a + b log(contrast) + place: a line over the local variance of the picture over the wide `texture`
    window, so that rough texture does not light up by itself, and each place's own mean, shrunk towards none as far as
    places do not tell (James and Stein 1961), so that aligned pictures are judged place by place and others are not.
    Line, places and spreads are fitted on normals. Averaged are the `share` of the pixels with the largest. Without
    unit; may be negative. Cost: 1 pass.
    """

    kind: Literal["local_surprise"] = "local_surprise"
    log_scale: ClassVar[bool] = False
    window: float = Field(0.015, gt=0, le=0.5)
    texture: float = Field(0.1, gt=0, le=0.5)
    share: float = Field(0.002, gt=0, le=1)

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return mean_of_largest(wide(self._surprise(seen, references)).flatten(1), self.share)

    def map(self, seen: Observation, references: References) -> Tensor:
        return F.softplus(self._surprise(seen, references))

    def statistic(self, seen: Seen) -> Tensor:
        return of_classes(seen, self._cells)

    def fit(self, statistics: Array) -> Fitted:
        error, contrast = statistics[:, 0], statistics[:, 1]
        centred = contrast - contrast.mean()
        slope = float(np.clip((centred * error).mean() / max(float((centred**2).mean()), 1e-9), 0.0, 1.0))
        rest = error - slope * contrast
        mean = float(rest.mean())
        place, pooled = rest.mean(0) - mean, max(float(rest.var(0).mean()), 1e-6)
        noise = pooled / len(rest)
        kept = max(0.0, 1 - noise / max(float((place**2).mean()), 1e-12))
        own = ((rest - mean - kept * place) ** 2).sum(0)
        spread = np.sqrt((own + _PRIOR * pooled) / (len(rest) + _PRIOR))
        line = np.array([mean, slope], np.float32)
        return {"line": line, "place": (kept * place).astype(np.float32), "spread": spread.astype(np.float32)}

    def _surprise(self, seen: Observation, references: References) -> Tensor:
        error, contrast = seen.once(("logs", self.window, self.texture), lambda: self._logs(seen))
        place, spread = (
            F.interpolate(references[name][None, None], size=error.shape[1:], mode="bilinear", align_corners=False)[0]
            for name in ("place", "spread")
        )
        mean, slope = references["line"]
        surprise: Tensor = (error - mean - slope * contrast - place) / spread
        return surprise

    def _logs(self, seen: Observation) -> Tensor:
        """log of the blurred squared error and of the local variance, (2, B, H, W)."""
        side = shorter_side(seen.x)
        error = gaussian_blur(seen.squared_error, self.window * side)
        grey = seen.x.mean(1)
        wide_window = self.texture * side
        mean = gaussian_blur(grey, wide_window)
        variance = gaussian_blur((grey - mean) ** 2, wide_window)
        return torch.stack([error, variance]).add_(_FLOOR).log_()

    def _cells(self, seen: Observation) -> Tensor:
        maps = self._logs(seen).transpose(0, 1)
        height, width = maps.shape[2:]
        scale = min(1.0, _CELLS / max(height, width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        return F.adaptive_avg_pool2d(maps, size)

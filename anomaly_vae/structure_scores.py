"""Scores of structure: what a window or its edges look like in a picture and in its reconstruction x^."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from anomaly_vae.observations import Observation, gaussian_blur, shorter_side, wide
from anomaly_vae.score_base import References, Score

_LUMINANCE, _CONTRAST = 0.01**2, 0.03**2
"""SSIM's constants for pictures in [0, 1]; Wang et al. 2004, section III-B."""
_EDGES = 0.0026
"""MSGMS's constant for pictures in [0, 1]: 170 / 255^2, of Xue et al. 2014."""


class Ssim(Score):
    """1 - SSIM(x, x^), mean over Gaussian windows of `sigma` px and channels (Wang et al. 2004, eq. 13). Cost: 1 pass.

    Between 0 (equal) and 2 (opposite). The map is that of the windows about each pixel.
    """

    kind: Literal["ssim"] = "ssim"
    of_pictures: ClassVar[bool] = True
    sigma: float = Field(1.5, ge=0.5, le=64)

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return self.map(seen, references).flatten(1).mean(1)

    def map(self, seen: Observation, references: References) -> Tensor:
        return seen.once(self, lambda: 1 - similarity(wide(seen.x), wide(seen.reconstruction), self.sigma).mean(1))


class Msgms(Score):
    """1 - gradient-magnitude similarity of x and x^, mean over `scales` halvings of the picture, or as many as leave
    4 px a side (Xue et al. 2014; RIAD, Zavrtanik et al. 2021). Cost: 1 pass.

    Each pixel lies between 0 and 1. The score is RIAD's: the map's maximum, once blurred by `window` of the side.
    """

    kind: Literal["msgms"] = "msgms"
    of_pictures: ClassVar[bool] = True
    scales: int = Field(4, ge=1, le=8)
    window: float = Field(0.03, gt=0, le=0.5)

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return self.map(seen, references).flatten(1).amax(1)

    def map(self, seen: Observation, references: References) -> Tensor:
        return seen.once(self, lambda: self._map(seen))

    def _map(self, seen: Observation) -> Tensor:
        size = seen.x.shape[2:]
        x, reconstruction = wide(seen.x).mean(1, keepdim=True), wide(seen.reconstruction).mean(1, keepdim=True)
        found = []
        for scale in range(self.scales):
            if scale:
                if shorter_side(x) < 8:
                    break
                x, reconstruction = F.avg_pool2d(x, 2), F.avg_pool2d(reconstruction, 2)
            ours, theirs = edges(x), edges(reconstruction)
            # 1 - (2 a b + c) / (a^2 + b^2 + c), written so that equal edges give 0.
            unlike = (ours - theirs) ** 2 / (ours**2 + theirs**2 + _EDGES)
            found.append(F.interpolate(unlike, size, mode="bilinear", align_corners=False))
        return gaussian_blur(torch.stack(found).mean(0)[:, 0], self.window * shorter_side(seen.x))


def similarity(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """SSIM about each pixel of pictures (B, C, H, W), at most 1, of the same shape; borders mirror."""

    def local_mean(values: Tensor) -> Tensor:
        return gaussian_blur(values.flatten(0, 1), sigma).reshape(values.shape)

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x, variance_y = local_mean(x**2) - mean_x**2, local_mean(y**2) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _LUMINANCE) / (mean_x**2 + mean_y**2 + _LUMINANCE)
    structure = (2 * covariance + _CONTRAST) / (variance_x + variance_y + _CONTRAST)
    return (luminance * structure).clamp_max(1.0)


def edges(x: Tensor) -> Tensor:
    """Magnitude of Prewitt's gradient of grey pictures (B, 1, H, W), of the same shape; borders repeat."""
    across = torch.tensor([[1.0, 0.0, -1.0]] * 3, dtype=x.dtype, device=x.device) / 3
    gradient = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), torch.stack([across, across.T])[:, None])
    return gradient.square().sum(1, keepdim=True).sqrt()

"""`Marker`: it sees a picture beside its restoration and marks the pixels that do not belong.

It learns from made-up defects alone (DRAEM, Zavrtanik et al. 2021), so its map is a learned opinion, no likelihood.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_vae.spec import Spec

_COARSEST = 7
"""Pixels of the shorter side below which nothing is halved any more."""
_FULL_BELOW = 64
"""Smaller pictures keep their full resolution; of larger ones the first convolution halves it, for speed."""


class MarkerSpec(Spec):
    """A small U-Net. `width`: channels at the finest resolution; they double at each halving, up to `max_width`."""

    width: int = Field(16, ge=1, le=1024)
    max_width: int = Field(64, ge=1, le=1024)

    def build(self, channels: int, height: int, width: int) -> "Marker":
        """A marker for pictures of this shape."""
        return Marker(self, channels, min(height, width))


class Marker(nn.Module):
    """Logits (B, H, W), higher = more anomalous, from a picture, its restoration and their scaled deviation."""

    def __init__(self, spec: MarkerSpec, channels: int, side: int) -> None:
        super().__init__()
        first = 1 if side < _FULL_BELOW else 2
        halvings = max(1, math.floor(math.log2(max(side / first, 2 * _COARSEST) / _COARSEST)))
        widths = [min(spec.width << i, spec.max_width) for i in range(halvings + 1)]
        before = [2 * channels + 1, *widths]
        strides = [first, *[2] * halvings]
        self.down = nn.ModuleList(_block(a, b, stride) for a, b, stride in zip(before, widths, strides, strict=False))
        self.up = nn.ModuleList(_block(widths[i + 1] + widths[i], widths[i], 1) for i in reversed(range(halvings)))
        self.last = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x: Tensor, restoration: Tensor, deviation: Tensor) -> Tensor:
        """`x` and `restoration` are (B, C, H, W), `deviation` (B, H, W) in the likelihood's own scale."""
        # The logarithm: a defect's deviation may be a thousand times that of clean pixels.
        h = torch.cat([x, restoration, deviation.clamp_min(0).log1p()[:, None]], 1)
        maps: list[Tensor] = []
        for block in self.down:
            h = block(h)
            maps.append(h)
        for block, beside in zip(self.up, reversed(maps[:-1]), strict=True):
            h = block(torch.cat([F.interpolate(h, size=beside.shape[2:], mode="nearest"), beside], 1))
        logits: Tensor = self.last(h)
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def focal_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, H, W) against a mask (B, H, W) of 0 and 1, times (1 - p of the truth)^2.

    Most pixels are clean and soon told so; the square keeps them from drowning the few others (Lin et al. 2017).
    """
    entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    return (entropy * (1 - (-entropy).exp()) ** 2).mean()


def _block(before: int, after: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.LeakyReLU(0.1))

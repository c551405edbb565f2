"""Other views of the same picture: where a mirrored, moved or brighter picture is normal too, training may see it."""

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from anomaly_vae.spec import Spec


class AugmentationSpec(Spec):
    """What may be done to a training picture and its target alike; all drawn anew for each picture and step.

    `flip`, `flip_vertical`: mirrored half of the time. `shift`: moved by up to this share of its sides; `rotate`:
    turned by up to so many degrees; `zoom`: enlarged or shrunk by up to this share; borders repeat. `brightness`:
    multiplied by 1 -+ up to this share, then cut to [0, 1].
    """

    flip: bool = False
    flip_vertical: bool = False
    shift: float = Field(0.0, ge=0, le=0.5)
    rotate: float = Field(0.0, ge=0, le=180)
    zoom: float = Field(0.0, ge=0, lt=0.9)
    brightness: float = Field(0.0, ge=0, lt=1)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W) in [0, 1], each viewed its own way; `generator` on their device."""
        count, device = len(x), x.device

        def between(reach: float, *shape: int) -> Tensor:
            return reach * (2 * torch.rand(count, *shape, generator=generator, device=device) - 1)

        mirror = torch.ones(count, 2, device=device)
        for axis, wanted in enumerate((self.flip, self.flip_vertical)):
            if wanted:
                mirror[:, axis] = torch.where(between(1.0) < 0, -1.0, 1.0)
        if self.shift or self.rotate or self.zoom:
            angle, scale = between(math.radians(self.rotate)), 1 + between(self.zoom)
            x = _viewed(x, mirror, angle, scale, between(2 * self.shift, 2))
        elif self.flip or self.flip_vertical:
            for axis, dimension in ((0, 3), (1, 2)):
                x = torch.where(mirror[:, axis].view(-1, 1, 1, 1) < 0, x.flip(dimension), x)
        if self.brightness:
            x = (x * (1 + between(self.brightness, 1, 1, 1))).clamp(0, 1)
        return x


def _viewed(x: Tensor, mirror: Tensor, angle: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Each picture through its own affine map; angles are true on pictures that are not square too."""
    ratio = x.shape[2] / x.shape[3]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [
        torch.stack([cos * mirror[:, 0], -sin * ratio * mirror[:, 1], shift[:, 0]], 1),
        torch.stack([sin / ratio * mirror[:, 0], cos * mirror[:, 1], shift[:, 1]], 1),
    ]
    # In bfloat16 a grid is off by up to half a pixel; and weights that sum to 1 may round above it.
    with torch.autocast(x.device.type, enabled=False):
        grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False).clamp(0, 1)

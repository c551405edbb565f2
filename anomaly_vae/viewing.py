"""`Views`: a network that tells a picture's eight turned and mirrored views apart (Golan and El-Yaniv 2018).

To do so it must know what upright normal pictures look like; it is at a loss with others. It learns nothing of pictures
that look alike from all sides, such as textures: there its answer is the same chance for normal and odd ones.
"""

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from anomaly_vae.spec import Spec

COUNT = 8
_DRAWN = 2
"""Views that a training step takes of each picture."""


class ViewsSpec(Spec):
    """Four convolutions; `width` channels after the first. Pictures are brought to a square of `side` px at most."""

    width: int = Field(24, ge=1, le=1024)
    side: int = Field(32, ge=16, le=1024)

    def build(self, channels: int, height: int, width: int) -> "Views":
        """A network for pictures of this shape."""
        return Views(self, channels, min(self.side, height, width))


class Views(nn.Module):
    """Logits (B, 8) of which view a picture is."""

    def __init__(self, spec: ViewsSpec, channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        widths = [channels, spec.width, 2 * spec.width, 4 * spec.width, 4 * spec.width]
        blocks = [_block(widths[i], widths[i + 1], 1 if i == 0 else 2) for i in range(4)]
        self.network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], COUNT))

    def features(self, x: Tensor) -> Tensor:
        """What the last layer is told of each view of images x (B, C, H, W), one after the other, (B, 8 F)."""
        x = self._squared(x)
        return torch.cat([self.network[:-1](view(x, k)) for k in range(COUNT)], 1)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, C, side, side)."""
        logits: Tensor = self.network(x)
        return logits.float()

    def loss(self, x: Tensor, generator: Generator) -> Tensor:
        """Cross-entropy in nats over some views of images x (B, C, H, W), drawn by `generator`."""
        x = self._squared(x).repeat(_DRAWN, 1, 1, 1)
        number = torch.randint(COUNT, (len(x),), generator=generator, device=x.device)
        turned = torch.stack([view(x, k) for k in range(COUNT)])
        return F.cross_entropy(self(turned[number, torch.arange(len(x), device=x.device)]), number)

    def strangeness(self, x: Tensor) -> Tensor:
        """-log p(view k given view k of x), mean over all views, of images x (B, C, H, W); shape (B,), nats, >= 0."""
        x = self._squared(x)
        return torch.stack([-F.log_softmax(self(view(x, k)), 1)[:, k] for k in range(COUNT)]).mean(0)

    def _squared(self, x: Tensor) -> Tensor:
        size = (self.side, self.side)
        return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="area")


def view(x: Tensor, k: int) -> Tensor:
    """Square images x (B, C, S, S) turned by k right angles, and mirrored where k >= 4."""
    turned = torch.rot90(x, k % 4, (2, 3))
    return turned.flip(3) if k >= COUNT // 2 else turned


def _block(before: int, after: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.LeakyReLU(0.1))

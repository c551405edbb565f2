"""Encoders and decoders: shapes only, nothing about probability.

An encoder maps images (B, C, H, W) to (B, outputs); a decoder maps latents (B, size) to (B, C', H, W).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from anomaly_vae.spec import Spec

Shape = tuple[int, int, int]
Norm = Literal["batch", "group", "none"]
Activation = Literal["relu", "leaky_relu", "silu", "gelu", "tanh"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


class ConvSpec(Spec):
    """Strided convolutions down to a few pixels and their mirror image up again, for any size from 16 to 512 px.

    `channels` are those of each halving; without it `width` doubles at every halving, up to `max_width`, until the
    shorter side is at most 7 px. `features` inserts a fully connected layer before the latents. `residual` adds that
    many residual blocks at each resolution.
    """

    kind: Literal["conv"] = "conv"
    channels: tuple[Annotated[int, Field(ge=1, le=4096)], ...] | None = None
    width: int = Field(16, ge=1, le=4096)
    max_width: int = Field(256, ge=1, le=4096)
    features: int | None = Field(None, ge=1, le=65536)
    residual: int = Field(0, ge=0, le=8)
    norm: Norm = "batch"
    dropout: float = Field(0.0, ge=0, lt=1)
    activation: Activation = "leaky_relu"

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.channels is not None and not self.channels:
            raise ValueError("channels must list at least one positive number, one for each halving")
        return self

    def plan(self, shape: Shape) -> tuple[int, ...]:
        """Channels after each halving of an image of `shape`."""
        side = min(shape[1:])
        if self.channels is not None:
            if side >> len(self.channels) < 1:
                raise ValueError(f"network.channels halves a {side} px side {len(self.channels)} times; list fewer")
            return self.channels
        halvings = max(1, math.ceil(math.log2((side + 1) / 8)))
        return tuple(min(self.width << i, self.max_width) for i in range(halvings))

    def encoder(self, shape: Shape, outputs: int) -> nn.Module:
        """Images of `shape` to `outputs` numbers."""
        return _ConvEncoder(self, shape, outputs)

    def decoder(self, latents: int, shape: Shape) -> nn.Module:
        """`latents` numbers to images of `shape`."""
        return _ConvDecoder(self, latents, shape)


class MlpSpec(Spec):
    """Fully connected layers of the sizes in `hidden`, mirrored in the decoder."""

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = (512, 128)
    dropout: float = Field(0.0, ge=0, lt=1)
    activation: Activation = "relu"

    def plan(self, shape: Shape) -> tuple[int, ...]:
        """The hidden sizes; any image shape will do."""
        return self.hidden

    def encoder(self, shape: Shape, outputs: int) -> nn.Module:
        """Images of `shape` to `outputs` numbers."""
        sizes = (math.prod(shape), *self.hidden)
        return nn.Sequential(nn.Flatten(), *self._layers(sizes), nn.Linear(sizes[-1], outputs))

    def decoder(self, latents: int, shape: Shape) -> nn.Module:
        """`latents` numbers to images of `shape`."""
        sizes = (latents, *reversed(self.hidden))
        return nn.Sequential(*self._layers(sizes), nn.Linear(sizes[-1], math.prod(shape)), nn.Unflatten(1, shape))

    def _layers(self, sizes: Sequence[int]) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), _ACTIVATIONS[self.activation]()]
            layers += [nn.Dropout(self.dropout)] if self.dropout else []
        return layers


NetworkSpec = Annotated[ConvSpec | MlpSpec, Field(discriminator="kind")]


class _ConvEncoder(nn.Module):
    def __init__(self, spec: ConvSpec, shape: Shape, outputs: int) -> None:
        super().__init__()
        channels = (shape[0], *spec.plan(shape))
        self.body = nn.Sequential()
        for before, after in pairwise(channels):
            self.body.append(nn.Conv2d(before, after, 4, stride=2, padding=1, bias=spec.norm == "none"))
            self.body.extend(_after_conv(spec, after))
            self.body.extend(_ResidualBlock(spec, after) for _ in range(spec.residual))
        height, width = _sizes(shape, len(channels) - 1)[-1]
        self.head = _head(spec, channels[-1] * height * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.body(x).flatten(1))
        return head


class _ConvDecoder(nn.Module):
    def __init__(self, spec: ConvSpec, latents: int, shape: Shape) -> None:
        super().__init__()
        plan = spec.plan(shape)
        channels = (*reversed(plan), shape[0])
        sizes = list(reversed(_sizes(shape, len(plan))))
        self.start = (channels[0], *sizes[0])
        features = math.prod(self.start)
        hidden = [nn.Linear(latents, spec.features), _ACTIVATIONS[spec.activation]()] if spec.features else []
        self.head = nn.Sequential(*hidden, nn.Linear(spec.features or latents, features))
        self.body = nn.Sequential(*_after_conv(spec, channels[0]))
        for i, (before, after) in enumerate(pairwise(channels)):
            last = i == len(plan) - 1
            # Stride 2 maps 2k and 2k+1 pixels to k alike; the output padding brings the odd one back.
            (height, width), (low, narrow) = sizes[i + 1], sizes[i]
            odd = (height - 2 * low, width - 2 * narrow)
            bias = last or spec.norm == "none"
            self.body.extend(_ResidualBlock(spec, before) for _ in range(spec.residual))
            self.body.append(nn.ConvTranspose2d(before, after, 4, 2, 1, output_padding=odd, bias=bias))
            self.body.extend([] if last else _after_conv(spec, after))

    def forward(self, z: Tensor) -> Tensor:
        image: Tensor = self.body(self.head(z).unflatten(1, self.start))
        return image


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions added to their input (He et al. 2016)."""

    def __init__(self, spec: ConvSpec, channels: int) -> None:
        super().__init__()
        bias = spec.norm == "none"
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
            *_after_conv(spec, channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
            *_norm(spec.norm, channels),
        )
        self.activation = _ACTIVATIONS[spec.activation]()

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.activation(x + self.block(x))
        return activated


def _after_conv(spec: ConvSpec, channels: int) -> list[nn.Module]:
    dropout = [nn.Dropout2d(spec.dropout)] if spec.dropout else []
    return [*_norm(spec.norm, channels), _ACTIVATIONS[spec.activation](), *dropout]


def _norm(norm: Norm, channels: int) -> list[nn.Module]:
    if norm == "batch":
        return [nn.BatchNorm2d(channels)]
    if norm == "group":
        return [nn.GroupNorm(math.gcd(8, channels), channels)]
    return []


def _head(spec: ConvSpec, inputs: int, outputs: int) -> nn.Module:
    if spec.features is None:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(
        nn.Linear(inputs, spec.features), _ACTIVATIONS[spec.activation](), nn.Linear(spec.features, outputs)
    )


def _sizes(shape: Shape, halvings: int) -> list[tuple[int, int]]:
    """(height, width) before each halving and after the last."""
    sizes = [shape[1:]]
    for _ in range(halvings):
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes

"""Encoders and decoders: shapes only, nothing about probability.

An encoder maps images (B, C, H, W) to (B, outputs); a decoder maps latents (B, size) to (B, C', H, W). Both are
stacks of stages, each the other's mirror image, so that pairs of them can be trained alone (Bengio et al. 2007).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
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


class Encoder(nn.Module):
    """Stages E_0 .. E_{L-1} from images (B, C, H, W) to (B, outputs), one after the other."""

    stages: nn.ModuleList

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> Tensor:
        """The last stage's output (B, outputs)."""
        for stage in self.stages:
            x = stage(x)
        return x

    def activations(self, x: Tensor) -> list[Tensor]:
        """What every stage puts out, in order; the last is `forward`'s result."""
        found: list[Tensor] = []
        for stage in self.stages:
            found.append(stage(found[-1] if found else x))
        return found


class Decoder(nn.Module):
    """Stages D_0 .. D_{L-1} from latents (B, size) to (B, C', H, W), the encoder's in mirror image.

    D_{L-1-k} maps what E_k puts out to the shape that E_k takes, ending in the norm and activation of E_{k-1}, whose
    output that is, so that each pair is an autoencoder of its own; D_{L-1} ends bare. The innermost pair matches where
    the encoder's outputs are as many as the latents.

    `latent_maps[i]` are linear maps that add z to the input of stage i + 1; there are none without latent skips.
    `joins` says which stage takes which of the encoder's `activations`, by index; such a stage takes them behind its
    own channels, and no longer E_k's output alone.
    """

    stages: nn.ModuleList
    latent_maps: nn.ModuleList

    def __init__(
        self,
        stages: Iterable[nn.Module],
        latent_maps: Iterable[nn.Module] = (),
        joins: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.stages, self.latent_maps, self.joins = nn.ModuleList(stages), nn.ModuleList(latent_maps), dict(joins or {})

    def forward(self, z: Tensor, maps: Sequence[Tensor] = ()) -> Tensor:
        """Raw image parameters (B, C', H, W) of latents z (B, size).

        `maps` are the encoder's `activations` of the same batch; a decoder without skips does not look at them, one
        with skips raises ValueError without them.
        """
        if self.joins and len(maps) < len(self.stages):
            raise ValueError("a decoder with skips needs maps; pass encoder.activations(x), or set network.skips=false")
        h = z
        for i, stage in enumerate(self.stages):
            if i and self.latent_maps:
                added = self.latent_maps[i - 1](z)
                h = h + added.reshape(*added.shape, *(1 for _ in h.shape[2:]))
            if i in self.joins:
                h = torch.cat((h, maps[self.joins[i]]), 1)
            h = stage(h)
        return h


class ConvSpec(Spec):
    """Strided convolutions down to a few pixels and their mirror image up again, for any size from 16 to 512 px.

    `channels` are those of each halving; without it `width` doubles at every halving, up to `max_width`, until the
    shorter side is at most 7 px. `features` inserts a fully connected layer before the latents. `residual` adds that
    many residual blocks at each resolution.

    `skips` hands the decoder the encoder's maps of every resolution but the lowest, behind its own (Ronneberger et al.
    2015). `latent_skips` adds a linear map of z to the input of every stage of the decoder after the first, against
    posterior collapse (Dieng et al. 2019).
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
    skips: bool = False
    latent_skips: bool = False

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.channels is not None and not self.channels:
            raise ValueError("channels must list at least one positive number, one for each halving")
        return self

    @property
    def sees_input(self) -> bool:
        """Whether the decoder sees more of the image than z; the ELBO is then no bound on log p(x)."""
        return self.skips

    def plan(self, shape: Shape) -> tuple[int, ...]:
        """Channels after each halving of an image of `shape`; raises ValueError for one too small."""
        side = min(shape[1:])
        if side < 2:
            raise ValueError("network.kind=conv halves the image, which a 1 px side does not bear; use mlp or linear")
        halvings = max(1, math.ceil(math.log2((side + 1) / 8)))
        plan = self.channels or tuple(min(self.width << i, self.max_width) for i in range(halvings))
        if side >> len(plan) < 1:
            raise ValueError(f"network.channels halves a {side} px side {len(plan)} times; list fewer")
        if self.skips and len(plan) < 2:
            raise ValueError("network.skips leaves out the lowest resolution, here the only one; list two channels")
        return plan

    def encoder(self, shape: Shape, outputs: int) -> Encoder:
        """Images of `shape` to `outputs` numbers."""
        channels = (shape[0], *self.plan(shape))
        stages = [self._down(before, after) for before, after in pairwise(channels)]
        inputs = channels[-1] * math.prod(_sizes(shape, len(stages))[-1])
        return Encoder([*stages, nn.Sequential(nn.Flatten(), *self._head(inputs, outputs))])

    def decoder(self, latents: int, shape: Shape) -> Decoder:
        """`latents` numbers to images of `shape`."""
        plan = self.plan(shape)
        channels, sizes = (*reversed(plan), shape[0]), _sizes(shape, len(plan))[::-1]
        start = (channels[0], *sizes[0])
        # Stage i works at the resolution that the encoder's stage len(plan) - i puts out; of stage 1 it is the lowest.
        joins = {i: len(plan) - i for i in range(2, len(plan) + 1)} if self.skips else {}
        stages = [
            nn.Sequential(
                *self._head(latents, math.prod(start)), nn.Unflatten(1, start), *_after_conv(self, channels[0])
            )
        ]
        for i, (before, after) in enumerate(pairwise(channels), 1):
            # Stride 2 maps 2k and 2k+1 pixels to k alike; the output padding brings the odd one back.
            (height, width), (low, narrow) = sizes[i], sizes[i - 1]
            odd = (height - 2 * low, width - 2 * narrow)
            stages.append(self._up(before * (2 if i in joins else 1), after, odd, last=i == len(plan)))
        return Decoder(stages, _latent_maps(latents, channels[:-1]) if self.latent_skips else (), joins)

    def _down(self, before: int, after: int) -> nn.Sequential:
        conv = nn.Conv2d(before, after, 4, stride=2, padding=1, bias=self.norm == "none")
        return nn.Sequential(conv, *_after_conv(self, after), *self._blocks(after))

    def _up(self, before: int, after: int, odd: tuple[int, int], last: bool) -> nn.Sequential:
        blocks, bias = self._blocks(before), last or self.norm == "none"
        conv = nn.ConvTranspose2d(before, after, 4, 2, 1, output_padding=odd, bias=bias)
        return nn.Sequential(*blocks, conv, *([] if last else _after_conv(self, after)))

    def _blocks(self, channels: int) -> list[nn.Module]:
        return [_ResidualBlock(self, channels) for _ in range(self.residual)]

    def _head(self, inputs: int, outputs: int) -> list[nn.Module]:
        if self.features is None:
            return [nn.Linear(inputs, outputs)]
        return [
            nn.Linear(inputs, self.features),
            _ACTIVATIONS[self.activation](),
            nn.Linear(self.features, outputs),
        ]


class MlpSpec(Spec):
    """Fully connected layers of the sizes in `hidden`, mirrored in the decoder; `latent_skips` as of `ConvSpec`."""

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = (512, 128)
    dropout: float = Field(0.0, ge=0, lt=1)
    activation: Activation = "relu"
    latent_skips: bool = False

    @property
    def sees_input(self) -> bool:
        """Never: the decoder is a function of z."""
        return False

    def plan(self, shape: Shape) -> tuple[int, ...]:
        """The hidden sizes; any image shape will do."""
        return self.hidden

    def encoder(self, shape: Shape, outputs: int) -> Encoder:
        """Images of `shape` to `outputs` numbers."""
        stages = self._stages((math.prod(shape), *self.hidden, outputs))
        stages[0].insert(0, nn.Flatten())
        return Encoder(stages)

    def decoder(self, latents: int, shape: Shape) -> Decoder:
        """`latents` numbers to images of `shape`."""
        hidden = self.hidden[::-1]
        stages = self._stages((latents, *hidden, math.prod(shape)))
        stages[-1].append(nn.Unflatten(1, shape))
        return Decoder(stages, _latent_maps(latents, hidden) if self.latent_skips else ())

    def _stages(self, sizes: Sequence[int]) -> list[nn.Sequential]:
        stages = [nn.Sequential(nn.Linear(before, after)) for before, after in pairwise(sizes)]
        for stage in stages[:-1]:
            stage.append(_ACTIVATIONS[self.activation]())
            stage.extend([nn.Dropout(self.dropout)] if self.dropout else [])
        return stages


class LinearSpec(Spec):
    """One affine layer each way.

    With a point code and squared error its optimum spans the subspace of PCA (Baldi and Hornik 1989).
    """

    kind: Literal["linear"] = "linear"

    @property
    def sees_input(self) -> bool:
        """Never: the decoder is a function of z."""
        return False

    def plan(self, shape: Shape) -> tuple[int, ...]:
        """Nothing is hidden; any image shape will do."""
        return ()

    def encoder(self, shape: Shape, outputs: int) -> Encoder:
        """Images of `shape` to `outputs` numbers."""
        return Encoder([nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), outputs))])

    def decoder(self, latents: int, shape: Shape) -> Decoder:
        """`latents` numbers to images of `shape`."""
        return Decoder([nn.Sequential(nn.Linear(latents, math.prod(shape)), nn.Unflatten(1, shape))])


NetworkSpec = Annotated[ConvSpec | MlpSpec | LinearSpec, Field(discriminator="kind")]


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


def _latent_maps(latents: int, sizes: Sequence[int]) -> list[nn.Module]:
    # The stages' own layers bring the bias.
    return [nn.Linear(latents, size, bias=False) for size in sizes]


def _sizes(shape: Shape, halvings: int) -> list[tuple[int, int]]:
    """(height, width) before each halving and after the last."""
    sizes = [shape[1:]]
    for _ in range(halvings):
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes

"""Backbones: networks whose feature maps an autoencoder models instead of pixels.

Errors of features tell more of what is seen than errors of pixels do (DFR, Shi et al. 2021; FRE, Ndiour et al. 2022;
PaDiM, Defard et al. 2021). A backbone stands still while the autoencoder learns, and is part of its model: its weights
and statistics are kept in the bundle.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from anomaly_vae.corruptions import CorruptionSpec, StrokesSpec, corrupt
from anomaly_vae.errors import ConfigError
from anomaly_vae.networks import Shape
from anomaly_vae.pretrained import ClassifierSpec, LayerName
from anomaly_vae.spec import Spec
from anomaly_vae.viewing import COUNT, view

Grid = tuple[int, int]

_LEAST_SIDE = 16
_LEAST_SPREAD = 0.05
"""Of the median standard deviation over channels: a channel that normals hardly move is not blown up further."""


class _Maps(Spec):
    """What all backbones have in common.

    Maps of all layers are brought to one grid, `stride` pixels of the picture to a cell: finer ones by their mean,
    coarser ones by interpolation. Of all channels `channels` are kept, drawn by the model's seed (null: all). A random
    choice needs no fit, and in PaDiM beats as many principal components: they keep the directions in which normals
    differ most, which need not be those in which abnormal pictures do.
    """

    stride: Literal[2, 4, 8, 16] = 4
    channels: int | None = Field(100, ge=1, le=4096)

    def grid(self, shape: Shape) -> Grid:
        """(h, w) of the maps of pictures of `shape` (C, H, W); raises ValueError for ones too small."""
        if min(shape[1:]) < max(_LEAST_SIDE, 2 * self.stride):
            raise ValueError(
                f"model.backbone with stride {self.stride} wants pictures of at least "
                f"{max(_LEAST_SIDE, 2 * self.stride)} px a side; set a smaller model.backbone.stride or a larger image"
            )
        return shape[1] // self.stride, shape[2] // self.stride


class TorchvisionBackboneSpec(ClassifierSpec, _Maps):
    """Maps of a classifier of torchvision, as `ClassifierSpec` names them; `weights: null` is the same as random.

    The usual layers are those of PaDiM with a ResNet-18, and 100 of their channels. Weights are read, or downloaded,
    when training begins, and never again.
    """

    kind: Literal["torchvision"] = "torchvision"
    name: str = "resnet18"
    layers: tuple[LayerName, ...] = Field(("layer1", "layer2", "layer3"), min_length=1)
    learns: ClassVar[bool] = False

    @field_validator("weights", mode="before")
    @classmethod
    def _none_is_random(cls, weights: Any) -> Any:
        return "random" if weights is None else weights

    def build(self, shape: Shape) -> "Backbone":
        """For pictures of `shape` (C, H, W); raises `ConfigError` for names that torchvision does not know."""
        return _Classifier(self, shape)


def _strokes() -> tuple[CorruptionSpec, ...]:
    return (StrokesSpec(area=(0.0005, 0.25), opacity=(0.15, 1.0), probability=0.8),)


class OwnBackboneSpec(_Maps):
    """A small network that learns on the normals themselves, without labels, over the first `share` of training.

    They are damaged by `corruption`, and the network learns maps from which one linear layer repairs each cell
    (Vincent et al. 2008): what is normal here, seen with what is around. With `views` it also tells turned and mirrored
    pictures apart (Golan and El-Yaniv 2018), for which it must know what they show; textures, which have no right way
    up, do without. `width`: channels at half the resolution; two more stages have twice and four times as
    many, at a quarter and an eighth.
    """

    kind: Literal["own"] = "own"
    channels: int | None = Field(64, ge=1, le=4096)
    width: int = Field(16, ge=1, le=512)
    share: float = Field(0.3, gt=0, le=0.8)
    corruption: tuple[CorruptionSpec, ...] = Field(default_factory=_strokes, min_length=1)
    views: bool = True
    learns: ClassVar[bool] = True

    def build(self, shape: Shape) -> "Backbone":
        """For pictures of `shape` (C, H, W)."""
        return _Own(self, shape)


BackboneSpec = Annotated[TorchvisionBackboneSpec | OwnBackboneSpec, Field(discriminator="kind")]


class Backbone(nn.Module, ABC):
    """Pictures (B, C, H, W) in [0, 1] to maps of `shape` (C', h, w), each channel with mean 0 and deviation 1.

    `share`: of training that it learns itself. `train()` leaves it in eval mode, as nothing may move any more when the
    rest learns.
    """

    share = 0.0
    chosen: Tensor
    mean: Tensor
    std: Tensor
    measured: Tensor

    def __init__(self, grid: Grid, total: int, channels: int | None) -> None:
        super().__init__()
        # Also on the meta device, which draws nothing: a bundle's own choice replaces this one.
        chosen = torch.randperm(total, device="cpu")[: channels or total].sort().values
        self.shape: Shape = (len(chosen), *grid)
        self.register_buffer("chosen", chosen)
        self.register_buffer("mean", torch.zeros(len(chosen), 1, 1))
        self.register_buffer("std", torch.ones(len(chosen), 1, 1))
        self.register_buffer("measured", torch.tensor(False))

    @abstractmethod
    def maps(self, x: Tensor) -> list[Tensor]:
        """What the layers make of pictures, each (B, C_l, h_l, w_l)."""

    def loss(self, x: Tensor, generator: Generator) -> Tensor:
        """What its own learning minimises on pictures, shape (); nothing, for one without a `share` of training."""
        return x.new_zeros(())

    def fetch(self) -> None:
        """Get weights that were trained elsewhere, where it has such; raises `ConfigError` where they cannot be had."""

    def forward(self, x: Tensor) -> Tensor:
        """Standardised maps (B, C', h, w); no gradient comes through."""
        # Scoring knows no mixed precision, so training must see the same features.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return (self._gathered(self.maps(x.float()))[:, self.chosen] - self.mean) / self.std

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode."""
        return super().train(False)

    def prepare(self, pictures: Iterable[Tensor]) -> None:
        """Before the rest learns: fetch what is to be fetched, and standardise by these batches (B, C, H, W)."""
        self.fetch()
        self.mean.zero_()
        self.std.fill_(1.0)
        count, first, second = 0, torch.zeros(()), torch.zeros(())
        for x in pictures:
            values = self(x).transpose(0, 1).flatten(1).cpu().double()
            count += values.shape[1]
            first, second = first + values.sum(1), second + values.square().sum(1)
        mean = first / count
        std = (second / count - mean**2).clamp_min(0).sqrt()
        std = std.clamp_min(_LEAST_SPREAD * float(std.median())).clamp_min(1e-6)
        self.mean.copy_(mean.reshape(self.mean.shape))
        self.std.copy_(std.reshape(self.std.shape))
        self.measured.fill_(True)

    def _gathered(self, maps: list[Tensor]) -> Tensor:
        """All channels on the one grid, (B, sum of C_l, h, w)."""
        return torch.cat([_brought(one, self.shape[1:]) for one in maps], 1)


class _Classifier(Backbone):
    def __init__(self, spec: TorchvisionBackboneSpec, shape: Shape) -> None:
        if shape[0] not in (1, 3):
            raise ConfigError(f"model.backbone: pictures of {shape[0]} channels are neither grey nor RGB; use 1 or 3")
        network = spec.network(spec.layers, "model.backbone").eval()
        with torch.no_grad():
            found = network(torch.zeros(1, *shape, device=network.mean.device))
        for layer, one in zip(spec.layers, found, strict=True):
            # Transformers put channels last, or lay all places in a row.
            if one.dim() != 4 or abs(one.shape[2] * shape[2] - one.shape[3] * shape[1]) > shape[1] + shape[2]:
                raise ConfigError(f"model.backbone.layers: {layer} of {spec.name} gives no map; choose earlier layers")
        super().__init__(spec.grid(shape), sum(one.shape[1] for one in found), spec.channels)
        self.spec, self.network = spec, network.requires_grad_(False)
        self.eval()

    def maps(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = self.network(x)
        return found

    def fetch(self) -> None:
        self.spec.load(self.network)


class _Own(Backbone):
    def __init__(self, spec: OwnBackboneSpec, shape: Shape) -> None:
        widths = [spec.width, 2 * spec.width, 4 * spec.width]
        super().__init__(spec.grid(shape), sum(widths), spec.channels)
        self.spec, self.share = spec, spec.share
        before = [shape[0], *widths]
        self.stages = nn.ModuleList(_stage(a, b) for a, b in zip(before, widths, strict=False))
        self.repair = nn.Conv2d(sum(widths), shape[0] * spec.stride**2, 1)
        self.views = nn.Linear(widths[-1], COUNT) if spec.views else None
        self.eval()

    def maps(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def loss(self, x: Tensor, generator: Generator) -> Tensor:
        """The repair's squared error as a share of the pictures' variance, and cross-entropy of the view, nats."""
        x = _square(x, self.spec.stride, generator)
        number = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if self.views is not None:
            number = torch.randint(COUNT, number.shape, generator=generator, device=x.device)
            x = torch.stack([view(one, int(k)) for one, k in zip(x[:, None], number, strict=True)])[:, 0]
        damaged = corrupt(x, self.spec.corruption, generator).images
        self.stages.train()
        found = self.maps(damaged)
        self.stages.eval()
        grid = (x.shape[2] // self.spec.stride, x.shape[3] // self.spec.stride)
        repaired = F.pixel_shuffle(self.repair(torch.cat([_brought(one, grid) for one in found], 1)), self.spec.stride)
        error = F.mse_loss(repaired.float(), x) / x.var().clamp_min(1e-4)
        return error if self.views is None else error + F.cross_entropy(self.views(found[-1].mean((2, 3))), number)


def _stage(before: int, after: int) -> nn.Sequential:
    """Half the resolution: a cell's middle lies where the four pixels meet that it is made of, so that maps align."""
    return nn.Sequential(
        nn.Conv2d(before, after, 4, 2, 1, bias=False),
        nn.BatchNorm2d(after),
        nn.LeakyReLU(0.1),
        nn.Conv2d(after, after, 3, 1, 1, bias=False),
        nn.BatchNorm2d(after),
        nn.LeakyReLU(0.1),
    )


def _brought(maps: Tensor, grid: Grid) -> Tensor:
    """Maps (B, C, h, w) on another grid: means of the finer cells, or between the coarser ones."""
    if maps.shape[2:] == grid:
        return maps
    if maps.shape[2] >= grid[0]:
        return F.interpolate(maps, size=grid, mode="area")
    return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)


def _square(x: Tensor, stride: int, generator: Generator) -> Tensor:
    """The same square of all pictures, as many whole cells as fit, at a place by chance: only squares can be turned."""
    side = min(x.shape[2:]) // stride * stride
    top, left = (int(torch.randint(size - side + 1, (), generator=generator, device=x.device)) for size in x.shape[2:])
    return x[:, :, top : top + side, left : left + side]

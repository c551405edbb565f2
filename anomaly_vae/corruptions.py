"""What training does to its input while the target stays clean: denoising (Vincent et al. 2008) and made-up defects.

A corruption maps images x (B, C, H, W) in [0, 1] and a generator on their device to images of the same shape and type
in a new tensor. Chance is spent by shape alone, so equal seeds give equal corruptions whatever the pictures show. No
loop runs over pictures.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor
from torch.nn import functional as F

from anomaly_vae.spec import Spec

Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]

_FINEST_CELL = 2
"""Pixels between the finest stroke noise's lattice points: a scratch can be as thin as that."""
_MOST_CELLS = 64
_LONGEST_ASPECT = 8.0
_FIBRES = 3
_THINNEST_FIBRE, _THICKEST_FIBRE = 1.5, 0.1
"""In pixels (thinner ones would have gaps) and as a share of the picture's longer side."""
_LENGTH, _WAVES = (0.2, 2.0), (0.5, 3.0)
_BEND, _STEEPNESS = 2.0, 0.7
"""A fibre's length and waves per longer side; the most of its parabola's factor and of the slope of its waves."""
_BRIGHTNESS = (0.1, 0.5)
_LEAST_CHANGE = 0.5 / 255
"""Half a grey level, the least that a picture file can hold."""
_BINS = 4096
"""Steps of the noise's range among which its threshold is chosen: one holds few pixels even of 512 x 512."""


class Corrupted(NamedTuple):
    """`images` (B, C, H, W) and `mask` (B, 1, H, W) of the same type: 1 where a pixel was changed on purpose, else 0.

    A pixel that was hit but kept its value (black painted on black) is not in the mask: nobody could find it.
    """

    images: Tensor
    mask: Tensor


class Corruption(Spec):
    """Base: `kind` names the member."""

    @abstractmethod
    def apply(self, x: Tensor, generator: Generator) -> Corrupted:
        """Corrupted images and where they differ from x on purpose."""

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        """The corrupted images alone, (B, C, H, W)."""
        return self.apply(x, generator).images


class NoiseSpec(Corruption):
    """Gaussian noise of standard deviation `sigma`, in shares of the grey range, on every pixel and channel.

    The sum is not clipped to [0, 1]: clipping would bias the noise at black and white, so that the clean picture were
    no longer the mean of the corrupted ones. The mask is empty, for the noise is no defect.
    """

    kind: Literal["noise"] = "noise"
    sigma: float = Field(0.1, ge=0, le=10)

    def apply(self, x: Tensor, generator: Generator) -> Corrupted:
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        return Corrupted(x + self.sigma * noise.to(x.dtype), torch.zeros_like(x[:, :1]))


class DropoutSpec(Corruption):
    """Masking noise (Vincent et al. 2008, section 3): a share `rate` of the pixels is 0, in all channels together.

    What is left is not scaled up, unlike a layer's dropout. Stays in [0, 1].
    """

    kind: Literal["dropout"] = "dropout"
    rate: float = Field(0.1, ge=0, lt=1)

    def apply(self, x: Tensor, generator: Generator) -> Corrupted:
        dropped = _uniform(x, (len(x), 1, *x.shape[2:]), generator) < self.rate
        return _compared(x, x * (~dropped).to(x.dtype))


class MasksSpec(Corruption):
    """1 to `rectangles` axis-parallel rectangles, each side a share of the picture's side between those of `sides`.

    Each picture is touched with `probability` and draws its number of rectangles and one of `fills` for all of them:
    one colour, or uniform noise. Rectangles lie inside the picture, have at least 1 px a side and may overlap (random
    erasing, Zhong et al. 2020). Stays in [0, 1].
    """

    kind: Literal["masks"] = "masks"
    rectangles: int = Field(3, ge=1, le=64)
    sides: tuple[PositiveShare, PositiveShare] = (0.05, 0.3)
    fills: tuple[Literal["colour", "noise"], ...] = Field(("colour", "noise"), min_length=1)
    probability: Share = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order("sides", self.sides)
        return self

    def apply(self, x: Tensor, generator: Generator) -> Corrupted:
        batch, channels, height, width = x.shape
        rows, columns = self._spans(x, height, generator), self._spans(x, width, generator)
        count = torch.randint(1, self.rectangles + 1, (batch, 1), generator=generator, device=x.device)
        used = torch.arange(self.rectangles, device=x.device) < count
        # A pixel is covered when some rectangle has both its row and its column: a matrix product counts them.
        covered = ((rows * used[:, :, None]).mT @ columns)[:, None] > 0
        touched = covered & _touched(x, self.probability, generator)
        noisy = _chosen(x, self.fills, generator)["noise"]
        colour = _uniform(x, (batch, channels, 1, 1), generator)
        fill = torch.where(noisy, _uniform(x, x.shape, generator), colour)
        return _compared(x, torch.where(touched, fill.to(x.dtype), x))

    def _spans(self, x: Tensor, side: int, generator: Generator) -> Tensor:
        """1 inside the random stretch that each rectangle has along an axis of `side` px, shape (B, rectangles, side).

        A stretch of n pixels has side - n + 1 places, all equally likely.
        """
        size = (len(x), self.rectangles, 1)
        low, high = self.sides
        length = (side * (low + (high - low) * _uniform(x, size, generator))).round().clamp(1, side)
        # The minimum guards against a product that rounds up to the first place too far.
        start = torch.minimum((_uniform(x, size, generator) * (side - length + 1)).floor(), side - length)
        place = torch.arange(side, device=x.device)
        return ((place >= start) & (place < start + length)).float()


class StrokesSpec(Corruption):
    """Blots, specks, scratches and fibres: something else is blended over a part of the picture.

    Each picture is touched with `probability` and then draws:
    - one of `shapes`. `blots` lie where smooth noise is highest, its scale from half the picture to 2 px, log-uniform,
      its stretch up to 8 : 1 and its direction free, as the Perlin noise masks of DRAEM (Zavrtanik et al. 2021) that
      this follows; the share of the pixels that they cover is log-uniform between those of `area`, at least one pixel.
      `fibres` are 1 to 3 bent lines: hairs, cracks. Their width is log-uniform from 1.5 px to a tenth of the longer
      side, their length from a fifth of it to all across;
    - one of `fills`: one colour; a change of brightness by 0.1 to 0.5 up or down; or a piece of another picture of the
      batch (of itself if alone), turned by right angles, flipped and shifted, exact to the pixel (after CutPaste, Li
      et al. 2021);
    - the fill's opacity, uniform between those of `opacity`;
    - how far from the edge of what is covered to its middle that opacity rises from 0, a share up to `softness`: stains
      and shading have no edge. What would change by less than half a grey level is then left alone.
    Stays in [0, 1].
    """

    kind: Literal["strokes"] = "strokes"
    area: tuple[PositiveShare, PositiveShare] = (0.001, 1 / 3)
    shapes: tuple[Literal["blots", "fibres"], ...] = Field(("blots",), min_length=1)
    fills: tuple[Literal["colour", "brightness", "piece"], ...] = Field(("colour", "brightness", "piece"), min_length=1)
    opacity: tuple[PositiveShare, PositiveShare] = (0.2, 1.0)
    softness: Share = 0.0
    probability: Share = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order("area", self.area)
        _check_order("opacity", self.opacity)
        return self

    def apply(self, x: Tensor, generator: Generator) -> Corrupted:
        area = _log_uniform(x, self.area, (len(x),), generator)
        height = _smooth_noise(x, generator)
        covered = _highest(height, (area * x[0, 0].numel()).floor().clamp(min=1))
        if "fibres" in self.shapes:
            bent = _chosen(x, self.shapes, generator)["fibres"][:, 0]
            fibres = _fibres(x, generator)
            height, covered = torch.where(bent, fibres, height), torch.where(bent, fibres > -1, covered)
        touched = covered[:, None] & _touched(x, self.probability, generator)
        low, high = self.opacity
        opacity = low + (high - low) * _uniform(x, (len(x), 1, 1, 1), generator)
        fill = self._fill(x, generator)
        if self.softness:
            opacity = opacity * _rise(height, covered, self.softness * _uniform(x, (len(x), 1, 1), generator))[:, None]
        # Opacity 0 leaves a pixel exactly as it was, which spares a copy under the mask.
        images = torch.lerp(x, fill, (touched * opacity).to(x.dtype))
        if self.softness:
            images = torch.where((images - x).abs() < _LEAST_CHANGE, x, images)
        return _compared(x, images)

    def _fill(self, x: Tensor, generator: Generator) -> Tensor:
        """What is blended over each picture, (B, C, H, W): gain * source + offset covers all fills in one pass."""
        chosen = _chosen(x, self.fills, generator)
        colour = _uniform(x, (len(x), x.shape[1], 1, 1), generator)
        low, high = _BRIGHTNESS
        change = low + (high - low) * _uniform(x, (len(x), 1, 1, 1), generator)
        change = torch.where(_touched(x, 0.5, generator), change, -change)
        offset = torch.where(chosen["colour"], colour, torch.where(chosen["brightness"], change, 0.0))
        source = _pieces(x, chosen["piece"].flatten(), generator)
        return source.mul_((~chosen["colour"]).to(x.dtype)).add_(offset.to(x.dtype)).clamp_(0, 1)


CorruptionSpec = Annotated[NoiseSpec | DropoutSpec | MasksSpec | StrokesSpec, Field(discriminator="kind")]


def corrupt(x: Tensor, specs: Sequence[CorruptionSpec], generator: Generator) -> Corrupted:
    """Apply `specs` in order, each to what the one before it left; the masks are united. No specs: a copy of x."""
    images, mask = x.clone(), torch.zeros_like(x[:, :1])
    for spec in specs:
        images, changed = spec.apply(images, generator)
        mask = torch.maximum(mask, changed)
    return Corrupted(images, mask)


def _check_order(name: str, bounds: tuple[float, float]) -> None:
    if bounds[0] > bounds[1]:
        raise ValueError(f"{name} must be [low, high] with low <= high, not {list(bounds)}; swap them")


def _compared(x: Tensor, images: Tensor) -> Corrupted:
    return Corrupted(images, (images != x).any(1, keepdim=True).to(x.dtype))


def _uniform(x: Tensor, size: Sequence[int], generator: Generator) -> Tensor:
    """Uniform numbers in [0, 1) on x's device, always float32: a half-precision 0.999 would round to 1."""
    return torch.rand(tuple(size), generator=generator, device=x.device)


def _log_uniform(x: Tensor, bounds: tuple[float, float], size: Sequence[int], generator: Generator) -> Tensor:
    low, high = math.log(bounds[0]), math.log(bounds[1])
    return (low + (high - low) * _uniform(x, size, generator)).exp()


def _touched(x: Tensor, probability: float, generator: Generator) -> Tensor:
    """Which pictures are touched, bool (B, 1, 1, 1)."""
    return _uniform(x, (len(x), 1, 1, 1), generator) < probability


def _chosen(x: Tensor, fills: Sequence[str], generator: Generator) -> dict[str, Tensor]:
    """For each kind of fill or shape, the pictures that drew it, bool (B, 1, 1, 1); all False for kinds not listed."""
    drawn = torch.randint(len(fills), (len(x), 1, 1, 1), generator=generator, device=x.device)
    nobody = torch.zeros_like(drawn, dtype=torch.bool)
    chosen = dict.fromkeys(("colour", "noise", "brightness", "piece", "blots", "fibres"), nobody)
    for i, fill in enumerate(fills):
        chosen[fill] = chosen[fill] | (drawn == i)  # a fill listed twice is drawn twice as often
    return chosen


def _smooth_noise(x: Tensor, generator: Generator) -> Tensor:
    """Value noise on a lattice that each picture scales, stretches and turns for itself, shape (B, H, W)."""
    batch = len(x)
    longest = max(x.shape[2:])
    most = min(max(longest / _FINEST_CELL, 2.0), float(_MOST_CELLS))
    lattice = math.ceil(most) + 1
    values = torch.randn((batch, 1, lattice, lattice), generator=generator, device=x.device)
    cells = _log_uniform(x, (2.0, most), (batch, 1, 1), generator)
    aspect = _log_uniform(x, (1.0, _LONGEST_ASPECT), (batch, 1, 1), generator)
    angle = math.pi * _uniform(x, (batch, 1, 1), generator)
    phase = _uniform(x, (2, batch, 1, 1), generator) + lattice // 2
    rows, columns = _places(x)
    # In lattice units; what runs beyond the lattice is mirrored back by the sampling.
    fine, coarse = cells, cells / aspect
    across = (fine * angle.cos() * columns + phase[0]) + fine * angle.sin() * rows
    along = (coarse * angle.cos() * rows + phase[1]) - coarse * angle.sin() * columns
    grid = torch.stack([_eased(across), _eased(along)], -1).mul_(2 / (lattice - 1)).sub_(1)
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="reflection", align_corners=True)[:, 0]


def _fibres(x: Tensor, generator: Generator) -> Tensor:
    """Minus the distance to the nearest of a picture's bent lines, in halves of that line's width, shape (B, H, W).

    A line is a parabola with a ripple, in a frame turned and moved so that it passes through a point of the picture.
    Its distance across over the root of 1 + slope^2 is near enough to the true one.
    """
    size = (len(x), _FIBRES, 1, 1)
    rows, columns = _places(x)
    angle, phase = math.pi * _uniform(x, size, generator), 2 * math.pi * _uniform(x, size, generator)
    down, right = 2 * _uniform(x, (2, *size), generator) - 1
    rows, columns = rows - down * rows.abs().amax(), columns - right * columns.abs().amax()
    across = angle.cos() * columns + angle.sin() * rows
    along = angle.cos() * rows - angle.sin() * columns
    bend = _BEND * (2 * _uniform(x, size, generator) - 1)
    waves = 2 * math.pi * _log_uniform(x, _WAVES, size, generator)
    steepness = _STEEPNESS * _uniform(x, size, generator)
    turn = waves * along + phase
    slope = 2 * bend * along + steepness * turn.cos()
    aside = (across - bend * along**2 - steepness / waves * (turn.sin() - phase.sin())) / (1 + slope**2).sqrt()
    beyond = (along.abs() - _log_uniform(x, _LENGTH, size, generator) / 2).clamp(min=0)
    thin = _THINNEST_FIBRE / max(x.shape[2:])
    width = _log_uniform(x, (thin, max(thin, _THICKEST_FIBRE)), size, generator)
    count = torch.randint(1, _FIBRES + 1, (len(x), 1, 1, 1), generator=generator, device=x.device)
    left_out = torch.arange(_FIBRES, device=x.device)[:, None, None] >= count
    return -(torch.hypot(aside, beyond) / (width / 2)).masked_fill(left_out, torch.inf).amin(1)


def _places(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (H, 1) and columns (W,) counted from the middle of the picture, in shares of its longer side."""
    height, width = x.shape[2:]
    longest = max(height, width)
    rows = torch.arange(height, device=x.device).sub((height - 1) / 2).div(longest)[:, None]
    return rows, torch.arange(width, device=x.device).sub((width - 1) / 2).div(longest)


def _eased(place: Tensor) -> Tensor:
    """Slow down at lattice points, so that linear interpolation between them has no creases there."""
    whole = place.floor()
    part = place - whole
    return (3 - 2 * part).mul_(part).mul_(part).add_(whole)


def _highest(noise: Tensor, count: Tensor) -> Tensor:
    """Mark the `count` (B,) >= 1 highest values of each map (B, H, W), or a few less but never none; bool (B, H, W).

    The threshold is read off a histogram: the maps' sorting would take longer than all the rest of a stroke.
    """
    batch = len(noise)
    low, high = noise.amin((1, 2), keepdim=True), noise.amax((1, 2), keepdim=True)
    # The last bin is the maximum's own: the division, unlike a product with the inverse, makes it 1 exactly.
    bins = (noise - low).div_((high - low).clamp_min(1e-12)).mul_(_BINS - 1).long()
    offsets = torch.arange(batch, device=noise.device)[:, None, None] * _BINS
    pixels = torch.bincount((bins + offsets).flatten(), minlength=batch * _BINS).view(batch, _BINS)
    from_here_up = pixels.flip(1).cumsum(1).flip(1)
    first = (from_here_up > count[:, None]).sum(1).clamp(max=_BINS - 1)
    return bins >= first[:, None, None]


def _rise(noise: Tensor, covered: Tensor, softness: Tensor) -> Tensor:
    """From 0 at the edge of what is covered to 1 at the share `softness` (B, 1, 1) of the way to its highest noise."""
    edge = torch.where(covered, noise, torch.inf).amin((1, 2), keepdim=True)
    height = (noise.amax((1, 2), keepdim=True) - edge) * softness
    return ((noise - edge) / height.clamp_min(1e-12)).clamp(0, 1)


def _pieces(x: Tensor, moved: Tensor, generator: Generator) -> Tensor:
    """Another picture of the batch, turned, flipped and shifted, where `moved` (B,), else the picture; a new tensor.

    What a shift pushes out comes back mirrored, as a seam would give the piece away.
    """
    batch, channels, height, width = x.shape
    device = x.device
    other = torch.randint(1, max(batch, 2), (batch,), generator=generator, device=device)
    picture = (torch.arange(batch, device=device) + other * moved) % batch
    turned = (_uniform(x, (batch, 1), generator) < 0.5) & moved[:, None]
    shift = _uniform(x, (2, batch, 1), generator) * moved[:, None]
    reach = torch.arange(max(height, width), device=device)
    # The second half of the mirrored axis runs backwards: a shift into it is a flip.
    row = _mirrored(reach + (shift[0] * 2 * height).long(), height) * width
    column = _mirrored(reach + (shift[1] * 2 * width).long(), width)
    down, right = torch.where(turned, column, row), torch.where(turned, row, column)
    place = down[:, :height, None] + right[:, None, :width]
    start = (picture[:, None] * channels + torch.arange(channels, device=device)) * (height * width)
    return x.take(start[:, :, None, None] + place[:, None])


def _mirrored(place: Tensor, side: int) -> Tensor:
    """Places 0 <= p on an axis of `side` px that is continued by its mirror image."""
    place = place % (2 * side)
    return torch.minimum(place, 2 * side - 1 - place)

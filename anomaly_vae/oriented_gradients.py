"""Gradients of pictures by the direction they point in, and means of maps on coarser grids.

In float64, where convolutions are slow: means are sums of shifted maps, or products of matrices.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]

_SMOOTHING, _RADIUS = 0.7, 2
_WEAK = 1e-3
"""A gradient, per pixel of a picture in [0, 1], that is noise rather than an edge."""


def grid_of(x: Tensor, cells: int) -> Grid:
    """Rows and columns of cells over images (B, C, H, W), `cells` of them along the shorter side.

    They are nearly square up to a ratio of 4 : 1; beyond, there are no more of them.
    """
    height, width = _sides(x)
    cell = min(height, width) / cells
    return min(round(height / cell), 4 * cells), min(round(width / cell), 4 * cells)


def oriented(x: Tensor, orientations: int) -> Tensor:
    """Strength of the gradient of pictures (B, C, H, W) towards each of so many directions, (B, orientations, H, W).

    Direction k points k / orientations of a turn from the right downwards; a gradient counts for all within a right
    angle of its own, by the squared cosine. Of colours the strongest counts.
    """
    padded = F.pad(_smoothed(x), (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    across, down = _strongest(across, down)
    strength = (across.square() + down.square()).sqrt()
    angles = torch.arange(orientations, device=x.device, dtype=x.dtype) * (2 * math.pi / orientations)
    # In place: these are the largest maps of all, and memory is what they wait for.
    towards = (across * angles.cos().view(1, -1, 1, 1)).addcmul_(down, angles.sin().view(1, -1, 1, 1))
    return towards.clamp_(min=0).square_().div_(strength + _WEAK)


def windowed(maps: Tensor, grid: Grid, sigma: float) -> Tensor:
    """Means of maps (B, C, H, W) in Gaussian windows of `sigma` pixels about the centres of a grid, (B, C, *grid)."""
    down, across = (_windows(count, size, sigma, maps) for count, size in zip(grid, _sides(maps), strict=True))
    return down @ (maps @ across.T)


def _sides(maps: Tensor) -> tuple[int, int]:
    """Height and width of maps (B, C, H, W)."""
    # While scores are recorded (`compiled`), a size is a float32 tensor in all that is reckoned of it, until made one.
    return int(maps.shape[2]), int(maps.shape[3])


def _smoothed(x: Tensor) -> Tensor:
    """Images (B, C, H, W) under a Gaussian of 0.7 px, as wide as a thin stroke; borders repeat."""
    weights = [math.exp(-0.5 * (offset / _SMOOTHING) ** 2) for offset in range(-_RADIUS, _RADIUS + 1)]
    for axis in (2, 3):
        size = x.shape[axis]
        sides = (0, 0, _RADIUS, _RADIUS) if axis == 2 else (_RADIUS, _RADIUS, 0, 0)
        padded = F.pad(x, sides, mode="replicate")
        x = torch.zeros_like(x)
        for i, weight in enumerate(weights):
            x.add_(padded.narrow(axis, i, size), alpha=weight / sum(weights))
    return x


def _strongest(across: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Of gradients (B, C, H, W) that of the channel where it is strongest, (B, 1, H, W) each."""
    found, best = (across[:, :1], down[:, :1]), across[:, :1].square() + down[:, :1].square()
    for channel in range(1, across.shape[1]):
        mine = across[:, channel, None], down[:, channel, None]
        strength = mine[0].square() + mine[1].square()
        stronger = strength > best
        found = torch.where(stronger, mine[0], found[0]), torch.where(stronger, mine[1], found[1])
        best = torch.where(stronger, strength, best)
    return found


def _windows(count: int, size: int, sigma: float, like: Tensor) -> Tensor:
    """Weights (count, size), each row summing to 1."""
    centres = (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) * (size / count)
    places = torch.arange(size, device=like.device, dtype=like.dtype) + 0.5
    return (-0.5 * ((places - centres[:, None]) / sigma).square()).softmax(1)

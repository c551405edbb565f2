"""Gradients of pictures by the direction they point in, and means of maps on coarser grids.

Means are products of matrices: in float64 these are many times as fast as convolutions.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]

SMOOTHING = 0.7
"""Pixels: the width of a thin stroke."""
_WEAK = 1e-3
"""A gradient, per pixel of a picture in [0, 1], that is noise rather than an edge."""


def grid_of(x: Tensor, cells: int) -> Grid:
    """Rows and columns of nearly square cells over images (B, C, H, W), `cells` of them along the shorter side."""
    height, width = x.shape[2:]
    cell = min(height, width) / cells
    return round(height / cell), round(width / cell)


def oriented(x: Tensor, orientations: int) -> Tensor:
    """Strength of the gradient of pictures (B, C, H, W) towards each of so many directions, (B, orientations, H, W).

    Direction k points k / orientations of a turn from the right downwards; one between two counts for both. Of colours
    the strongest counts.
    """
    padded = F.pad(windowed(x, (x.shape[2], x.shape[3]), SMOOTHING), (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    strongest = (across.square() + down.square()).argmax(1, keepdim=True)
    across, down = across.gather(1, strongest), down.gather(1, strongest)
    strength = (across.square() + down.square()).sqrt()
    angles = torch.arange(orientations, device=x.device, dtype=x.dtype) * (2 * math.pi / orientations)
    # In place: these are the largest maps of all, and memory is what they wait for.
    towards = (across * angles.cos().view(1, -1, 1, 1)).addcmul_(down, angles.sin().view(1, -1, 1, 1))
    return towards.clamp_(min=0).square_().div_(strength + _WEAK)


def windowed(maps: Tensor, grid: Grid, sigma: float) -> Tensor:
    """Means of maps (B, C, H, W) in Gaussian windows of `sigma` pixels about the centres of a grid, (B, C, *grid)."""
    down, across = (_windows(count, size, sigma, maps) for count, size in zip(grid, maps.shape[2:], strict=True))
    return down @ maps @ across.T


def _windows(count: int, size: int, sigma: float, like: Tensor) -> Tensor:
    """Weights (count, size), each row summing to 1."""
    centres = (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) * (size / count)
    places = torch.arange(size, device=like.device, dtype=like.dtype) + 0.5
    return (-0.5 * ((places - centres[:, None]) / sigma).square()).softmax(1)

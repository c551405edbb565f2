"""Boxes around what a heat map shows, in the pixels of the picture as it was given."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from anomaly_vae.images import ImageSpec, peek

SEED, EDGE = 2.0, 1.0
"""A region is where heat is above 1 (0.5% of the pixels of normal pictures are) around a place where it is above 2."""
MOST = 20
_LEAST_PIXELS = 2
_EIGHT_NEIGHBOURS = np.ones((3, 3))


class Region(NamedTuple):
    """A box in pixels (`x`, `y`: upper left corner), the share `area` of the picture that is hot in it, and how hot.

    Heat is in units that 99.5% of the pixels of normal pictures do not exceed.
    """

    x: float
    y: float
    width: float
    height: float
    area: float
    peak_heat: float
    mean_heat: float


def find_regions(heat: NDArray[np.float32], spec: ImageSpec, size: tuple[int, int]) -> list[Region]:
    """Hot regions of a heat map (H, W), the hottest first and at most 20, in a picture of `size` (width, height).

    Normal pictures may have some too: a region says where, the verdict whether.
    """
    heat = np.nan_to_num(np.asarray(heat, np.float64), nan=np.inf)
    numbered, count = ndimage.label(heat > EDGE, structure=_EIGHT_NEIGHBOURS)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(numbered, count), 1):
        inside = numbered[rows, columns] == number
        values = heat[rows, columns][inside]
        if values.max() <= SEED or len(values) < _LEAST_PIXELS:
            continue
        left, top = _placed(columns.start, rows.start, spec, size)
        right, bottom = _placed(columns.stop, rows.stop, spec, size)
        finite = np.minimum(values, np.finfo(np.float32).max)
        box = (left, top, right - left, bottom - top)
        found.append(Region(*box, len(values) / heat.size, float(finite.max()), float(finite.mean())))
    return sorted(found, key=lambda region: -region.peak_heat)[:MOST]


def regions_json(heat: NDArray[np.float32], spec: ImageSpec, data: bytes) -> list[dict[str, Any]]:
    """The regions of the picture that `data` are the bytes of, as plain rounded values."""
    info = peek(data)
    return [
        {name: round(value, 4 if name == "area" else 2) for name, value in region._asdict().items()}
        for region in find_regions(heat, spec, (info.width, info.height))
    ]


def seen_at(positions: NDArray[np.float64], axis: int, spec: ImageSpec, size: tuple[int, int]) -> NDArray[np.float64]:
    """Where the network sees what lies at some `positions` (pixels) along an axis (0: down, 1: across) of a picture of
    `size` (height, width): in its own pixels, beyond them for what it does not see."""
    target = (spec.height, spec.width)
    side, to = size[axis], target[axis]
    ratios = [given / wanted for given, wanted in zip(size, target, strict=True)]
    if spec.fit == "stretch":
        return positions * (to / side)
    if spec.fit == "crop":
        scale = min(ratios)
        return (positions - (side - to * scale) / 2) / scale
    part = min(to, max(1, round(side / max(ratios))))
    return (to - part) // 2 + positions * (part / side)


def _placed(column: float, row: float, spec: ImageSpec, size: tuple[int, int]) -> tuple[float, float]:
    """Where a corner of the network's pixels lies in the picture, which `images.decode` placed as `spec.fit` says."""
    (x, y), target = (column, row), (spec.width, spec.height)
    if spec.fit == "stretch":
        return x * size[0] / target[0], y * size[1] / target[1]
    ratios = [side / to for side, to in zip(size, target, strict=True)]
    if spec.fit == "crop":
        scale = min(ratios)
        x, y = (at * scale + (side - to * scale) / 2 for at, side, to in zip((x, y), size, target, strict=True))
        return x, y
    scale = max(ratios)
    shown = [min(to, max(1, round(side / scale))) for side, to in zip(size, target, strict=True)]
    bars = [(to - part) // 2 for to, part in zip(target, shown, strict=True)]
    x, y = (
        min(max((at - bar) * side / part, 0.0), float(side))
        for at, bar, side, part in zip((x, y), bars, size, shown, strict=True)
    )
    return x, y

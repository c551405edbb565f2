"""Which pictures are nearly the same, and which are unlike all others, from small thumbnails without any training.

Thumbnails are uint8 (n,C,H,W). Both answers compare all pairs in blocks of matrix products: 100,000 pictures take tens
of seconds on two cores.
"""

from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Indices: TypeAlias = npt.NDArray[np.int64]

NEAR = 0.98
"""Whitened cosine from which two pictures are nearly the same: photographs saved again, at another size or slightly
brighter, have more than 0.99; different pictures of one kind, even of the same part in the same pose, seldom 0.7."""

UNUSUAL = 4.0
"""Robust standard deviations of the log distance to the nearest others from which a picture is unusual."""

_AXES = 64
_NOISE = 1.5  # grey levels that re-saving a picture changes its thumbnail by
_RAW_NEAR = 0.85
_SAMPLE = 1000
_NEIGHBOURS = 5
_REFERENCES = 5000
_BLOCK = 2048
_MOST_PAIRS = 10_000


@dataclass(frozen=True, eq=False)
class _Axes:
    """Principal axes (D,k) of thumbnails, with the variance along each."""

    mean: Floats
    axes: Floats
    variance: Floats
    centred: bool

    @classmethod
    def fit(cls, thumbnails: Bytes, centred: bool) -> Self:
        """From at most 1,000 thumbnails, evenly spaced; `centred` forgets how bright each is as a whole."""
        chosen = np.linspace(0, len(thumbnails) - 1, min(len(thumbnails), _SAMPLE)).round().astype(np.int64)
        flat = _flat(thumbnails[chosen], centred)
        mean = flat.mean(axis=0)
        flat -= mean
        # With as many axes as pictures, whitening would make all of them equally far apart.
        kept = min(_AXES, max(1, len(flat) // 3))
        last = (len(flat) - kept, len(flat) - 1)
        variance, vectors = eigh(flat @ flat.T / len(flat), subset_by_index=last)
        axes = flat.T @ vectors
        axes /= np.maximum(np.linalg.norm(axes, axis=0), 1e-6)
        return cls(mean, axes.astype(np.float32), np.maximum(variance, 0).astype(np.float32), centred)

    def residuals(self, thumbnails: Bytes) -> Floats:
        return _flat(thumbnails, self.centred) - self.mean

    def coordinates(self, thumbnails: Bytes) -> tuple[Floats, Floats]:
        """Coordinates (n,k) and the squared length (n) of what the axes leave out."""
        starts = range(0, len(thumbnails), _BLOCK)
        blocks = [self.residuals(thumbnails[start : start + _BLOCK]) for start in starts]
        inside = np.concatenate([block @ self.axes for block in blocks])
        total = np.concatenate([np.square(block).sum(axis=1) for block in blocks])
        return inside, np.maximum(total - np.square(inside).sum(axis=1), 0)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Nearly equal pictures `first` < `second`, most similar first; `total` counts those beyond 10,000 too."""

    first: Indices
    second: Indices
    similarity: Floats
    total: int


def near_pairs(thumbnails: Bytes) -> Pairs:
    """Pairs whose deviations from the average picture agree: cosine of at least 0.98 along whitened principal axes.

    Whitening makes what all pictures share (the same part in the same pose) count for nothing. A copy that is cropped
    or turned is not found.
    """
    if len(thumbnails) < 2:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), 0)
    axes = _Axes.fit(thumbnails, centred=True)
    inside, _ = axes.coordinates(thumbnails)
    white = _unit(inside / np.sqrt(axes.variance + _NOISE**2))
    found: list[Indices] = [np.zeros((0, 2), np.int64)]
    total = 0
    for row in range(0, len(white), _BLOCK):
        for column in range(row, len(white), _BLOCK):
            cosine = white[row : row + _BLOCK] @ white[column : column + _BLOCK].T
            first, second = np.nonzero(cosine >= NEAR)
            block = np.stack([first + row, second + column], axis=1)[first + row < second + column]
            block = block[_alike(axes, thumbnails, block)]
            total += len(block)
            if sum(len(pairs) for pairs in found) < _MOST_PAIRS:
                found.append(block)
    pairs = np.concatenate(found)
    similarity = np.einsum("ij,ij->i", white[pairs[:, 0]], white[pairs[:, 1]])
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -similarity))[:_MOST_PAIRS]
    return Pairs(pairs[order, 0], pairs[order, 1], similarity[order], total)


def unusual(thumbnails: Bytes) -> Floats:
    """How much farther each picture is from its 5 nearest others than the typical one, in robust standard deviations.

    Of the logarithm of the root mean square distance; scale 1.4826 MAD. Higher is more unusual; above 4 is suspect.
    """
    if len(thumbnails) <= _NEIGHBOURS:
        return np.zeros(len(thumbnails), np.float32)
    inside, outside = _Axes.fit(thumbnails, centred=False).coordinates(thumbnails)
    chosen = np.linspace(0, len(inside) - 1, min(len(inside), _REFERENCES)).round().astype(np.int64)
    squared = np.concatenate([_nearest(inside, outside, chosen, start) for start in range(0, len(inside), _BLOCK)])
    log = 0.5 * np.log(squared + thumbnails[0].size * 1.0)  # a distance of one level is none
    middle = np.median(log)
    spread = 1.4826 * np.median(np.abs(log - middle))
    return np.asarray((log - middle) / max(float(spread), 0.02), np.float32)


def _nearest(inside: Floats, outside: Floats, chosen: Indices, start: int) -> Floats:
    """Mean squared distance of a block of pictures to the 5 nearest of the `chosen`, without themselves."""
    rows = np.arange(start, min(start + _BLOCK, len(inside)))
    length = np.square(inside).sum(axis=1) + outside
    distance = length[rows, None] + length[None, chosen] - 2 * inside[rows] @ inside[chosen].T
    distance[rows[:, None] == chosen[None, :]] = np.inf
    nearest = np.partition(distance, _NEIGHBOURS, axis=1)[:, :_NEIGHBOURS]
    return np.asarray(np.maximum(nearest.mean(axis=1), 0), np.float32)


def _alike(axes: _Axes, thumbnails: Bytes, pairs: Indices) -> npt.NDArray[np.bool_]:
    """Whether pairs also agree in what whitening leaves out: cosine of whole thumbnails less the average."""
    result = [np.zeros(0, np.bool_)]
    for start in range(0, len(pairs), _BLOCK):
        first, second = (_unit(axes.residuals(thumbnails[side])) for side in pairs[start : start + _BLOCK].T)
        result.append(np.einsum("ij,ij->i", first, second) >= _RAW_NEAR)
    return np.concatenate(result)


def _flat(thumbnails: Bytes, centred: bool) -> Floats:
    planes = thumbnails.reshape(len(thumbnails), thumbnails.shape[1], -1).astype(np.float32)
    if centred:
        planes -= planes.mean(axis=2, keepdims=True)
    return planes.reshape(len(thumbnails), -1)


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6), np.float32)

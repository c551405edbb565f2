"""Whitening by normals: coordinates in which what they vary by has unit variance, from however few rows there are."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from anomaly_vae.observations import wide

Array = npt.NDArray[np.float64]
Fitted = dict[str, npt.NDArray[np.float32]]

_RANK = 256
"""Directions that are told apart; the others share one variance, so that wide rows cost no square matrix."""
_FLOOR = 1e-3
"""Least standard deviation of a column, as a share of the median one: a unit that is silent on all normals counts when
it speaks, but not without end."""


def fit_whitening(rows: Array) -> Fitted:
    """What `whitened` wants, from rows (n, D) of normals, n >= 1.

    Each column is scaled by its own deviation; the correlations are then shrunk towards none by Ledoit and Wolf's
    (2004) optimum, which needs only products of rows and so allows D far above n.
    """
    mean, scale = rows.mean(0), _scales(rows)
    centred = (rows - mean) / scale
    count, size = centred.shape
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    values, level = singular**2 / count, float((centred**2).mean())
    shrinkage = _shrinkage(centred, values, level)
    kept = min(_RANK, len(values))
    left = max((values.sum() - values[:kept].sum()) / max(size - kept, 1), 0.0)
    floor = max(_FLOOR * level, 1e-12)
    along = np.maximum((1 - shrinkage) * values[:kept] + shrinkage * level, floor)
    across = max((1 - shrinkage) * left + shrinkage * level, floor)
    found = {
        "mean": mean,
        "scale": scale,
        "directions": directions[:kept].T,
        "along": 1 / np.sqrt(along),
        "across": np.array([1 / np.sqrt(across)]),
    }
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


def whitened(values: Tensor, fitted: Mapping[str, Tensor]) -> Tensor:
    """Rows (B, D) centred and whitened, (B, D); the squared length is the Mahalanobis distance."""
    centred = (wide(values) - wide(fitted["mean"])) / wide(fitted["scale"])
    directions, across = wide(fitted["directions"]), wide(fitted["across"])
    return centred * across + ((centred @ directions) * (wide(fitted["along"]) - across)) @ directions.T


def distance(values: Tensor, fitted: Mapping[str, Tensor]) -> Tensor:
    """Squared Mahalanobis distance of rows (B, D) from the normals' mean, shape (B,)."""
    return whitened(values, fitted).square().sum(1)


def _scales(rows: Array) -> Array:
    deviations = rows.std(0)
    # The rounding of float32 is no deviation.
    alive = deviations > 1e-6 * np.maximum(np.abs(rows).max(0), 1e-6)
    usual = float(np.median(deviations[alive])) if alive.any() else 1.0
    return np.asarray(np.maximum(deviations, _FLOOR * usual), np.float64)


def _shrinkage(centred: Array, values: Array, level: float) -> float:
    """The share of the identity in Ledoit and Wolf's estimate; 1 where the rows say nothing about correlations."""
    count, size = centred.shape
    squared = float((values**2).sum())
    away = squared - level**2 * size
    noise = (float(((centred**2).sum(1) ** 2).sum()) / count - squared) / count
    return min(max(noise, 0.0) / away, 1.0) if count > 1 and away > 1e-12 * max(squared, 1e-300) else 1.0

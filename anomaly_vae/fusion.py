"""Several scores -> one, without labels. NumPy and SciPy only.

Each score is put on a common scale by normals of the *fit* split: within the body of the normals by its rank, z =
Phi^-1(ECDF(score)), and beyond the 90th (and below the 10th) percentile linearly, so that strong anomalies are not all
tied at the last rank. The scales are fixed before calibration, so the fused score calibrates like any other.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import special

from anomaly_vae.spec import Spec

Floats = npt.NDArray[np.float64]

_LEVELS = np.linspace(0.1, 0.9, 17)
"""Knots of the stored ECDF: enough for its body, few enough to be stable with some dozen normals."""
_NORMAL_KNOTS = special.ndtri(_LEVELS)


class FusionSpec(Spec):
    """`parts` are the scores that enter; the fused score is the mean of their z's, where a z below 0 counts `leak`.

    An error smaller than usual is no anomaly and must not excuse another part; the small leak (down to z = -3)
    only breaks ties.
    """

    parts: tuple[str, ...] = ("relative_error", "local_maximum", "mahalanobis")
    leak: float = Field(0.05, ge=0, le=1)
    combine: Literal["mean_positive"] = "mean_positive"

    def fuse(self, z: Floats) -> Floats:
        """Fused score of z's with shape (images, parts)."""
        return np.asarray(np.where(z > 0, z, self.leak * np.maximum(z, -3.0)).mean(1), np.float64)


def fit_scale(scores: npt.ArrayLike) -> Floats:
    """The 17 quantiles (10% to 90%) of a score among normals, made strictly increasing; shape (17,)."""
    knots = np.quantile(np.asarray(scores, np.float64), _LEVELS)
    spread = max(float(np.ptp(knots)), 1e-9 * max(1.0, float(np.abs(knots).max())))
    # Equal scores among normals give flat steps, on which interpolation has no slope.
    return np.asarray(np.maximum.accumulate(knots) + np.arange(len(knots)) * spread * 1e-6, np.float64)


def standardise(scores: npt.ArrayLike, knots: Floats) -> Floats:
    """z of scores: Phi^-1 of their rank inside the knots, linear beyond with the slope of the wider half.

    The wider half, since with some dozen normals a half may by chance be so narrow that all beyond it looks extreme.
    """
    s = np.asarray(scores, np.float64)
    z = np.interp(s, knots, _NORMAL_KNOTS)
    middle = knots[len(knots) // 2]
    spread = max(knots[-1] - middle, middle - knots[0]) / _NORMAL_KNOTS[-1]
    z = np.where(s > knots[-1], _NORMAL_KNOTS[-1] + (s - knots[-1]) / spread, z)
    return np.asarray(np.where(s < knots[0], _NORMAL_KNOTS[0] - (knots[0] - s) / spread, z), np.float64)

"""Several scores -> one, without labels. NumPy and SciPy only.

Each score is put on a common scale by normals of the *fit* split: by its rank among them, z = Phi^-1(ECDF(score)), as
far out as they are many enough to tell, and linearly beyond, so that strong anomalies are not all tied at one rank.
The ranks reach into the tail since a heavy one (a score that is sometimes wild on normal pictures) would otherwise be
taken for evidence. The scales are fixed before calibration, so the fused score calibrates like any other.
"""

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import special

from anomaly_vae.spec import Spec

Floats = npt.NDArray[np.float64]

_BODY = special.ndtri(np.linspace(0.1, 0.9, 17))
"""Knots of the body of the ECDF as z: enough for its shape, few enough to be stable with some dozen normals."""
_MIDDLE = 8
_TAIL_KNOTS = 8
_BEYOND = 8
"""So many normals lie beyond the last knot: the position of fewer is chance."""


class FusionSpec(Spec):
    """`parts` are the scores that enter (null: the usual ones); the fused score is the power mean of their
    z's (1: the plain mean; 64: nearly the largest), by which a loud part outweighs silent ones without drowning them.
    A z below 0 counts `leak` only (down to z = -3, to break ties): an error smaller than usual is no anomaly and must
    not excuse another part.
    """

    parts: tuple[str, ...] | None = Field(None, min_length=1)
    leak: float = Field(0.05, ge=0, le=1)
    power: float = Field(2.0, ge=1, le=64)

    def fuse(self, z: Floats) -> Floats:
        """Fused score of z's with shape (images, parts)."""
        positive = (np.maximum(z, 0) ** self.power).mean(1) ** (1 / self.power)
        return np.asarray(positive + self.leak * np.clip(z, -3.0, 0).mean(1), np.float64)


def fit_scale(scores: npt.ArrayLike) -> Floats:
    """Knots (2, K) of a score's scale among normals: scores, strictly increasing, and their z from -1.28 upwards.

    The last knot is at the 90% quantile, or as far out as eight of the normals lie beyond it.
    """
    scores = np.asarray(scores, np.float64)
    last = special.ndtri(max(0.9, 1 - _BEYOND / len(scores)))
    tail = np.linspace(_BODY[-1], last, _TAIL_KNOTS + 1)[1:] if last > _BODY[-1] + 1e-9 else np.zeros(0)
    z = np.concatenate([_BODY, tail])
    knots = np.quantile(scores, special.ndtr(z))
    spread = max(float(np.ptp(knots)), 1e-9 * max(1.0, float(np.abs(knots).max())))
    # Equal scores among normals give flat steps, on which interpolation has no slope.
    knots = np.maximum.accumulate(knots) + np.arange(len(knots)) * spread * 1e-6
    return np.stack([knots, z])


def standardise(scores: npt.ArrayLike, scale: Floats) -> Floats:
    """z of scores: Phi^-1 of their rank between the knots of `scale`, linear beyond with the gentlest slope.

    The gentlest of both halves and the tail, since with some dozen normals a half may by chance be so narrow that all
    beyond it looks extreme.
    """
    s, spread = np.asarray(scores, np.float64), spread_beyond(scale)
    knots, level = scale
    z = np.interp(s, knots, level)
    z = np.where(s > knots[-1], level[-1] + (s - knots[-1]) / spread, z)
    return np.asarray(np.where(s < knots[0], level[0] - (knots[0] - s) / spread, z), np.float64)


def spread_beyond(scale: Floats) -> float:
    """How much score a unit of z takes beyond the knots of `scale`; see `standardise`."""
    knots, level = scale
    body, middle = len(_BODY) - 1, knots[_MIDDLE]
    spread = max((knots[-1] - middle) / level[-1], (middle - knots[0]) / -level[0])
    if len(knots) > len(_BODY):
        spread = max(spread, (knots[-1] - knots[body]) / (level[-1] - level[body]))
    return float(spread)

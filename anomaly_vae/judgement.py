"""`Judgement` and `Policy`: what a detector says of pictures, and when one is an outlier."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from anomaly_vae.calibration import Calibration, Mode

Floats = npt.NDArray[np.float64]

HEAT_FULL = 4.0
"""Heat is in units of the normals' extreme pixels; from four of them on it is painted brightest."""


@dataclass(frozen=True)
class Policy:
    """When an image is an outlier, and what that promises.

    `threshold`: the score above which it is one; None with K-fold calibration, where the p-value decides.
    `expected_false_alarm_rate`, `bound` and `band` are those of `calibration.Promise`.
    """

    alpha: float
    mode: Mode
    threshold: float | None
    expected_false_alarm_rate: float
    bound: float | None
    band: tuple[float, float] | None


@dataclass(frozen=True)
class Judgement:
    """Verdicts of a batch, as columns. Higher scores and smaller p-values are more anomalous.

    `parts`: every score by name, in its own unit. `heat`: (B, H, W) or None, in a unit that 99.5% of the pixels
    of normal images do not exceed; `heat_scale` is the heat to paint brightest. `latents`: (B, n), those that
    `Detector.watched` names, or None.
    """

    score: list[float]
    p_value: list[float]
    outlier: list[bool]
    parts: dict[str, list[float]]
    heat: npt.NDArray[np.float32] | None
    heat_scale: float
    policy: Policy
    version: str
    latents: Floats | None = None

    def __len__(self) -> int:
        return len(self.score)

    def row(self, i: int) -> dict[str, Any]:
        """The i-th verdict as plain values, ready for JSON."""
        return {
            "score": self.score[i],
            "p_value": self.p_value[i],
            "outlier": self.outlier[i],
            "alpha": self.policy.alpha,
            "mode": self.policy.mode,
            "threshold": self.policy.threshold,
            "parts": {name: column[i] for name, column in self.parts.items()},
        }


def policy_of(calibration: Calibration, alpha: float | None, mode: Mode) -> Policy:
    """The policy at `alpha` (None: the smallest supported one); raises `CalibrationError` when n is too small."""
    alpha = calibration.smallest_alpha(mode) if alpha is None else alpha
    promise = calibration.promise(alpha, mode)
    return Policy(alpha, mode, calibration.threshold(alpha, mode), promise.expected, promise.bound, promise.band)

"""The policy that verdicts go by: the bundle's own, or what an operator chose instead while the service runs."""

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np

from anomaly_vae import ConfigError, Detector
from service.decisions import PolicyChoice

MODES = ("average", "guaranteed")
BY_THRESHOLD = "threshold"


@dataclass(frozen=True)
class InForce:
    """`revision` 0 is the bundle's own. `mode`: see `anomaly_vae.Policy`, or `threshold` where an operator set that.

    `expected_false_alarm_rate`, `bound` and `band` are what it promises of normal pictures. With a threshold only the
    first is known, from above, and `alpha` is that rate.
    """

    revision: int
    alpha: float
    mode: str
    threshold: float | None
    expected_false_alarm_rate: float
    bound: float | None
    band: tuple[float, float] | None

    @classmethod
    def of(
        cls,
        detector: Detector,
        choice: PolicyChoice = PolicyChoice(),  # noqa: B008 - it is frozen
        revision: int = 0,
        base: str | None = None,
    ) -> "InForce":
        """What a choice means for a detector, of the bundle of version `base`.

        Raises `CalibrationError` or `ConfigError` where it means nothing.
        """
        if choice.threshold is None:
            mode = choice.mode or detector.policy.mode
            if mode not in MODES:
                raise ConfigError(f"mode can be {' or '.join(MODES)}, not {mode[:40]!r}")
            alpha = detector.policy.alpha if choice.alpha is None else choice.alpha
            policy = detector.with_policy(alpha, cast(Any, mode)).policy
            return cls(revision, **asdict(policy))
        if choice.base not in (None, base):
            raise ConfigError("the threshold in force is of another bundle's scores; set an alpha, or a new threshold")
        if choice.alpha is not None or choice.mode is not None:
            raise ConfigError("give alpha, or a threshold of the score, not both")
        if not math.isfinite(choice.threshold):
            raise ConfigError("a threshold is a number; give one that scores can exceed")
        if detector.calibration.crossed:
            raise ConfigError("this detector was calibrated crosswise, its p-values decide; give alpha instead")
        rate = float(detector.calibration.p_values([choice.threshold])[0])
        return cls(revision, rate, BY_THRESHOLD, choice.threshold, rate, None, None)

    def rank(self, detector: Detector) -> int:
        """k such that p <= k / (n + 1) is an outlier; see `anomaly_vae.drift.tolerated_rate`."""
        if self.mode == BY_THRESHOLD:
            return round(self.alpha * (detector.calibration.n + 1))
        return detector.calibration.rank(self.alpha, cast(Any, self.mode))

    def outliers(self, detector: Detector, scores: list[float], p_values: list[float]) -> list[bool]:
        """The verdicts of pictures with these scores and p-values."""
        if self.mode == BY_THRESHOLD:
            assert self.threshold is not None
            found = np.asarray(scores) > self.threshold
        else:
            found = detector.calibration.outliers(p_values, self.alpha, cast(Any, self.mode))
        return [bool(one) for one in found]

    def applied(self, row: dict[str, Any], detector: Detector) -> dict[str, Any]:
        """A verdict's row as this policy has it."""
        (outlier,) = self.outliers(detector, [row["score"]], [row["p_value"]])
        return {**row, "outlier": outlier, "alpha": self.alpha, "mode": self.mode, "threshold": self.threshold}

"""Does what a watch sees still look as calibration did? The two alarms of `drift` for one folder."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from anomaly_vae.detector import Detector
from anomaly_vae.drift import SCORE, RateAlarm, ShiftAlarm, latent_name, tolerated_rate
from anomaly_vae.judgement import Judgement

Kind = Literal["rate", "shift"]
_EXAMPLES = 5


class WatchAlarms:
    """Counts verdicts in their order. `base_rate`: the share of outliers that the folder is known to bring.

    Raises `ConfigError` where that is no share.
    """

    def __init__(self, detector: Detector, base_rate: float = 0.0) -> None:
        self._latents = () if detector.ranked_anew else detector.watched
        policy = detector.policy
        rank = detector.calibration.rank(policy.alpha, policy.mode)
        self.tolerated = tolerated_rate(detector.calibration, rank, base_rate)
        self._of = {"version": detector.version, "alpha": policy.alpha, "mode": policy.mode, "base_rate": base_rate}
        self.rate, self.shift = RateAlarm(self.tolerated.rate), ShiftAlarm(detector.reference())
        self._examples: dict[str, list[str]] = {"rate": [], "shift": []}

    def count(self, paths: Sequence[str], judged: Judgement) -> list[Kind]:
        """Take verdicts; the alarms that they raised."""
        raised: list[Kind] = []
        at = self.rate.update(judged.outlier)
        if at is not None or not self.rate.raised:
            seen = slice(None if at is None else at + 1)
            self._show("rate", [p for p, outlier in zip(paths[seen], judged.outlier[seen], strict=True) if outlier])
        if at is not None:
            raised.append("rate")
        was_raised = self.shift.raised is not None
        at = self.shift.update(self._values(judged))
        if not was_raised:
            self._show("shift", paths[: None if at is None else at + 1])
        if at is not None:
            raised.append("shift")
        return raised

    def _values(self, judged: Judgement) -> Mapping[str, Any]:
        values: dict[str, Any] = {SCORE: judged.score, **judged.parts}
        if judged.latents is not None:
            values |= {latent_name(k): judged.latents[:, i] for i, k in enumerate(self._latents)}
        return values

    def _show(self, kind: Kind, paths: Sequence[str]) -> None:
        self._examples[kind] = [*self._examples[kind], *paths][-_EXAMPLES:]

    def raised(self) -> Iterator[Kind]:
        """Those that are raised now."""
        if self.rate.raised:
            yield "rate"
        if self.shift.raised is not None:
            yield "shift"

    def message(self, kind: Kind) -> str:
        """What a raised alarm means, with paths of pictures that raised it."""
        if kind == "rate":
            of = f"{self.rate.recent_outliers:,} of the last {self.rate.recent_images:,} pictures are outliers"
            what = f"ALARM (rate): {of}, about {self.tolerated.expected:.2%} were to be expected"
            advice = "look for a new kind of defect"
        else:
            shift = self.shift.raised
            assert shift is not None
            where = "the score" if shift.part == SCORE else f"{shift.part}"
            way = f"{where} of most of the last {shift.images} is {'higher' if shift.effect > 0 else 'lower'}"
            what = f"ALARM (shift): the pictures are no longer as in training, {way} (effect {abs(shift.effect):.2f})"
            advice = "look at camera, light, format and scale; until then verdicts do not keep their rate"
        return f"{what}; {advice}; examples: {', '.join(self._examples[kind])}"

    def packed(self) -> dict[str, Any]:
        """Its state as plain values."""
        shift = self.shift.packed()
        shift["sums"] = np.asarray(shift["sums"]).tolist()
        return {"of": self._of, "rate": self.rate.packed(), "shift": shift, "examples": self._examples}

    def go_on(self, packed: Mapping[str, Any] | None) -> bool:
        """Take over the state of an earlier watch; False where that was of another bundle, policy or base rate."""
        if packed is None or packed["of"] != self._of:
            return packed is None
        self.rate = RateAlarm.unpacked(packed["rate"])
        self.shift = ShiftAlarm.unpacked(self.shift.reference, packed["shift"])
        self._examples = {kind: list(paths) for kind, paths in packed["examples"].items()}
        return True

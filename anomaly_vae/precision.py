"""A detector that scores in bfloat16, where its own probe images show that its verdicts bear it.

Calibration ranked float32 scores, so a bfloat16 score of a normal picture must not pass for a more unusual one. Scores
within `TIE_LOW` of one another therefore tie, always to the picture's favour: as long as bfloat16 moves a picture's
score by less than that, its p-value is at least what float32 would have given, and verdicts raise no more false alarms.
How far it moves scores is measured at every load, on the bundle's probes; where one moves by more than `MOST_MOVED`,
or there are none, bfloat16 is refused.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from anomaly_vae.calibration import quartile_range
from anomaly_vae.compiled import Scoring
from anomaly_vae.detector import Detector
from anomaly_vae.errors import ConfigError
from anomaly_vae.images import masked
from anomaly_vae.lowering import has_bfloat16, lowered
from anomaly_vae.member import Batch, Member, Native

PRECISIONS = ("float32", "bfloat16", "auto")

MOST_MOVED = 0.02
"""How far a probe's score may move, in quartile ranges of the calibration scores."""
TIE_LOW = 0.05
"""Scores closer than this tie, in the same unit: more than `MOST_MOVED`, since probes are but a sample of pictures."""
_PROBES = 8
"""Fewer probes tell too little."""


def at_precision(detector: Detector, precision: str) -> tuple[Detector, str | None]:
    """The detector as `precision` wants it, and why it stays in float32 all the same, if `auto` could not have it."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is none; use {', '.join(PRECISIONS)}")
    if precision == "float32":
        return detector, None
    try:
        return in_bfloat16(detector), None
    except ConfigError as error:
        if precision == "bfloat16":
            raise
        return detector, str(error)


def in_bfloat16(detector: Detector) -> Detector:
    """The same detector with scores in bfloat16; raises `ConfigError` where these cannot be had, or not be trusted."""
    if not has_bfloat16(detector.device):
        raise _refused("this device does not compute it")
    if detector.wants_classes:
        raise _refused("a detector that must be told classes computes in float32 only")
    if detector.probes is None or len(detector.probes.images) < _PROBES:
        raise _refused(f"the bundle keeps fewer than {_PROBES} probe images to measure by; train it with probes: 32")
    members = [_low(member, () if i else detector.watched) for i, member in enumerate(detector.members)]
    if members[0].native is None:
        raise _refused("its networks have no inner convolutions, which are all that would gain by it")
    moved = max(_moved(detector, i, member) for i, member in enumerate(members))
    if not moved <= MOST_MOVED:
        raise _refused(f"it moves the scores of probe images by {moved:.2g} quartile ranges, {MOST_MOVED:g} allowed")
    return detector.scored_by(members, TIE_LOW)


def _refused(reason: str) -> ConfigError:
    return ConfigError(f"precision bfloat16: {reason}; set precision=float32, or auto to have it where it can be")


def _low(member: Member, latents: Sequence[int]) -> Member:
    experts = [expert for of_kind in member.experts.values() for expert in of_kind]
    models = [lowered(expert.model) for expert in experts]
    if not any(models):
        return replace(member, native=None)
    pairs = zip(experts, models, strict=True)
    low = [expert if model is None else replace(expert, model=model) for expert, model in pairs]
    return replace(member, native=Native(Scoring(low, latents).eval(), exact=False))


def _moved(detector: Detector, i: int, member: Member) -> float:
    """How far the i-th member's scores of the probes move when `member` tells them, in its own quartile ranges."""
    assert detector.probes is not None
    batch = Batch(masked(detector.probes.images, detector.image))
    with torch.inference_mode():
        before, after = (one.judge(detector.spec, batch).score for one in (detector.members[i], member))
    return float(np.abs(after - before).max()) / max(quartile_range(detector.calibration.scores[i]), 1e-12)

"""Streams drawn from distributions whose answers are known, for `drift.py`: the calibration is redrawn for each."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from anomaly_vae.calibration import Calibration, Mode, rank_allowed
from anomaly_vae.drift import RateAlarm, Reference, ShiftAlarm, tolerated_rate

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]


def first_alarm(tolerated: float, rates: Sequence[tuple[int, float]], random: np.random.Generator) -> int | None:
    """The picture that raises the rate alarm in a stream of so many pictures at each rate, from the last change on."""
    alarm = RateAlarm(tolerated)
    for i, (images, rate) in enumerate(rates):
        for start in range(0, images, 2000):
            at = alarm.update(random.random(min(2000, images - start)) < rate)
            if at is not None:
                return start + at + 1 if i == len(rates) - 1 else 0
    return None


def false_alarms(n: int, alpha: float, mode: Mode, images: int, runs: int) -> Row:
    """Streams of normals: given split calibration their rate follows Beta(k, n+1-k), whatever the scores."""
    random, k = np.random.default_rng(n), rank_allowed(n, alpha, mode)
    calibration = Calibration.of([np.arange(n)])
    tolerated = tolerated_rate(calibration, k).rate
    rates = random.beta(k, n + 1 - k, runs)
    raised = [first_alarm(tolerated, [(images, rate)], random) is not None for rate in rates]
    naive = [first_alarm(k / (n + 1), [(images, rate)], random) is not None for rate in rates]
    return {"what": f"n = {n:,}, {mode}", "alpha": alpha, "tolerated": tolerated, "images": images, "runs": runs,
            "raised": sum(raised), "naive": sum(naive)}  # fmt: skip


def dependent(what: str, draw: Callable[[np.random.Generator], tuple[Calibration, Floats]], alpha: float,
              images: int, runs: int) -> Row:  # fmt: skip
    """Where calibration is grouped or K-fold: `draw` gives one, and the scores of many new normals."""
    random, raised, naive, tolerated = np.random.default_rng(7), 0, 0, 0.0
    for _ in range(runs):
        calibration, scores = draw(random)
        k = calibration.rank(alpha)
        rate = float(calibration.outliers(calibration.p_values(scores), alpha).mean())
        tolerated = tolerated_rate(calibration, k).rate
        raised += first_alarm(tolerated, [(images, rate)], random) is not None
        naive += first_alarm(k / (calibration.n + 1), [(images, rate)], random) is not None
    return {"what": what, "alpha": alpha, "tolerated": tolerated, "images": images, "runs": runs, "raised": raised,
            "naive": naive}  # fmt: skip


def folds(correlation: float) -> Callable[[np.random.Generator], tuple[Calibration, Floats]]:
    """100 normals, five folds whose models' scores correlate so much."""

    def draw(random: np.random.Generator) -> tuple[Calibration, Floats]:
        new = np.sqrt(correlation) * random.normal(size=(5000, 1))
        new = new + np.sqrt(1 - correlation) * random.normal(size=(5000, 5))
        return Calibration.of([random.normal(size=20) for _ in range(5)]), new

    return draw


def grouped(within: float) -> Callable[[np.random.Generator], tuple[Calibration, Floats]]:
    """20 groups of ten normals, whose scores correlate so much within a group; new normals are of new groups."""

    def draw(random: np.random.Generator) -> tuple[Calibration, Floats]:
        known = np.sqrt(within) * random.normal(size=(20, 1)) + np.sqrt(1 - within) * random.normal(size=(20, 10))
        return Calibration.of([known.ravel()], groups=20), random.normal(size=20_000)

    return draw


def delays(n: int, alpha: float, rise: float, quiet: int, runs: int) -> Row:
    """From the rise of the rate, after so many quiet pictures, to the alarm; the rate before is a redrawn one."""
    random, k, most = np.random.default_rng(3), rank_allowed(n, alpha, "average"), 20_000
    tolerated = tolerated_rate(Calibration.of([np.arange(n)]), k).rate
    found = []
    for rate in random.beta(k, n + 1 - k, runs):
        changed = (most, min(0.95, rise * k / (n + 1)))
        found.append(first_alarm(tolerated, [(quiet, rate), changed] if quiet else [changed], random))
    return {"n": n, "alpha": alpha, "rise": rise, "quiet": quiet, "tolerated": tolerated, "runs": runs, **spread(found)}


def false_shifts(n: int, images: int, runs: int, names: int = 24) -> Row:
    """Streams of normals, `names` independent values each."""
    random, raised, largest = np.random.default_rng(n), 0, []
    for _ in range(runs):
        alarm = ShiftAlarm(Reference({str(i): random.random(n) for i in range(names)}))
        alarm.update({str(i): random.random(images) for i in range(names)})
        raised += alarm.raised is not None
        largest.append(max(abs(one.effect) for one in alarm.shifts()))
    return {"n": n, "images": images, "runs": runs, "names": names, "raised": raised, "largest": max(largest)}


def spread(found: Sequence[int | None]) -> Row:
    """How many raised the alarm, and after how many pictures: median, and the range of the central 80%."""
    known = [one for one in found if one is not None]
    low, middle, high = np.quantile(known, [0.1, 0.5, 0.9]).tolist() if known else (None, None, None)
    return {"found": len(known), "median": middle, "low": low, "high": high}


def simulate(runs: int) -> Row:
    """All of it; some minutes for 200 runs."""
    settings: list[tuple[int, float, Mode, int]] = [
        (99, 0.01, "average", 20_000), (200, 0.05, "average", 5000), (400, 0.01, "average", 20_000),
        (400, 0.01, "guaranteed", 20_000), (2000, 0.01, "average", 20_000), (2000, 0.05, "average", 5000),
        (5000, 0.001, "average", 100_000),
    ]  # fmt: skip
    rows = [false_alarms(n, alpha, mode, images, runs) for n, alpha, mode, images in settings]
    for correlation in (0.5, 0.9, 1.0):
        what = f"K-fold, 5 x 20, models correlate {correlation:g}"
        rows.append(dependent(what, folds(correlation), 0.05, 5000, runs // 2))
    for within in (0.2, 0.5, 0.9):
        what = f"20 groups of 10, correlating {within:g}"
        rows.append(dependent(what, grouped(within), 0.05, 5000, runs // 2))
    rises = [
        delays(n, alpha, rise, quiet, max(20, runs // 10))
        for n, alpha in ((200, 0.05), (2000, 0.01))
        for quiet in (0, 5000)
        for rise in (2, 5, 20)
    ]
    shifts = [false_shifts(n, 10_000, max(10, runs // 5)) for n in (60, 200, 1000)]
    return {"false_alarms": rows, "delays": rises, "false_shifts": shifts}

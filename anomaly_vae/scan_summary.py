"""What a scan found, counted as its rows go by: in memory that does not grow with them."""

import heapq
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from anomaly_vae.calibration import fdr_cut
from anomaly_vae.detector import Detector
from anomaly_vae.drift import SCORE, Moves, Shift
from anomaly_vae.scan_rows import part_name

MOST_SHOWN = 100
_SAMPLE = 20_000


@dataclass(order=True)
class Odd:
    """An unusual picture; the lowest score first, and of equal ones that which came last."""

    score: float
    place: int
    path: str = field(compare=False)
    p_value: float = field(compare=False)


@dataclass
class Counts:
    """Counts of a scan so far. `expected`: false alarms if every readable picture were normal."""

    images: int = 0
    outliers: int = 0
    errors: int = 0
    expected: float = 0.0

    @property
    def rate(self) -> float:
        """The share of outliers among the pictures that could be read."""
        return self.outliers / max(self.images, 1)

    def add(self, table: pa.Table, expected_rate: float) -> None:
        """Count rows."""
        errors = len(table) - table["error"].null_count
        self.images += len(table) - errors
        self.errors += errors
        self.outliers += int(np.count_nonzero(table["outlier"].drop_null().to_numpy()))
        self.expected = self.images * expected_rate


class Summary:
    """Of all rows of a scan. `fdr`: the verdict is that of Benjamini and Hochberg, known when all has been seen."""

    def __init__(self, detector: Detector, fdr: float | None = None) -> None:
        self.counts = Counts()
        self.p_values: Counter[float] = Counter()
        self.errors: list[tuple[str, str]] = []
        self._detector, self._fdr, self._seen = detector, fdr, 0
        self._moves = Moves(detector.reference(latents=False))
        self._odd: list[Odd] = []
        self._scores = array("d")
        self._digests = array("Q")
        self._largest_odd_p: float | None = None

    def add(self, table: pa.Table) -> None:
        """Take rows, in their order."""
        self.counts.add(table, self._detector.policy.expected_false_alarm_rate)
        good = table.filter(table["error"].is_null())
        self._add_good(good)
        for row in table.filter(table["error"].is_valid()).select(["path", "error"]).slice(0, MOST_SHOWN).to_pylist():
            if len(self.errors) < MOST_SHOWN:
                self.errors.append((row["path"], row["error"]))

    def _add_good(self, good: pa.Table) -> None:
        scores = good["score"].to_numpy()
        self.p_values.update(good["p_value"].to_pylist())
        odd = good.filter(good["outlier"])["p_value"].to_pylist()
        if odd:
            self._largest_odd_p = max(self._largest_odd_p or 0.0, *odd)
        parts = {part: good[part_name(part)].to_numpy() for part in self._detector.spec.parts}
        self._moves.update({SCORE: scores, **parts})
        digests = [int(digest[:16], 16) for digest in good["sha256"].drop_null().to_pylist()]
        self._digests.extend(digests)
        for i in np.argsort(-scores, kind="stable")[:MOST_SHOWN].tolist():
            one = Odd(float(scores[i]), -(self._seen + i), good["path"][i].as_py(), good["p_value"][i].as_py())
            (heapq.heappush if len(self._odd) < MOST_SHOWN else heapq.heappushpop)(self._odd, one)
        room = _SAMPLE - len(self._scores)
        self._scores.extend(scores[:room].tolist())
        self._seen += len(good)

    @property
    def cut(self) -> float | None:
        """The largest p-value of an outlier by the false-discovery rate; None where nothing is one."""
        return None if self._fdr is None else fdr_cut(self.p_values, self._fdr)

    def judged_anew(self, table: pa.Table) -> pa.Table:
        """Rows with the verdict that holds for the whole scan."""
        if self._fdr is None:
            return table
        cut = self.cut
        verdict = pa.array(
            [None if p is None else cut is not None and p <= cut for p in table["p_value"].to_pylist()], pa.bool_()
        )
        return table.set_column(table.schema.get_field_index("outlier"), "outlier", verdict)

    @property
    def outliers(self) -> int:
        """How many there are, by the verdict that holds."""
        if self._fdr is None:
            return self.counts.outliers
        cut = self.cut
        return 0 if cut is None else sum(count for p, count in self.p_values.items() if p <= cut)

    @property
    def by_fdr(self) -> bool:
        """Whether a false-discovery rate decides."""
        return self._fdr is not None

    @property
    def largest_odd_p(self) -> float | None:
        """The largest p-value of this scan's outliers; None where there is none."""
        if self._fdr is not None:
            return self.cut
        return self._largest_odd_p

    @property
    def shift(self) -> Shift | None:
        """The move of most pictures away from calibration; None where there is none to speak of."""
        return self._moves.largest()

    @property
    def oddest(self) -> list[Odd]:
        """The most unusual pictures, the highest score first."""
        return sorted(self._odd, reverse=True)

    @property
    def scores(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Scores of the first pictures, for a histogram."""
        return np.asarray(self._scores, np.float64)

    def repeated(self) -> Mapping[int, int]:
        """The first 64 bits of contents that came more than once -> how often; the most frequent first."""
        values, counts = np.unique(np.asarray(self._digests, np.uint64), return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {int(values[i]): int(counts[i]) for i in order if counts[i] > 1}

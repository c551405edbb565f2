"""`GET /v1/models/NAME/calibration`: how the scores of the last verdicts lie among those that calibrate a model."""

import numpy as np
import numpy.typing as npt
from flask import Response

from anomaly_vae.answers import ScoreCounts
from service.asked import ScoreCountsWanted
from service.bodies import answer, query_of
from service.keys import Role
from service.models import Models
from service.routes import Route
from service.served import Served
from service.store import Store

Floats = npt.NDArray[np.float64]
_BINS = 30


class CalibrationPages:
    """One route; without a `store` it knows of no verdicts."""

    def __init__(self, models: Models, store: Store | None) -> None:
        self._models, self._store = models, store

    def routes(self) -> list[Route]:
        """That one."""
        return [
            Route("GET", "/v1/models/<model>/calibration", Role.READ, self.calibration,
                  "Scores of its calibration and of the last verdicts, counted", ScoreCounts, ScoreCountsWanted,
                  codes=("unknown_model", "store_down")),
        ]  # fmt: skip

    def calibration(self, model: str) -> Response:
        asked, served = query_of(ScoreCountsWanted), self._models.pick(model)
        normals = np.concatenate(served.detector.calibration.scores)
        recent = self._recent(served, asked.last)
        edges = _edges(normals, served.policy.threshold)
        return answer(
            {
                "version": served.version,
                "edges": edges.tolist(),
                "calibration": _counted(normals, edges),
                "recent": _counted(recent, edges),
                "threshold": served.policy.threshold,
            }
        )

    def _recent(self, served: Served, last: int) -> Floats:
        """Scores of the last verdicts, as far as versions gave them whose scores are the present one's."""
        if self._store is None:
            return np.empty(0)
        book = self._models.decisions.calibrations(served.name, served.base)
        versions = {served.base, *(decided.choice.version for decided in book)}
        rows = self._store.ranks(served.name, last)
        return np.asarray([score for version, score, _ in rows if version in versions], np.float64)


def _edges(normals: Floats, threshold: float | None) -> Floats:
    """Equal bins from the smallest normal score to well beyond the largest, and beyond the threshold."""
    low, high = float(normals.min()), max(float(normals.max()), normals.max() if threshold is None else threshold)
    spread = max(high - float(np.median(normals)), 1e-9 * max(1.0, abs(high)))
    return np.linspace(low, high + spread, _BINS + 1)


def _counted(scores: Floats, edges: Floats) -> list[int]:
    counts, _ = np.histogram(scores.clip(edges[0], edges[-1]), edges)
    return [int(count) for count in counts]

"""What operators decided of a model: its policy, its calibration, which bundle it is. The last decision counts.

Each is a numbered revision that is never changed, so that going back is one more decision.
"""

import time
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, RowMapping, Table, false, func, insert, select

from anomaly_vae import ConfigError
from service.auditing import note
from service.database import Database
from service.schema import ACTIVATIONS, CALIBRATIONS, POLICIES

ACTIONS = ("policy", "activate", "recalibrate")
"""As the log of changes calls them."""

Floats = npt.NDArray[np.float64]
_D = TypeVar("_D")


@dataclass(frozen=True)
class PolicyChoice:
    """`alpha` and `mode`, or a `threshold` of the score instead; all None: the bundle's own.

    `base` is the version of the bundle that a threshold's scores are of: another's mean something else.
    """

    alpha: float | None = None
    mode: str | None = None
    threshold: float | None = None
    base: str | None = None


@dataclass(frozen=True)
class Activation:
    """The bundle (a folder's name) that a model is, and that bundle's version."""

    bundle: str
    version: str


@dataclass(frozen=True)
class Recalibration:
    """Scores that calibrate the bundle of version `base` instead of its own; `version`: of the two together.

    `scores` None: the bundle's own calibration again.
    """

    base: str
    version: str
    scores: Floats | None


@dataclass(frozen=True)
class Decided(Generic[_D]):
    """A decision: which, by whom, when (seconds since 1970)."""

    revision: int
    by: str
    at: float
    choice: _D


class Decisions:
    """The three books of decisions."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def policies(self, model: str) -> list[Decided[PolicyChoice]]:
        """The newest first."""
        return [
            _decided(row, PolicyChoice(row["alpha"], row["mode"], row["threshold"], row["base"]))
            for row in self._rows(POLICIES, model)
        ]

    def activations(self, model: str) -> list[Decided[Activation]]:
        """The newest first."""
        return [_decided(row, Activation(row["bundle"], row["version"])) for row in self._rows(ACTIVATIONS, model)]

    def calibrations(self, model: str, base: str) -> list[Decided[Recalibration]]:
        """Those of the bundle of version `base`, the newest first; it alone comes with its scores."""
        c = CALIBRATIONS.c
        query = select(c.revision, c.by, c.at, c.version).where(c.model == model, c.base == base)
        with self._database.reading() as connection:
            book = connection.execute(query.order_by(c.revision.desc())).mappings().all()
            ours = (c.model == model, c.revision == book[0]["revision"]) if book else (false(),)
            scores = _floats(connection.scalar(select(c.scores).where(*ours)))
        return [
            _decided(row, Recalibration(base, row["version"], None if place else scores))
            for place, row in enumerate(book)
        ]

    def models(self) -> list[str]:
        """Names of all models that were ever activated."""
        with self._database.reading() as connection:
            return list(connection.scalars(select(ACTIVATIONS.c.model).distinct().order_by(ACTIVATIONS.c.model)))

    def set_policy(self, model: str, choice: PolicyChoice, by: str, before: Any, after: Any) -> int:
        """The new revision's number; `before` and `after` are for the log."""
        row = {"alpha": choice.alpha, "mode": choice.mode, "threshold": choice.threshold, "base": choice.base}
        return self._decide(POLICIES, model, row, by, "policy", before, after)

    def activate(self, model: str, choice: Activation, by: str, before: Any, after: Any) -> int:
        """As `set_policy`."""
        row = {"bundle": choice.bundle, "version": choice.version}
        return self._decide(ACTIVATIONS, model, row, by, "activate", before, after)

    def recalibrate(self, model: str, choice: Recalibration, by: str, before: Any, after: Any) -> int:
        """As `set_policy`."""
        scores = None if choice.scores is None else np.asarray(choice.scores, "<f8").tobytes()
        row = {"base": choice.base, "version": choice.version, "scores": scores}
        return self._decide(CALIBRATIONS, model, row, by, "recalibrate", before, after)

    def _rows(self, table: Table, model: str) -> list[RowMapping]:
        query = select(table).where(table.c.model == model).order_by(table.c.revision.desc())
        with self._database.reading() as connection:
            return list(connection.execute(query).mappings())

    def _decide(
        self, table: Table, model: str, row: dict[str, Any], by: str, action: str, before: Any, after: Any
    ) -> int:
        with self._database.writing() as connection:
            revision = _last(connection, table, model) + 1
            connection.execute(
                insert(table), {"model": model, "revision": revision, "by": by, "at": time.time(), **row}
            )
            note(connection, by, action, model, before, after)
        return revision


def _last(connection: Connection, table: Table, model: str) -> int:
    return connection.scalar(select(func.max(table.c.revision)).where(table.c.model == model)) or 0


def _decided(row: RowMapping, choice: _D) -> Decided[_D]:
    return Decided(row["revision"], row["by"], row["at"], choice)


def _floats(data: bytes | None) -> Floats | None:
    if data is None:
        return None
    if len(data) % 8:
        raise ConfigError("the store's calibration is damaged; restore the store from a backup")
    return np.frombuffer(data, "<f8").astype(np.float64)

"""What operators decided of a model: its policy, its calibration, which bundle it is. The last decision counts.

Each is a numbered revision that is never changed, so that going back is one more decision.
"""

import json
import time
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, RowMapping, Table, false, func, insert, select

from anomaly_vae import ConfigError
from service.alarms import begin_anew
from service.auditing import note, since
from service.database import Database
from service.schema import ACTIVATIONS, CALIBRATIONS, POLICIES

ACTIONS = ("policy", "activate", "recalibrate", "retire")
"""As the log of changes calls them."""

Floats = npt.NDArray[np.float64]
Hashes = npt.NDArray[np.uint64]
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
    """The bundle (a folder's name) that a model is, and that bundle's version; neither where it is none any more."""

    bundle: str
    version: str

    @property
    def retired(self) -> bool:
        """Whether the model is served no more."""
        return not self.version


@dataclass(frozen=True, eq=False)
class Sample:
    """Scores of normal pictures, hashes (uint64) of their files as far as they are known, and whether somebody said
    that no two of the pictures belong together."""

    scores: Floats
    seen: Hashes
    independent: bool = False


@dataclass(frozen=True)
class Recalibration:
    """A sample that calibrates the bundle of version `base` instead of its own; `version`: of the two together.

    `sample` None: the bundle's own calibration again.
    """

    base: str
    version: str
    sample: Sample | None


@dataclass(frozen=True)
class Decided(Generic[_D]):
    """A decision: which, by whom, when (seconds since 1970)."""

    revision: int
    by: str
    at: float
    choice: _D


class Decisions:
    """The three books of decisions. Each one begins the model's alarms anew."""

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
            newest = connection.execute(select(c.scores, c.seen, c.independent).where(*ours)).mappings().first()
        sample = _sample(newest) if newest else None
        return [
            _decided(row, Recalibration(base, row["version"], sample if place == 0 else None))
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

    def retire(self, model: str, version: str | None, by: str, loaded: list[str]) -> int:
        """A version that is not active or (None) a model is gone; `loaded`: the versions that there were."""
        if version is None and self.activations(model):
            return self._decide(ACTIVATIONS, model, {"bundle": "", "version": ""}, by, "retire", loaded, None)
        with self._database.writing() as connection:
            note(connection, by, "retire", model, loaded, [one for one in loaded if version not in (None, one)])
        return 0

    def retirements(self, number: int) -> list[tuple[str, list[str], float]]:
        """Of idle versions, noted after that number of the log: of which model, which versions, and when."""
        rows = since(self._database, "retire", number)
        told = ((row, json.loads(row["before"]), json.loads(row["after"]) or []) for row in rows)
        return [(row["subject"], [one for one in before if one not in after], row["at"]) for row, before, after in told]

    def recalibrate(self, model: str, choice: Recalibration, by: str, before: Any, after: Any) -> int:
        """As `set_policy`."""
        row: dict[str, Any] = {"base": choice.base, "version": choice.version}
        if choice.sample is not None:
            sample = choice.sample
            row |= {"scores": sample.scores.astype("<f8").tobytes(), "seen": sample.seen.astype("<u8").tobytes()}
            row["independent"] = sample.independent
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
            begin_anew(connection, model)
            note(connection, by, action, model, before, after)
        return revision


def _last(connection: Connection, table: Table, model: str) -> int:
    return connection.scalar(select(func.max(table.c.revision)).where(table.c.model == model)) or 0


def _decided(row: RowMapping, choice: _D) -> Decided[_D]:
    return Decided(row["revision"], row["by"], row["at"], choice)


def _sample(row: RowMapping) -> Sample | None:
    scores, seen = row["scores"], row["seen"] or b""
    if scores is None:
        return None
    if len(scores) % 8 or len(seen) % 8:
        raise ConfigError("the store's calibration is damaged; restore the store from a backup")
    numbers, hashes = np.frombuffer(scores, "<f8"), np.frombuffer(seen, "<u8")
    return Sample(numbers.astype(np.float64), hashes.astype(np.uint64), bool(row["independent"]))

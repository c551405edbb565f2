"""Does each source's stream still look as calibration did? One state for each (model, version, source), in the store.

States are brought up to date in the very transaction that keeps verdicts: each kept verdict counts once, whichever
process kept it, a restart loses nothing, and requests never wait for it. Any change of model, policy or calibration
begins them anew.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sqlalchemy import Connection, RowMapping, delete, insert, select, text, update
from sqlalchemy.exc import SQLAlchemyError

from anomaly_vae.drift import SCORE, RateAlarm, Reference, ShiftAlarm, Tolerated, latent_name
from service import ids
from service.auditing import note
from service.database import Database
from service.schema import ALARMS
from service.store import Record

_log = logging.getLogger(__name__)

Kind = Literal["rate", "shift"]
KINDS: tuple[Kind, ...] = ("rate", "shift")
_EXAMPLES = 10
_MOST_POLICIES = 4
"""Of each model, the present policy and those by which verdicts on their way were judged."""
_KEY = ("model", "version", "source")
_LIGHT = [column for column in ALARMS.c if column.name != "sums"]


@dataclass(frozen=True)
class Watch:
    """What a version under a policy is held against. `of_source`: the tolerated rates of sources that declare a base
    rate, `of_others` that of all others; `latents`: those that its verdicts bring along."""

    reference: Reference
    latents: tuple[int, ...]
    of_others: Tolerated
    of_source: Mapping[str, Tolerated]

    def tolerated(self, source: str) -> Tolerated:
        """Of a source."""
        return self.of_source.get(source, self.of_others)

    def values(self, records: Sequence[Record]) -> dict[str, Any]:
        """What the records say of each name of the reference."""
        found: dict[str, Any] = {SCORE: [record.score for record in records]}
        found |= {latent_name(k): [record.latents[i] for record in records] for i, k in enumerate(self.latents)}
        names = [name for name in self.reference.names if name not in found]
        return found | {name: np.array([record.parts.get(name) for record in records], float) for name in names}


class State:
    """Both alarms of one source and what is known of when and by which verdicts they were raised."""

    def __init__(self, watch: Watch, tolerated: Tolerated, policy: int, begun: float) -> None:
        self.watch, self.policy, self.begun, self.tolerated = watch, policy, begun, tolerated
        self.rate, self.shift = RateAlarm(tolerated.rate), ShiftAlarm(watch.reference)
        self.raised: dict[str, float | None] = {"rate": None, "shift": None}
        self.examples: dict[str, list[str]] = {"rate": [], "shift": []}

    def count(self, records: Sequence[Record]) -> None:
        """Verdicts in the order in which they were given."""
        at = self.rate.update([record.outlier for record in records])
        if self.raised["rate"] is None:
            outliers = [record for record in records[: None if at is None else at + 1] if record.outlier]
            self._note("rate", outliers, None if at is None else records[at])
        wanted = len(self.watch.latents)
        whole = [record for record in records if not wanted or len(record.latents) == wanted]
        at = self.shift.update(self.watch.values(whole)) if whole else None
        if self.raised["shift"] is None:
            self._note("shift", whole[: None if at is None else at + 1], None if at is None else whole[at])

    def _note(self, kind: Kind, seen: Sequence[Record], raised_by: Record | None) -> None:
        self.examples[kind] = [*self.examples[kind], *(ids.shown(one.id) for one in seen[-_EXAMPLES:])][-_EXAMPLES:]
        if raised_by is not None:
            self.raised[kind] = ids.seconds_of(raised_by.id)

    def begin_anew(self, kind: Kind, now: float) -> None:
        """Forget what one of the alarms has seen."""
        if kind == "rate":
            self.rate, self.begun = RateAlarm(self.tolerated.rate), now
        else:
            self.shift = ShiftAlarm(self.watch.reference)
        self.raised[kind], self.examples[kind] = None, []

    def columns(self) -> dict[str, Any]:
        """As a row of the table, without its key."""
        packed = self.shift.packed()
        sums = np.asarray(packed.pop("sums"), "<i4").tobytes()
        shifts = [vars(one) for one in self.shift.shifts()]
        described = {"expected": self.tolerated.expected, "promised": self.tolerated.promised}
        return {
            "policy": self.policy,
            "begun": self.begun,
            "rate_raised": self.raised["rate"],
            "shift_raised": self.raised["shift"],
            "rate": json.dumps({**self.rate.packed(), **described}),
            "shift": json.dumps({**packed, "shifts": shifts}),
            "examples": json.dumps(self.examples),
            "sums": sums,
        }

    @classmethod
    def read(cls, row: RowMapping, watch: Watch) -> "State":
        """From such a row."""
        rate, shift = json.loads(row["rate"]), json.loads(row["shift"])
        found = cls(
            watch, Tolerated(rate["tolerated"], rate["expected"], rate["promised"]), row["policy"], row["begun"]
        )
        found.rate = RateAlarm.unpacked(rate)
        found.shift = ShiftAlarm.unpacked(watch.reference, {**shift, "sums": np.frombuffer(row["sums"], "<i4")})
        found.raised = {kind: row[f"{kind}_raised"] for kind in KINDS}
        found.examples = json.loads(row["examples"])
        return found


class UnknownAlarm(Exception):
    """There is no such alarm, or no longer."""


class NotRaised(Exception):
    """An alarm that was not raised needs no acknowledgement."""


class Alarms:
    """The states of all sources."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._watches: dict[tuple[str, str, int], Watch] = {}
        self._active: dict[str, str] = {}

    def in_force(self, model: str, version: str, policy: int, watch: Watch) -> None:
        """From now on verdicts of this version, judged by this revision of its policy, are held against `watch`."""
        self._active[model] = version
        others = {key: one for key, one in self._watches.items() if key != (model, version, policy)}
        ours = [key for key in others if key[0] == model]
        for key in ours[: max(0, len(ours) - _MOST_POLICIES + 1)]:
            del others[key]
        # Replaced as a whole: another thread is counting.
        self._watches = {**others, (model, version, policy): watch}

    def count(self, connection: Connection, records: Sequence[Record]) -> None:
        """Count verdicts in the transaction that keeps them. What goes wrong here must not keep them from it."""
        try:
            changed = dict(self._counted(connection, records))
        except (SQLAlchemyError, OSError):
            raise
        except Exception:  # whatever it is, the verdicts matter more
            _log.exception("the alarms did not count a batch of verdicts")
            return
        for key, columns in changed.items():
            _put(connection, dict(zip(_KEY, key, strict=True)), columns)

    def _counted(
        self, connection: Connection, records: Sequence[Record]
    ) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
        groups: dict[tuple[str, ...], list[Record]] = {}
        for record in records:
            groups.setdefault((record.model, record.version, record.source), []).append(record)
        lock(connection)
        for key in sorted(groups):
            row = connection.execute(select(ALARMS).where(_of(key))).mappings().one_or_none()
            state = self._read(row)
            known = -1 if row is None else row["policy"]
            for record_policy, part in _by_policy(groups[key]):
                watch = self._watches.get((key[0], key[1], record_policy))
                # What another process still judged by an older policy says nothing of the present one.
                if watch is None or record_policy < known:
                    continue
                tolerated = watch.tolerated(key[2])
                if state is None or state.policy != record_policy or state.tolerated != tolerated:
                    state = State(watch, tolerated, record_policy, ids.seconds_of(part[0].id))
                known = record_policy
                state.count(part)
            if state is not None:
                yield key, state.columns()

    def _read(self, row: RowMapping | None) -> State | None:
        """A state, where it is of a version and policy that this process knows."""
        watch = None if row is None else self._watches.get((row["model"], row["version"], row["policy"]))
        if row is None or watch is None:
            return None
        try:
            return State.read(row, watch)
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("the alarms of %s begin anew, what is kept of them cannot be read: %s", row["source"], error)
            return None

    def rows(self) -> list[RowMapping]:
        """The states of what is active now, by model and source."""
        with self._database.reading() as connection:
            found = connection.execute(select(*_LIGHT).order_by(ALARMS.c.model, ALARMS.c.source)).mappings().all()
        return [row for row in found if self._active.get(row["model"]) == row["version"]]

    def acknowledge(self, name: str, by: str) -> tuple[RowMapping, Kind]:
        """Begin one alarm anew, and write down who did; the state afterwards. Raises `UnknownAlarm`, `NotRaised`."""
        with self._database.writing() as connection:
            lock(connection)
            found = connection.execute(select(ALARMS)).mappings().all()
            named = {name_of(row, kind): (row, kind) for row in found for kind in KINDS}
            if name not in named or (state := self._read(named[name][0])) is None:
                raise UnknownAlarm
            row, kind = named[name]
            if row[f"{kind}_raised"] is None:
                raise NotRaised
            before = {**{key: row[key] for key in _KEY}, "kind": kind, "raised": row[f"{kind}_raised"]}
            before |= (
                {"evidence": state.rate.evidence} if kind == "rate" else {"shift": json.loads(row["shift"])["raised"]}
            )
            state.begin_anew(kind, time.time())
            own = _of([row[key] for key in _KEY])
            connection.execute(update(ALARMS).where(own).values(**state.columns()))
            note(connection, by, "acknowledge", name, before, None)
            return connection.execute(select(*_LIGHT).where(own)).mappings().one(), kind


def name_of(row: RowMapping, kind: Kind) -> str:
    """An alarm's id: always the same for a kind, model, version and source."""
    return hashlib.sha256("\n".join([kind, *(row[key] for key in _KEY)]).encode()).hexdigest()[:16]


def lock(connection: Connection) -> None:
    """Whoever changes states does so alone; SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(4722091)"))


def begin_anew(connection: Connection, model: str) -> None:
    """Forget all states of a model, in the transaction that changes it."""
    lock(connection)
    connection.execute(delete(ALARMS).where(ALARMS.c.model == model))


def _of(key: Sequence[str]) -> Any:
    model, version, source = key
    return (ALARMS.c.model == model) & (ALARMS.c.version == version) & (ALARMS.c.source == source)


def _put(connection: Connection, key: dict[str, str], columns: dict[str, Any]) -> None:
    if not connection.execute(update(ALARMS).where(_of(list(key.values()))).values(**columns)).rowcount:
        connection.execute(insert(ALARMS), {**key, **columns})


def _by_policy(records: Sequence[Record]) -> list[tuple[int, list[Record]]]:
    """In ascending order of policies, each with its records in the order in which they were given."""
    found: dict[int, list[Record]] = {}
    for record in sorted(records, key=lambda one: one.id):
        found.setdefault(record.policy, []).append(record)
    return sorted(found.items())

"""`Store`: verdicts, what is kept of their pictures, and counts by the minute, on disk or in PostgreSQL."""

import json
import math
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, Table, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from anomaly_vae import ConfigError
from service import ids
from service.database import Database, private, quoted, reason_of
from service.schema import BINS, FEEDBACK, HISTOGRAMS, PICTURES, RATES, REVIEWS, VERDICTS, WORKERS, migrate

_CHUNK = 1000
"""Rows deleted in one transaction, so that nobody waits long for it."""


@dataclass(frozen=True, slots=True)
class Record:
    """One verdict to be kept. `expected`: the share of normal pictures that the policy takes for outliers.

    `drawn`: for review, by chance alone, and then `content` is the hash of the file. `png`: what the model saw of the
    picture, where it is kept. `latents`: for the alarms, and not kept.
    """

    id: int
    request: str
    filename: str | None
    model: str
    version: str
    source: str
    score: float
    p_value: float
    outlier: bool
    alpha: float
    policy: int
    expected: float
    parts: dict[str, float | None]
    drawn: bool = False
    content: int | None = None
    png: bytes | None = None
    latents: tuple[float, ...] = ()


Beside = Callable[[Connection, Sequence[Record]], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which verdicts: made at `since` or later and before `until` (seconds since 1970); None means any."""

    since: float | None = None
    until: float | None = None
    model: str | None = None
    source: str | None = None
    outlier: bool | None = None
    p_value_at_most: float | None = None

    def applied(self, query: Select[Any]) -> Select[Any]:
        """A query of verdicts with these conditions."""
        v, conditions = VERDICTS.c, []
        if self.since is not None:
            conditions.append(v.id >= ids.first_at(self.since))
        if self.until is not None:
            conditions.append(v.id < ids.first_at(self.until))
        if self.p_value_at_most is not None:
            conditions.append(v.p_value <= self.p_value_at_most)
        equal = ((v.model, self.model), (v.source, self.source), (v.outlier, self.outlier))
        return query.where(*conditions, *(column == value for column, value in equal if value is not None))


@dataclass(frozen=True, slots=True)
class Kept:
    """How much is kept: days of verdicts and pictures, and bytes of pictures; None means all."""

    verdict_days: float | None = None
    picture_days: float | None = 30.0
    picture_bytes: int | None = 1 << 30


@dataclass(frozen=True, slots=True)
class Counts:
    """What a store holds; `oldest` in seconds since 1970, None where there is nothing."""

    verdicts: int
    oldest: float | None
    pictures: int
    picture_bytes: int
    feedback: int


class Store:
    """Opened by its place: a path, or a postgresql:// URL. Raises `ConfigError` where it cannot be opened.

    `worker` is this process's number, for `ids.Ids`.
    """

    def __init__(self, place: str) -> None:
        self.database = Database(place)
        self._uncompacted = False
        try:
            with self.database.writing() as connection:
                migrate(connection)
                found = connection.execute(insert(WORKERS), {"at": time.time()}).inserted_primary_key
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise ConfigError(f"store {self.database.shown} cannot be opened: {reason_of(error)}") from None
        self.worker = int(found[0]) if found else 0

    def write(self, records: Sequence[Record], also: Beside | None = None) -> None:
        """Keep verdicts, all or none; durable when it returns. `also` is done with them in the same transaction."""
        with self.database.writing() as connection:
            connection.execute(insert(VERDICTS), [_row(record) for record in records])
            for table, rows in (
                (PICTURES, [{"id": r.id, "bytes": len(r.png), "png": r.png} for r in records if r.png is not None]),
                (REVIEWS, [_review(record) for record in records if record.drawn]),
            ):
                if rows:
                    connection.execute(insert(table), rows)
            _add(connection, RATES, _rates(records), ("scored", "outliers", "expected"))
            _add(connection, HISTOGRAMS, _histograms(records), ("n",))
            if also is not None:
                also(connection, records)

    def verdicts(self, wanted: Wanted, before: int | None = None, limit: int = 100) -> list[RowMapping]:
        """Verdicts, the newest first, each with what was said of it and whether its picture is kept.

        `before`: the last id of the page before.
        """
        query = wanted.applied(_verdicts())
        if before is not None:
            query = query.where(VERDICTS.c.id < before)
        with self.database.reading() as connection:
            return list(connection.execute(query.order_by(VERDICTS.c.id.desc()).limit(limit)).mappings())

    def verdict(self, number: int) -> RowMapping | None:
        """One verdict, as `verdicts` gives it."""
        with self.database.reading() as connection:
            return connection.execute(_verdicts().where(VERDICTS.c.id == number)).mappings().one_or_none()

    def picture(self, number: int) -> bytes | None:
        """PNG of what the model saw; None where it is not kept."""
        with self.database.reading() as connection:
            return connection.scalar(select(PICTURES.c.png).where(PICTURES.c.id == number))

    def rates(
        self, since: float, until: float, minutes: int, model: str | None = None, source: str | None = None
    ) -> list[RowMapping]:
        """Counts in buckets of so many minutes, each with `start` in seconds since 1970; empty ones are left out."""
        bucket = (RATES.c.minute - RATES.c.minute % minutes).label("bucket")
        sums = (func.sum(column).label(column.name) for column in (RATES.c.scored, RATES.c.outliers, RATES.c.expected))
        # Whole numbers: PostgreSQL does not look for others in an index of these.
        query = select(bucket, *sums).where(RATES.c.minute >= int(since // 60), RATES.c.minute < math.ceil(until / 60))
        query = _of(query, RATES, model, source).group_by(bucket).order_by(bucket)
        with self.database.reading() as connection:
            return list(connection.execute(query).mappings())

    def histogram(self, since: float, until: float, model: str | None = None, source: str | None = None) -> list[int]:
        """p-values counted in `BINS` bins from 0 to 1, by the hours that lie in the span at least in part."""
        hours = HISTOGRAMS.c.hour
        query = select(HISTOGRAMS.c.bin, func.sum(HISTOGRAMS.c.n))
        query = query.where(hours >= int(since // 3600), hours < math.ceil(until / 3600))
        query = _of(query, HISTOGRAMS, model, source).group_by(HISTOGRAMS.c.bin)
        with self.database.reading() as connection:
            found = {int(row[0]): int(row[1]) for row in connection.execute(query)}
        return [found.get(k, 0) for k in range(BINS)]

    def forget(
        self, numbers: Iterable[int], pictures_only: bool = False, note: Callable[[Connection, int], None] | None = None
    ) -> int:
        """Delete verdicts and all that hangs on them, or their pictures alone; how many there were.

        `note` writes down, in the same transaction, how many were deleted. Counts by the minute stay, and of reviews
        scores and labels: they tell nothing of a picture. `compact` wipes the traces.
        """
        chosen, first = list(numbers), PICTURES if pictures_only else VERDICTS
        gone = 0
        for start in range(0, len(chosen), _CHUNK):
            part = chosen[start : start + _CHUNK]
            with self.database.writing() as connection:
                if not pictures_only:
                    _detach_reviews(connection, part)
                count = connection.execute(delete(first).where(first.c.id.in_(part))).rowcount
                for table in () if pictures_only else (PICTURES, FEEDBACK):
                    connection.execute(delete(table).where(table.c.id.in_(part)))
                if note is not None:
                    note(connection, count)
            gone += count
            self._uncompacted = True
        return gone

    def compact(self) -> None:
        """Wipe what was deleted out of the files, where there is anything; `uncompacted` stays where that must wait."""
        if self._uncompacted:
            self._uncompacted = not self.database.compact()

    @property
    def uncompacted(self) -> bool:
        """Whether something deleted may still be read in the files."""
        return self._uncompacted

    def tidy(self, kept: Kept, now: float, most: int = _CHUNK) -> int:
        """Delete of what is older or more than is to be kept at most so many; how many pictures and verdicts that were.

        It is done where that is none.
        """
        if kept.verdict_days is not None:
            gone = self._forget_before(VERDICTS, ids.first_at(now - kept.verdict_days * 86_400), most)
            if gone:
                return gone
        before = 0 if kept.picture_days is None else ids.first_at(now - kept.picture_days * 86_400)
        if kept.picture_bytes is not None:
            before = max(before, self._oldest_kept(kept.picture_bytes))
        return self._forget_before(PICTURES, before, most)

    def counts(self) -> Counts:
        """How much there is; counts all rows, which takes a while where there are millions."""
        with self.database.reading() as connection:

            def number(of: ColumnElement[Any]) -> int:
                return int(connection.scalar(select(of)) or 0)

            oldest = connection.scalar(select(func.min(VERDICTS.c.id)))
            return Counts(
                verdicts=number(func.count(VERDICTS.c.id)),
                oldest=None if oldest is None else ids.seconds_of(oldest),
                pictures=number(func.count(PICTURES.c.id)),
                picture_bytes=number(func.sum(PICTURES.c.bytes)),
                feedback=number(func.count(FEEDBACK.c.id)),
            )

    def backup(self, path: Path) -> None:
        """A whole copy of an SQLite store while it is in use; raises `ConfigError`."""
        if not self.database.is_sqlite:
            raise ConfigError("a PostgreSQL store is backed up by its own tools: pg_dump DATABASE > FILE")
        if path.exists():
            raise ConfigError(f"{path} exists already; choose another place")
        try:
            private(path)
            self.database.outside(f"VACUUM INTO {quoted(str(path))}")
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise ConfigError(f"the backup {path} cannot be written: {reason_of(error)}") from None

    def close(self) -> None:
        """Give all connections back."""
        self.database.close()

    def _forget_before(self, table: Table, number: int, most: int) -> int:
        oldest = select(table.c.id).where(table.c.id < number).order_by(table.c.id).limit(most)
        with self.database.reading() as connection:
            chosen = list(connection.scalars(oldest))
        return self.forget(chosen, pictures_only=table is PICTURES)

    def _oldest_kept(self, most: int) -> int:
        """The smallest id such that pictures from it on take at most so many bytes."""
        total = 0
        with self.database.reading() as connection:
            newest = connection.execute(select(PICTURES.c.id, PICTURES.c.bytes).order_by(PICTURES.c.id.desc()))
            for number, size in newest:
                total += size
                if total > most:
                    return int(number) + 1
        return 0


def _verdicts() -> Select[Any]:
    has_picture = select(PICTURES.c.id).where(PICTURES.c.id == VERDICTS.c.id).exists().label("has_picture")
    said = (FEEDBACK.c.label, FEEDBACK.c.note, FEEDBACK.c.by.label("said_by"), FEEDBACK.c.at.label("said_at"))
    return select(VERDICTS, has_picture, *said).outerjoin(FEEDBACK, FEEDBACK.c.id == VERDICTS.c.id)


def _of(query: Select[Any], table: Table, model: str | None, source: str | None) -> Select[Any]:
    chosen = ((model, table.c.model), (source, table.c.source))
    return query.where(*(column == value for value, column in chosen if value is not None))


def _row(record: Record) -> dict[str, Any]:
    names = (column.name for column in VERDICTS.c if column.name != "parts")
    return {name: getattr(record, name) for name in names} | {"parts": json.dumps(record.parts, allow_nan=False)}


def _review(record: Record) -> dict[str, Any]:
    content = None if record.content is None else record.content - (1 << 64) * (record.content >> 63)
    row = {"id": record.id, "model": record.model, "version": record.version, "score": record.score}
    return {**row, "content": content}


def _rates(records: Sequence[Record]) -> list[dict[str, Any]]:
    found: dict[tuple[int, str, str, str], dict[str, Any]] = {}
    for record in records:
        place = (int(ids.seconds_of(record.id) // 60), record.model, record.version, record.source)
        keys = dict(zip(("minute", "model", "version", "source"), place, strict=True))
        counts = found.setdefault(place, {**keys, "scored": 0, "outliers": 0, "expected": 0.0})
        counts["scored"] += 1
        counts["outliers"] += record.outlier
        counts["expected"] += record.expected
    return [found[place] for place in sorted(found)]


def _histograms(records: Sequence[Record]) -> list[dict[str, Any]]:
    found = Counter((int(ids.seconds_of(r.id) // 3600), r.model, r.version, r.source, _bin(r.p_value)) for r in records)
    names = ("hour", "model", "version", "source", "bin", "n")
    return [dict(zip(names, (*place, found[place]), strict=True)) for place in sorted(found)]


def _detach_reviews(connection: Connection, numbers: list[int]) -> None:
    said = select(FEEDBACK.c.label).where(FEEDBACK.c.id == REVIEWS.c.id).scalar_subquery()
    ours = REVIEWS.c.id.in_(numbers) & REVIEWS.c.label.is_(None)
    connection.execute(update(REVIEWS).where(ours).values(label=func.coalesce(said, "forgotten")))
    connection.execute(update(REVIEWS).where(REVIEWS.c.id.in_(numbers)).values(content=None))


def _bin(p_value: float) -> int:
    """Bins hold their upper ends: p = 0.05 is one of the 5% smallest."""
    return min(max(math.ceil(p_value * BINS - 1e-9), 1), BINS) - 1


def _add(connection: Connection, table: Table, rows: list[dict[str, Any]], counts: tuple[str, ...]) -> None:
    """Add to counters, which other processes add to as well; in ascending order, so that none waits for another."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    query = dialect.insert(table)
    keys = [column.name for column in table.primary_key]
    more = {name: table.c[name] + query.excluded[name] for name in counts}
    connection.execute(query.on_conflict_do_update(index_elements=keys, set_=more), rows)

"""`Store`: verdicts, what is kept of their pictures, and counts by the minute, on disk or in PostgreSQL."""

import json
import logging
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, Table, delete, insert, select, update
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from anomaly_vae import ConfigError
from service import counting, ids
from service.database import Database, is_mistake, or_add, reason_of
from service.kinds import Kinds, key_of, last_of, newest
from service.migrations import migrate
from service.records import Kept, Record, Wanted
from service.schema import FEEDBACK, PICTURE_BYTES, PICTURES, REVIEWS, VERDICTS

__all__ = ["Beside", "Kept", "Record", "Store", "Wanted"]

_log = logging.getLogger(__name__)
Beside = Callable[[Connection, Sequence[Record]], None]
"""What else is done in the transaction that keeps verdicts."""

_CHUNK = 1000
"""Rows deleted in one transaction, so that nobody waits long for it."""


class Store:
    """Opened by its place: a path, or a postgresql:// URL. Raises `ConfigError` where it cannot be opened.

    `patient`: a PostgreSQL that cannot be reached is no error; `open` is then to be tried again, and until it succeeds
    everything else raises `OperationalError`.
    """

    def __init__(self, place: str, patient: bool = False) -> None:
        self.database = Database(place)
        self._uncompacted, self._kinds = False, Kinds()
        try:
            self.open()
        except OperationalError as error:
            if not patient:
                raise self._unopened(error) from None
            _log.error("the store cannot be reached, verdicts wait in memory: %s", reason_of(error))

    def open(self) -> None:
        """Bring it up to date; raises `OperationalError` where it cannot be reached now, `ConfigError` for the rest."""
        try:
            with self.database.opening() as connection:
                migrate(connection)
        except (SQLAlchemyError, sqlite3.Error) as error:
            if isinstance(error, OperationalError) and not self.database.is_sqlite and not is_mistake(error):
                raise
            raise self._unopened(error) from None

    def _unopened(self, error: Exception) -> ConfigError:
        return ConfigError(f"store {self.database.shown} cannot be opened: {reason_of(error)}")

    def write(self, records: Sequence[Record], also: Beside | None = None) -> None:
        """Keep verdicts, all or none; durable when it returns. `also` is done with them in the same transaction."""
        with self.database.writing() as connection:
            kinds = self._kinds.of(connection, records)
            connection.execute(insert(VERDICTS), [_row(record, kinds[key_of(record)]) for record in records])
            for table, rows in (
                (PICTURES, [{"id": r.id, "bytes": len(r.png), "png": r.png} for r in records if r.png is not None]),
                (REVIEWS, [_review(record) for record in records if record.drawn]),
            ):
                if rows:
                    connection.execute(insert(table), rows)
            _count_pictures(connection, [(r.id, len(r.png)) for r in records if r.png is not None], 1)
            counting.count(connection, records)
            if also is not None:
                also(connection, records)
        self._kinds.learn(kinds)

    def verdicts(self, wanted: Wanted, before: int | None = None, limit: int = 100) -> list[RowMapping]:
        """Verdicts, the newest first, each with what was said of it and whether its picture is kept.

        `before`: the last id of the page before.
        """
        rows: list[RowMapping] = []
        with self.database.reading() as connection:
            numbers = newest(connection, wanted, before, limit)
            for start in range(0, len(numbers), _CHUNK):
                part = VERDICTS.c.id.in_(numbers[start : start + _CHUNK])
                rows += connection.execute(_verdicts().where(part).order_by(VERDICTS.c.id.desc())).mappings()
        return rows

    def ranks(self, model: str, limit: int) -> list[tuple[str, float, float]]:
        """Version, score and p-value of a model's last verdicts."""
        with self.database.reading() as connection:
            return last_of(connection, model, limit)

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
        """Counts in buckets of so many minutes, each named by its first minute since 1970; empty ones are left out."""
        with self.database.reading() as connection:
            return counting.rates(connection, since, until, minutes, model, source)

    def histogram(self, since: float, until: float, model: str | None = None, source: str | None = None) -> list[int]:
        """p-values counted in `BINS` bins from 0 to 1, by the hours that lie in the span at least in part."""
        with self.database.reading() as connection:
            return counting.histogram(connection, since, until, model, source)

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
                sizes = select(PICTURES.c.id, PICTURES.c.bytes).where(PICTURES.c.id.in_(part)).with_for_update()
                _count_pictures(connection, [(row[0], row[1]) for row in connection.execute(sizes)], -1)
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
        """Delete of what is older or more than is to be kept at most so many; how many pictures, verdicts or counts
        that were. It is done where that is none.
        """
        if kept.verdict_days is not None:
            gone = self._forget_before(VERDICTS, ids.first_at(now - kept.verdict_days * 86_400), most)
            if gone:
                return gone
        before = 0 if kept.picture_days is None else ids.first_at(now - kept.picture_days * 86_400)
        if kept.picture_bytes is not None:
            before = max(before, self._oldest_kept(kept.picture_bytes))
        gone = self._forget_before(PICTURES, before, most)
        if gone:
            return gone
        with self.database.writing() as connection:
            return counting.fold(connection, kept, now)

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
        p, hours = PICTURES.c, PICTURE_BYTES.c
        total, hour = 0, None
        with self.database.reading() as connection:
            for one, size in connection.execute(select(hours.hour, hours.bytes).order_by(hours.hour.desc())):
                if total + size > most:
                    hour = one
                    break
                total += size
            if hour is None:
                return 0
            # Pictures are looked at one by one in the hour alone that is kept in part.
            first, last = ids.first_at(hour * 3600), ids.first_at((hour + 1) * 3600)
            ours = select(p.id, p.bytes).where(p.id >= first, p.id < last).order_by(p.id.desc())
            for number, size in connection.execute(ours):
                total += size
                if total > most:
                    return int(number) + 1
        return first


def _verdicts() -> Select[Any]:
    has_picture = select(PICTURES.c.id).where(PICTURES.c.id == VERDICTS.c.id).exists().label("has_picture")
    said = (FEEDBACK.c.label, FEEDBACK.c.note, FEEDBACK.c.by.label("said_by"), FEEDBACK.c.at.label("said_at"))
    return select(VERDICTS, has_picture, *said).outerjoin(FEEDBACK, FEEDBACK.c.id == VERDICTS.c.id)


def _row(record: Record, kind: int) -> dict[str, Any]:
    names = (column.name for column in VERDICTS.c if column.name not in ("parts", "kind"))
    parts = json.dumps(record.parts, allow_nan=False)
    return {name: getattr(record, name) for name in names} | {"parts": parts, "kind": kind}


def _review(record: Record) -> dict[str, Any]:
    content = None if record.content is None else record.content - (1 << 64) * (record.content >> 63)
    row = {"id": record.id, "model": record.model, "version": record.version, "score": record.score}
    return {**row, "content": content}


def _count_pictures(connection: Connection, sizes: Iterable[tuple[int, int]], sign: int) -> None:
    found: dict[int, dict[str, int]] = {}
    for number, size in sizes:
        hour = int(ids.seconds_of(number) // 3600)
        counted = found.setdefault(hour, {"hour": hour, "pictures": 0, "bytes": 0})
        counted["pictures"] += sign
        counted["bytes"] += sign * size
    if found:
        counts = or_add(connection, PICTURE_BYTES, ("pictures", "bytes"))
        connection.execute(counts, [found[hour] for hour in sorted(found)])


def _detach_reviews(connection: Connection, numbers: list[int]) -> None:
    ours = REVIEWS.c.id.in_(numbers) & REVIEWS.c.label.is_(None)
    connection.execute(update(REVIEWS).where(ours).values(label="forgotten"))
    connection.execute(update(REVIEWS).where(REVIEWS.c.id.in_(numbers)).values(content=None))

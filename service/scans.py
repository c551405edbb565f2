"""Scans of whole folders, as their commands told of them: counts, and the report that each made."""

import time
import zlib
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, delete, func, insert, select, update

from service import ids
from service.auditing import note
from service.database import Database, or_nothing
from service.schema import SCAN_REPORTS, SCANS


@dataclass(frozen=True, slots=True)
class KeptScans:
    """How many scans are kept, and for how many days; None means all."""

    most: int | None = 1000
    days: float | None = None


class Scans:
    """The scans of a store; the newest that was told of comes first."""

    def __init__(self, database: Database, kept: KeptScans) -> None:
        self._database, self._kept = database, kept

    def add(self, number: int, by: str, scan: dict[str, Any]) -> None:
        """Keep one, and let go of those that are too many or too old."""
        with self._database.writing() as connection:
            connection.execute(insert(SCANS), {"id": number, "by": by, **scan})
            self._tidy(connection)

    def add_once(self, number: int, by: str, scan: dict[str, Any]) -> int:
        """As `add`, unless there is one of this `token`; the id of the one that there is then."""
        with self._database.writing() as connection:
            connection.execute(or_nothing(connection, SCANS), {"id": number, "by": by, **scan})
            found: int = connection.execute(select(SCANS.c.id).where(SCANS.c.token == scan["token"])).scalar_one()
            self._tidy(connection)
        return found

    def scan(self, number: int) -> RowMapping | None:
        """One, with `has_report`."""
        with self._database.reading() as connection:
            return connection.execute(_scans().where(SCANS.c.id == number)).mappings().one_or_none()

    def scans(self, before: int | None, limit: int) -> list[RowMapping]:
        """The newest first; `before`: the last id of the page before."""
        query = _scans().order_by(SCANS.c.id.desc()).limit(limit)
        with self._database.reading() as connection:
            return list(connection.execute(query if before is None else query.where(SCANS.c.id < before)).mappings())

    def set_report(self, number: int, html: bytes) -> bool:
        """Keep its report, in place of one that there is; False where the scan is gone."""
        row = {"id": number, "bytes": len(html), "html": zlib.compress(html)}
        with self._database.writing() as connection:
            # Locked, so that nobody deletes it meanwhile (SQLite has one writer anyway).
            there = connection.scalar(select(SCANS.c.id).where(SCANS.c.id == number).with_for_update())
            if there is not None:
                connection.execute(delete(SCAN_REPORTS).where(SCAN_REPORTS.c.id == number))
                connection.execute(insert(SCAN_REPORTS), row)
        return there is not None

    def report(self, number: int) -> bytes | None:
        """Its report; None where there is none."""
        with self._database.reading() as connection:
            html = connection.scalar(select(SCAN_REPORTS.c.html).where(SCAN_REPORTS.c.id == number))
        return None if html is None else zlib.decompress(html)

    def forget(self, number: int, by: str) -> bool:
        """Delete it with its report; False where it was gone."""
        with self._database.writing() as connection:
            there = connection.execute(select(SCANS).where(SCANS.c.id == number)).mappings().one_or_none()
            if there is not None:
                _delete(connection, [number])
                told = {name: there[name] for name in ("name", "model", "version", "scored", "outliers")}
                note(connection, by, "forget_scan", ids.shown(number), told, None)
        return there is not None

    def _tidy(self, connection: Connection) -> None:
        s, gone = SCANS.c, list[int]()
        if self._kept.days is not None:
            oldest = ids.first_at(time.time() - self._kept.days * 86_400)
            gone += connection.scalars(select(s.id).where(s.id < oldest))
        if self._kept.most is not None:
            gone += connection.scalars(select(s.id).order_by(s.id.desc()).offset(self._kept.most))
        if gone:
            _delete(connection, gone)


def move_on(connection: Connection, number: int, before: int, after: int) -> bool:
    """Note how many rows of a scan have come, in the transaction that keeps them; False where it is not `before`."""
    ours = (SCANS.c.id == number, func.coalesce(SCANS.c.rows, 0) == before)
    return connection.execute(update(SCANS).where(*ours).values(rows=after)).rowcount == 1


def _delete(connection: Connection, numbers: list[int]) -> None:
    for table in (SCAN_REPORTS, SCANS):
        connection.execute(delete(table).where(table.c.id.in_(numbers)))


def _scans() -> Select[Any]:
    has_report = select(SCAN_REPORTS.c.id).where(SCAN_REPORTS.c.id == SCANS.c.id).exists().label("has_report")
    return select(SCANS, has_report)

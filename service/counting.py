"""Counts of verdicts by the minute, the hour and the day, kept as verdicts are written and never made from them.

All three are kept from the beginning, and read at the coarsest that fits, so that a year is no slower than a day. Of
the finer ones only the last days stay; no count is lost by that, only when in an hour, or in a day, it was.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Table, delete, func, select, union_all

from service import ids
from service.database import or_add
from service.records import Kept, Record
from service.schema import BINS, COUNTED_SINCE, DAY, HISTOGRAMS, HOUR, MINUTE, RATES

Piece = tuple[int, int, int]
"""Counts of a span, from a minute until before another."""
_BINS = tuple(f"bin{k}" for k in range(BINS))
_RATES = ("scored", "outliers", "expected")


def count(connection: Connection, records: Sequence[Record]) -> None:
    """Add verdicts to all counts, which other processes add to as well."""
    _add(connection, RATES, _RATES, _summed(records, (MINUTE, HOUR, DAY), _rates_of))
    _add(connection, HISTOGRAMS, _BINS, _summed(records, (HOUR, DAY), _bins_of))


def rates(
    connection: Connection, since: float, until: float, minutes: int, model: str | None, source: str | None
) -> list[RowMapping]:
    """Counts in buckets of so many minutes, each named by its first minute; empty ones are left out."""
    bucket = (RATES.c.start - RATES.c.start % minutes).label("bucket")
    rows = _found(
        RATES, pieces(connection, since, until, minutes), model, source, [bucket, *(RATES.c[name] for name in _RATES)]
    )
    if rows is None:
        return []
    sums = (func.sum(rows[name]).label(name) for name in _RATES)
    query = select(rows.bucket, *sums).group_by(rows.bucket).order_by(rows.bucket)
    return list(connection.execute(query).mappings())


def histogram(connection: Connection, since: float, until: float, model: str | None, source: str | None) -> list[int]:
    """p-values counted in `BINS` bins from 0 to 1, by the hours that lie in the span at least in part."""
    by = pieces(connection, since, until, DAY, (DAY, HOUR))
    rows = _found(HISTOGRAMS, by, model, source, [HISTOGRAMS.c[name] for name in _BINS])
    if rows is None:
        return [0] * BINS
    (sums,) = connection.execute(select(*(func.sum(rows[name]) for name in _BINS)))
    return [int(one or 0) for one in sums]


def fold(connection: Connection, kept: Kept, now: float) -> int:
    """Delete counts by the minute and by the hour that are too old, of an hour or a day at most; how many it were."""
    for span, coarser, days in ((MINUTE, HOUR, kept.minute_days), (HOUR, DAY, kept.hour_days)):
        if days is None:
            continue
        until = math.floor((now - days * 86_400) / 60 / coarser) * coarser
        gone = 0
        for table in (RATES, HISTOGRAMS):
            ours = (table.c.span == span, table.c.start < until)
            oldest = connection.scalar(select(func.min(table.c.start)).where(*ours))
            if oldest is not None:
                part = min(until, oldest - oldest % coarser + coarser)
                gone += connection.execute(delete(table).where(table.c.span == span, table.c.start < part)).rowcount
        if gone:
            _move(connection, span, until)
            return gone
    return 0


def _move(connection: Connection, span: int, start: int) -> None:
    """From `start` on alone all counts of the span are there; it never moves back."""
    ours = COUNTED_SINCE.c.span == span
    before = connection.scalar(select(COUNTED_SINCE.c.start).where(ours))
    if before is None or before < start:
        connection.execute(delete(COUNTED_SINCE).where(ours))
        connection.execute(COUNTED_SINCE.insert(), {"span": span, "start": start})


def pieces(
    connection: Connection, since: float, until: float, minutes: int, there_are: Sequence[int] = (DAY, HOUR, MINUTE)
) -> Iterator[Piece]:
    """The stretches to read for buckets of so many minutes: whole days or hours where a bucket is made of such, and
    the finest of which there still are all counts where it is not."""
    coarsest = next(span for span in (DAY, HOUR, MINUTE) if minutes % span == 0)
    kept = connection.execute(select(COUNTED_SINCE.c.span, COUNTED_SINCE.c.start))
    starts = {int(row[0]): int(row[1]) for row in kept}
    first, last = math.floor(since / 60), math.ceil(until / 60)
    # Each finer one is there for a shorter while.
    begins = accumulate((first, *(min(starts.get(span, 0), last) for span in there_are[1:])), max)
    for place, (start, end) in enumerate(pairwise((*begins, last))):
        if start < end:
            yield from _cover(
                start, end, [span for span in there_are[: place + 1] if span <= coarsest] or [there_are[place]]
            )


def _cover(start: int, end: int, spans: Sequence[int]) -> Iterator[Piece]:
    """A stretch by these spans, the coarsest first: whole ones of it in the middle, the edges by finer ones."""
    span, *finer = spans
    if not finer:
        yield span, start // span * span, -(-end // span) * span
        return
    first, last = -(-start // span) * span, end // span * span
    if first >= last:
        yield from _cover(start, end, finer)
        return
    yield span, first, last
    for left, right in ((start, first), (last, end)):
        if left < right:
            yield from _cover(left, right, finer)


def _found(
    table: Table, by: Iterator[Piece], model: str | None, source: str | None, columns: Sequence[ColumnElement[Any]]
) -> Any:
    """These columns of all rows in these pieces; None where there is no piece."""
    t = table.c
    chosen = [column == value for value, column in ((model, t.model), (source, t.source)) if value is not None]
    parts = [
        select(*columns).where(t.span == span, t.start >= start, t.start < end, *chosen) for span, start, end in by
    ]
    return union_all(*parts).subquery().c if parts else None


def _summed(records: Sequence[Record], spans: Sequence[int], counts_of: Any) -> list[dict[str, Any]]:
    found: dict[tuple[int, int, str, str, str], dict[str, Any]] = {}
    for record in records:
        minute, more = int(ids.seconds_of(record.id) // 60), counts_of(record)
        for span in spans:
            place = (span, minute - minute % span, record.model, record.version, record.source)
            counts = found.setdefault(place, {})
            for name, value in more.items():
                counts[name] = counts.get(name, 0) + value
    keys = ("span", "start", "model", "version", "source")
    # In ascending order, so that no two processes wait for each other.
    return [dict(zip(keys, place, strict=True)) | found[place] for place in sorted(found)]


def _rates_of(record: Record) -> dict[str, float]:
    return {"scored": 1, "outliers": int(record.outlier), "expected": record.expected}


def _bins_of(record: Record) -> dict[str, int]:
    return {_BINS[bin_of(record.p_value)]: 1}


def bin_of(p_value: float) -> int:
    """Bins hold their upper ends: p = 0.05 is one of the 5% smallest."""
    return min(max(math.ceil(p_value * BINS - 1e-9), 1), BINS) - 1


def _add(connection: Connection, table: Table, names: Sequence[str], rows: list[dict[str, Any]]) -> None:
    empty = dict.fromkeys(names, 0)
    connection.execute(or_add(connection, table, names), [empty | row for row in rows])

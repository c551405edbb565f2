"""Kinds of verdicts: model, source, outlier or not, and how rare the p-value is.

There are few of them, however many verdicts. One index by kind and time gives the newest verdicts of each kind, so that
a page of any filter is a merge of a few sorted streams, and as quick among ten million verdicts as among ten.
"""

import bisect
import heapq
import math
from collections.abc import Iterator, Sequence
from itertools import islice

from sqlalchemy import ColumnElement, Connection, and_, func, select

from service import ids
from service.database import or_nothing
from service.records import Record, Wanted
from service.schema import KINDS, RARITY, VERDICTS

_ALL = (1 << 63) - 1
_STREAMS = 250
"""Merged by one statement; SQLite takes up to 500."""

Key = tuple[str, str, bool, float]
"""Model, source, outlier, and the upper end of the p-values."""


class Kinds:
    """The number of every kind that this process has met."""

    def __init__(self) -> None:
        self._known: dict[Key, int] = {}

    def of(self, connection: Connection, records: Sequence[Record]) -> dict[Key, int]:
        """The numbers of these records' kinds, new ones among them; to be told to `learn` once that is committed."""
        wanted = {key_of(record) for record in records}
        found = {key: self._known[key] for key in wanted if key in self._known}
        # In one order, so that processes that meet the same ones never wait for each other in a circle.
        for key in sorted(wanted - set(found), key=repr):
            model, source, outlier, high = key
            row = {"model": model, "source": source, "outlier": outlier, "low": _low(high), "high": high}
            connection.execute(or_nothing(connection, KINDS), row)
            k = KINDS.c
            ours = (k.model == model, k.source == source, k.outlier == outlier, k.high == high)
            found[key] = connection.execute(select(k.number).where(*ours)).scalar_one()
        return found

    def learn(self, found: dict[Key, int]) -> None:
        """These numbers are in the store."""
        self._known.update(found)


def key_of(record: Record) -> Key:
    """The kind of a verdict."""
    high = RARITY[min(bisect.bisect_left(RARITY, record.p_value), len(RARITY) - 1)]
    return record.model, record.source, record.outlier, high


def newest(connection: Connection, wanted: Wanted, before: int | None, limit: int) -> list[int]:
    """The ids of the newest verdicts that are wanted, in order; `before`: below this one."""
    low = 0 if wanted.since is None else ids.first_at(wanted.since)
    high = min(_ALL if wanted.until is None else ids.first_at(wanted.until), _ALL if before is None else before)
    if not _has_kind(wanted):
        every = f"SELECT id FROM verdicts WHERE id >= {low} AND id < {high}"  # noqa: S608 - numbers of our own
        return _read(connection, every, limit)
    parts = _parts(connection, wanted)
    if connection.dialect.name == "postgresql":
        groups: dict[str, list[int]] = {}
        for kind, more in parts:
            groups.setdefault(more, []).append(kind)
        streams = [_of_postgres(kinds, low, high, more, limit) for more, kinds in groups.items()]
    else:
        streams = [_of_sqlite(kind, low, high, more) for kind, more in parts]
    pages: list[Iterator[int]] = []
    for start in range(0, len(streams), _STREAMS):
        merged = " UNION ALL ".join(streams[start : start + _STREAMS])
        pages.append(iter(_read(connection, merged, limit)))
    return list(islice(heapq.merge(*pages, reverse=True), limit))


def last_of(connection: Connection, model: str, limit: int) -> list[tuple[str, float, float]]:
    """Version, score and p-value of a model's last verdicts, without the order that would take a merge.

    Time is gone back over in stretches, each as long as the one before lets expect that it takes.
    """
    v = VERDICTS.c
    kinds = list(connection.scalars(select(KINDS.c.number).where(KINDS.c.model == model)))
    oldest, newest = connection.execute(
        select(select(func.min(v.id)).scalar_subquery(), select(func.max(v.id)).scalar_subquery())
    ).one()
    found: list[tuple[str, float, float]] = []
    if newest is None:
        return found
    high, step = newest + 1, ids.HOUR
    while len(found) < limit and high > oldest:
        low, left = max(0, high - step), limit - len(found)
        ours = select(v.version, v.score, v.p_value).where(v.kind.in_(kinds), v.id >= low, v.id < high)
        part = connection.execute(ours.order_by(v.id.desc()).limit(left)).all()
        found += [(version, score, p_value) for version, score, p_value in part]
        high = low
        step *= max(1, min(16, math.ceil(1.1 * (left - len(part)) / max(1, len(part)))))
    return found


def _of_sqlite(kind: int, low: int, high: int, more: str) -> str:
    # Merged lazily: of no stream is more read than the page shows, and one row.
    return f"SELECT id FROM verdicts WHERE kind = {kind} AND id >= {low} AND id < {high}{more}"  # noqa: S608


def _of_postgres(kinds: list[int], low: int, high: int, more: str, limit: int) -> str:
    # By an order that no other index has: what is said of a kind by old statistics must not lead it to read all others.
    # One plan for all kinds, since to make a hundred takes longer than to read the page.
    between = f"(v.kind, v.id) >= (k.kind, {low}) AND (v.kind, v.id) < (k.kind, {high}){more}"
    stream = f"SELECT v.id FROM verdicts v WHERE {between} ORDER BY v.kind DESC, v.id DESC LIMIT {limit}"  # noqa: S608
    return f"SELECT n.id FROM unnest(ARRAY{kinds}) AS k(kind) CROSS JOIN LATERAL ({stream}) AS n"  # noqa: S608


def _read(connection: Connection, query: str, limit: int) -> list[int]:
    return [row[0] for row in connection.exec_driver_sql(f"{query} ORDER BY id DESC LIMIT {limit}")]


def _has_kind(wanted: Wanted) -> bool:
    parts = (wanted.model, wanted.source, wanted.outlier, wanted.p_value_at_most)
    return any(part is not None for part in parts)


def _parts(connection: Connection, wanted: Wanted) -> Iterator[tuple[int, str]]:
    """Kinds, and what must be asked besides of those that are wanted in part."""
    k, most = KINDS.c, wanted.p_value_at_most
    equal = ((k.model, wanted.model), (k.source, wanted.source), (k.outlier, wanted.outlier))
    conditions: list[ColumnElement[bool]] = [column == value for column, value in equal if value is not None]
    if most is not None:
        conditions.append(k.low < most)
    for number, high in connection.execute(select(k.number, k.high).where(and_(True, *conditions)).order_by(k.number)):
        within = most is None or high <= most
        yield number, "" if within else f" AND p_value <= {most!r}"


def _low(high: float) -> float:
    """The p-values of a kind are larger than this; those of the rarest begin at 0."""
    place = RARITY.index(high)
    return RARITY[place - 1] if place else -1.0

"""How long a page of what is kept takes, with millions of verdicts.

    python benchmarks/store_pages.py --verdicts 10000000 [--postgres postgresql://USER@HOST/EMPTY_DATABASE]

A store is filled in bulk with verdicts of 90 days: two models of two versions, 24 sources from busy to one picture a
day, p-values evenly spread, but for 1% that are rare, 1% drawn for review and half of these judged. Then every page is
asked for as the service asks, 15 times, each time elsewhere where it has a place; median and worst, in milliseconds.
"""

import argparse
import json
import os
import platform
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection, Table, text

from service import ids
from service.auditing import changes, note
from service.decisions import ACTIONS
from service.kinds import Key, Kinds
from service.records import Kept, Record, Wanted
from service.reviewing import Reviews
from service.schema import (
    BINS,
    COUNTED_SINCE,
    DAY,
    FEEDBACK,
    HOUR,
    MINUTE,
    PICTURES,
    RARITY,
    REVIEWS,
    VERDICTS,
)
from service.store import Store

DAYS = 90
_AT_ONCE = 50_000
_MODELS = ("bottles", "labels")


def main() -> None:
    """Fill, ask, print."""
    given = parsed()
    machine = f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}, {given.verdicts:,} verdicts")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        if not given.only_postgres:
            measured(f"SQLite {sqlite3.sqlite_version}", str(Path(folder) / "store.sqlite"), given)
    if given.postgres:
        measured("PostgreSQL", given.postgres, given)


def measured(name: str, place: str, given: argparse.Namespace) -> None:
    """One store's table."""
    store, started = Store(place), time.perf_counter()
    now = time.time()
    filled(store, given.verdicts, now)
    print(f"\n{name}: filled in {time.perf_counter() - started:.0f} s, {size_of(store) / 2**30:.1f} GiB\n")
    print("| page | median ms | worst ms | rows |\n|---|---|---|---|")
    for what, ask in pages(store, now):
        times, rows = [], 0
        for turn in range(15):
            begun = time.perf_counter()
            rows = ask(turn)
            times.append((time.perf_counter() - begun) * 1000)
        print(f"| {what} | {np.median(times):.1f} | {max(times):.1f} | {rows:,} |", flush=True)
    store.close()


def pages(store: Store, now: float) -> Iterator[tuple[str, Callable[[int], int]]]:
    """What is asked, and how many rows come back."""
    month = Wanted(since=now - 40 * 86_400, until=now - 10 * 86_400)
    filters = {
        "newest": Wanted(),
        "a day long ago": Wanted(since=now - 60 * 86_400, until=now - 59 * 86_400),
        "outliers": Wanted(outlier=True),
        "no outliers": Wanted(outlier=False),
        "a busy source": Wanted(source="line-00"),
        "a source of one picture a day": Wanted(source="line-23"),
        "a source that there is not": Wanted(source="nowhere"),
        "a model": Wanted(model="labels"),
        "p at most 0.05": Wanted(p_value_at_most=0.05),
        "p at most 0.00037": Wanted(p_value_at_most=0.00037),
        "p at most 0.0001 (one in a million)": Wanted(p_value_at_most=0.0001),
        "p at most 0.0000001 (none)": Wanted(p_value_at_most=1e-7),
        "p at most 0.0001, rare source": Wanted(source="line-23", p_value_at_most=0.0001),
        "p at most 0.9999": Wanted(p_value_at_most=0.9999),
        "outliers of a rare source": Wanted(source="line-23", outlier=True),
        "outliers of a model and a source": Wanted(model="labels", source="line-05", outlier=True),
        "outliers with p above alpha (none)": Wanted(outlier=False, p_value_at_most=0.001),
        "a month, outliers": replace(month, outlier=True),
        "a month, rare p": replace(month, p_value_at_most=0.0001),
        "a month, rare source, rare p": replace(month, source="line-22", p_value_at_most=0.002),
    }
    for what, wanted in filters.items():
        yield f"verdicts: {what}", _page(store, wanted, 101)
    yield "verdicts: outliers, 1,000", _page(store, Wanted(outlier=True), 1001)
    yield (
        "verdicts: outliers, from the middle on",
        _page(store, Wanted(outlier=True), 101, ids.first_at(now - 45 * 86_400)),
    )
    reviews = Reviews(store.database)
    yield "review", lambda _: len(reviews.to_review(None, 20))
    yield "review of a model, 500", lambda _: len(reviews.to_review("labels", 500))
    for what, days, minutes in (
        ("a day by the minute", 1, 1), ("30 days by the hour", 30, 60), ("90 days by the hour", 90, 60),
        ("a year by the day", 365, 1440),
    ):  # fmt: skip
        yield f"rates: {what}", _rates(store, now, days, minutes, None)
    yield "rates: 30 days by the hour, a source", _rates(store, now, 30, 60, "line-05")
    yield "preview of a policy, last 1,000", lambda _: len(store.ranks("bottles", 1000))
    yield "preview of a policy, last 100,000", lambda _: len(store.ranks("bottles", 100_000))
    yield "audit", lambda _: len(changes(store.database, None, 101))
    yield "tidying, with nothing to do", lambda _: store.tidy(Kept(picture_days=None), now)


def _page(store: Store, wanted: Wanted, limit: int, before: int | None = None) -> Callable[[int], int]:
    return lambda turn: len(store.verdicts(wanted, before and before - turn * 10**12, limit))


def _rates(store: Store, now: float, days: int, minutes: int, source: str | None) -> Callable[[int], int]:
    def ask(turn: int) -> int:
        since, until = now - days * 86_400 - turn * 7, now - turn * 7
        store.histogram(since, until, None, source)
        return len(store.rates(since, until, minutes, None, source))

    return ask


def filled(store: Store, count: int, now: float) -> None:
    """Verdicts over 90 days until `now`, with all that the service writes beside them."""
    chance = np.random.default_rng(0)
    kinds: dict[Key, int] = {}
    for first in range(0, count, _AT_ONCE):
        made = Made.some(chance, first, min(_AT_ONCE, count - first), count, now)
        with store.database.writing() as connection:
            kinds |= Kinds().of(connection, [made.record(k) for k in made.one_of_each_kind()])
            inserted(connection, VERDICTS, made.rows(kinds))
            drawn = range(-first % 100, len(made.ids), 100)
            inserted(connection, REVIEWS, [made.review(k) for k in drawn])
            judged = [(made.ids[k], "normal", "", "ann", now) for k in drawn if made.judged(k)]
            inserted(connection, FEEDBACK, judged)
            inserted(connection, PICTURES, [(made.ids[k], 300, bytes(300)) for k in np.flatnonzero(made.odd)])
        print(f"\r{first + len(made.ids):,} ", end="", file=sys.stderr, flush=True)
    with store.database.writing() as connection:
        counted(connection, now)
        for turn in range(5_000):
            note(connection, "ann", "feedback" if turn % 100 else ACTIONS[turn % 3], "x", None, "normal")
    while store.tidy(Kept(picture_days=None, picture_bytes=None), now):
        pass
    with store.database.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(
            text("ANALYZE" if store.database.is_sqlite else "VACUUM ANALYZE")
        )


@dataclass
class Made:
    """Some verdicts, column by column, in the order of time."""

    first: int
    ids: list[int]
    sources: list[int]
    p: list[float]
    odd: list[bool]
    version: str

    @classmethod
    def some(cls, chance: np.random.Generator, first: int, number: int, count: int, now: float) -> "Made":
        start, step = now - DAYS * 86_400, DAYS * 86_400 / count
        moments = [ids.first_at(start + (first + k) * step) + (first + k) % 2048 for k in range(number)]
        # 24 sources, each rarer than the one before; the last has about a picture a day.
        shares = np.geomspace(1, DAYS / count * 6, 24)
        sources = chance.choice(24, number, p=shares / shares.sum())
        p = 1 - chance.random(number)
        odd = chance.random(number) < 0.01
        p[odd] = chance.random(int(odd.sum())) ** 3 * 0.01
        p = np.ceil(p * 10_001) / 10_001
        p[p < 2 / 10_001] = 2 / 10_001
        p[chance.random(number) < 1e-6] = 1 / 10_001
        version = ("a1b2c3d4e5f6", "0f9e8d7c6b5a")[first * 2 // count]
        return cls(first, moments, sources.tolist(), p.tolist(), (p <= 0.01).tolist(), version)

    def record(self, k: int) -> Record:
        """One, whole."""
        source = self.sources[k]
        parts: dict[str, float | None] = {"elbo": 1.25, "kl": 0.5, "reconstruction": 2.0}
        return Record(
            self.ids[k], f"{self.first + k:032x}", f"part-{self.first + k}.png", _MODELS[source % 2], self.version,
            f"line-{source:02}", 1 / self.p[k], self.p[k], self.odd[k], 0.01, 0, 0.01, parts,
        )  # fmt: skip

    def one_of_each_kind(self) -> list[int]:
        """The places of verdicts of which no two are of one kind."""
        steps = np.searchsorted(RARITY, self.p).tolist()
        self.keys = list(zip(self.sources, steps, self.odd, strict=True))
        return list({key: k for k, key in enumerate(self.keys)}.values())

    def rows(self, kinds: dict[Key, int]) -> Iterator[tuple[Any, ...]]:
        """As the table has them."""
        numbers = {
            (source, step, odd): kinds[_MODELS[source % 2], f"line-{source:02}", odd, RARITY[step]]
            for source, step, odd in set(self.keys)
        }
        parts = json.dumps(self.record(0).parts)
        for k, key in enumerate(self.keys):
            number, source, p = self.first + k, key[0], self.p[k]
            yield (self.ids[k], f"{number:032x}", f"part-{number}.png", _MODELS[source % 2], self.version,
                   f"line-{source:02}", 1 / p, p, key[2], 0.01, 0, parts, numbers[key])  # fmt: skip

    def judged(self, k: int) -> bool:
        """Whether somebody has looked at one that was drawn."""
        return (self.first + k) % 200 == 0

    def review(self, k: int) -> tuple[Any, ...]:
        """As the table of reviews has it."""
        label = "normal" if self.judged(k) else None
        return self.ids[k], _MODELS[self.sources[k] % 2], self.version, 1 / self.p[k], label


def counted(connection: Connection, now: float) -> None:
    """All counts, from the verdicts; those by the minute of the last week alone."""
    minute = "((id / 2097152 / 1000 + 1577836800) / 60)"
    for span in (MINUTE, HOUR, DAY):
        since = ids.first_at(now - 7 * 86_400) if span == MINUTE else 0
        whose = f"{minute} / {span} * {span}, model, version, source"
        sums = "COUNT(*), SUM(CASE WHEN outlier THEN 1 ELSE 0 END), 0.01 * COUNT(*)"
        query = f"SELECT {span}, {whose}, {sums} FROM verdicts WHERE id >= {since} GROUP BY 2, 3, 4, 5"
        connection.exec_driver_sql(f"INSERT INTO outlier_rates {query}")
    last = (COUNTED_SINCE.insert(), {"span": MINUTE, "start": int(now / 60 - 7 * DAY) // HOUR * HOUR + HOUR})
    connection.execute(*last)
    width = 1 / BINS
    bins = ", ".join(
        f"SUM(CASE WHEN p_value > {k * width} AND p_value <= {(k + 1) * width} THEN 1 ELSE 0 END)" for k in range(BINS)
    )
    query = f"SELECT {HOUR}, {minute} / {HOUR} * {HOUR}, model, version, source, {bins} FROM verdicts"
    connection.exec_driver_sql(f"INSERT INTO p_value_counts {query} GROUP BY 2, 3, 4, 5")
    sums = ", ".join(f"SUM(bin{k})" for k in range(BINS))
    query = f"SELECT {DAY}, start / {DAY} * {DAY}, model, version, source, {sums} FROM p_value_counts"
    connection.exec_driver_sql(f"INSERT INTO p_value_counts {query} GROUP BY 2, 3, 4, 5")
    hour = "((id / 2097152 / 1000 + 1577836800) / 3600)"
    connection.exec_driver_sql(
        f"INSERT INTO picture_bytes SELECT {hour}, COUNT(*), SUM(bytes) FROM pictures GROUP BY 1"
    )


def inserted(connection: Connection, table: Table, rows: Iterable[tuple[Any, ...]]) -> None:
    """In bulk, past SQLAlchemy."""
    raw: Any = connection.connection.driver_connection
    if connection.dialect.name == "sqlite":
        raw.executemany(f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(table.c))})", rows)
        return
    with raw.cursor() as cursor, cursor.copy(f"COPY {table.name} FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def size_of(store: Store) -> int:
    """Bytes of the whole store."""
    if store.database.is_sqlite:
        return sum(path.stat().st_size for path in Path(str(store.database.url.database)).parent.iterdir())
    with store.database.reading() as connection:
        return int(connection.scalar(text("SELECT pg_database_size(current_database())")) or 0)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--verdicts", type=int, default=1_000_000)
    parser.add_argument("--postgres", metavar="URL", help="an empty database to fill as well")
    parser.add_argument("--only-postgres", action="store_true", help="leave SQLite out")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where the SQLite file goes for a while")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""How a store of any older version is brought to the present one: numbered steps, each of which is done once."""

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Double,
    Integer,
    Table,
    case,
    func,
    insert,
    inspect,
    literal,
    select,
    text,
    update,
)

from anomaly_vae import ConfigError
from service import first_schema, ids
from service.schema import (
    ACTIVATIONS,
    ALARMS,
    AUDIT,
    BINS,
    BY_ACTION,
    BY_KIND,
    CALIBRATIONS,
    COUNTED_SINCE,
    DAY,
    FEEDBACK,
    HISTOGRAMS,
    HOUR,
    KINDS,
    METADATA,
    MINUTE,
    PICTURE_BYTES,
    PICTURES,
    POLICIES,
    RARITY,
    RATES,
    REVIEWS,
    REVIEWS_BY_MODEL,
    SCAN_REPORTS,
    SCANS,
    SCANS_BY_TOKEN,
    SESSIONS,
    TO_REVIEW,
    VERDICTS,
    WORKERS,
)

_VERSIONS = Table(
    "schema_version", METADATA, Column("number", Integer, primary_key=True), Column("at", Double, nullable=False)
)


def _create(*tables: Table) -> Callable[[Connection], None]:
    def step(connection: Connection) -> None:
        for table in tables:
            table.create(connection)

    return step


def _widen(*columns: Column[Any]) -> Callable[[Connection], None]:
    """Add what tables lack; those that an earlier step has just made have it already."""

    def step(connection: Connection) -> None:
        for column in columns:
            known = {found["name"] for found in inspect(connection).get_columns(column.table.name)}
            if column.name not in known:
                kind = column.type.compile(connection.dialect)
                connection.execute(text(f'ALTER TABLE {column.table.name} ADD COLUMN "{column.name}" {kind}'))

    return step


def _sort_by_kind(connection: Connection) -> None:
    """Give every verdict its kind, and every review what was said of it, each with an index."""
    v, k = VERDICTS.c, KINDS.c
    KINDS.create(connection)
    high = case(*((v.p_value <= end, literal(end, Double)) for end in RARITY), else_=1.0)
    pairs = zip((-1.0, *RARITY), RARITY, strict=False)
    low = case(*((v.p_value <= end, literal(start, Double)) for start, end in pairs), else_=RARITY[-2])
    kinds = select(v.model, v.source, v.outlier, low, high).distinct()
    connection.execute(insert(KINDS).from_select(["model", "source", "outlier", "low", "high"], kinds))
    connection.execute(text("ALTER TABLE verdicts ADD COLUMN kind INTEGER DEFAULT 0 NOT NULL"))
    same = (k.model == v.model, k.source == v.source, k.outlier == v.outlier, k.high == high)
    number = select(k.number).where(*same).correlate(VERDICTS).scalar_subquery()
    connection.execute(update(VERDICTS).values(kind=number))
    for index in first_schema.VERDICTS.indexes:
        index.drop(connection)
    said = select(FEEDBACK.c.label).where(FEEDBACK.c.id == REVIEWS.c.id).scalar_subquery()
    connection.execute(update(REVIEWS).where(REVIEWS.c.label.is_(None)).values(label=said))
    for index in (BY_KIND, BY_ACTION, *TO_REVIEW, REVIEWS_BY_MODEL):
        index.create(connection, checkfirst=True)


def _count_by_spans(connection: Connection) -> None:
    """Counts by the minute are added up to hours and days, histograms by the hour to days."""
    rates, histograms, pictures = first_schema.RATES.c, first_schema.HISTOGRAMS.c, PICTURES.c
    for table in (RATES, HISTOGRAMS, COUNTED_SINCE, PICTURE_BYTES):
        table.create(connection)
    for span in (MINUTE, HOUR, DAY):
        start = rates.minute - rates.minute % span
        whose = (start, rates.model, rates.version, rates.source)
        sums = (func.sum(column) for column in (rates.scored, rates.outliers, rates.expected))
        found = select(literal(span), *whose, *sums).group_by(*whose)
        connection.execute(insert(RATES).from_select([column.name for column in RATES.c], found))
    for span in (HOUR, DAY):
        minute = histograms.hour * 60
        whose = (minute - minute % span, histograms.model, histograms.version, histograms.source)
        bins = (func.sum(case((histograms.bin == k, histograms.n), else_=0)) for k in range(BINS))
        found = select(literal(span), *whose, *bins).group_by(*whose)
        connection.execute(insert(HISTOGRAMS).from_select([column.name for column in HISTOGRAMS.c], found))
    first_schema.RATES.drop(connection)
    first_schema.HISTOGRAMS.drop(connection)
    sizes: dict[int, list[int]] = {}
    for number, size in connection.execute(select(pictures.id, pictures.bytes)):
        counted = sizes.setdefault(int(ids.seconds_of(number) // 3600), [0, 0])
        counted[0] += 1
        counted[1] += size
    rows = [{"hour": hour, "pictures": count, "bytes": size} for hour, (count, size) in sizes.items()]
    if rows:
        connection.execute(insert(PICTURE_BYTES), rows)


def _lend_numbers(connection: Connection) -> None:
    first_schema.WORKERS.drop(connection)
    WORKERS.create(connection)


def _let_scans_send_rows(connection: Connection) -> None:
    _widen(SCANS.c.token, SCANS.c.rows)(connection)
    SCANS_BY_TOKEN.create(connection, checkfirst=True)


STEPS: tuple[Callable[[Connection], None], ...] = (
    _create(
        first_schema.VERDICTS, PICTURES, REVIEWS, FEEDBACK, first_schema.RATES, first_schema.HISTOGRAMS,
        first_schema.WORKERS, AUDIT,
    ),
    _create(POLICIES, ACTIVATIONS, CALIBRATIONS),
    _sort_by_kind,
    _count_by_spans,
    _lend_numbers,
    _create(SCANS, SCAN_REPORTS),
    _create(ALARMS),
    _create(SESSIONS),
    _widen(REVIEWS.c.content, CALIBRATIONS.c.seen, CALIBRATIONS.c.independent),
    _let_scans_send_rows,
)  # fmt: skip
"""Step k makes version k of version k - 1. A released one is never changed: a further one adds what a table lacks."""


def migrate(connection: Connection) -> None:
    """Bring a store, empty or of any older version, to the present one; raises `ConfigError` for a newer one.

    Inside one transaction of the caller, so that it happens once and whole whoever else starts at the same time.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(4722089)"))
    _VERSIONS.create(connection, checkfirst=True)
    found = max([0, *connection.scalars(select(_VERSIONS.c.number))])
    if found > len(STEPS):
        raise ConfigError(
            f"the store is of version {found}, and this program knows up to {len(STEPS)}; "
            "update the program, or give it another store"
        )
    for number, step in enumerate(STEPS[found:], found + 1):
        step(connection)
        connection.execute(insert(_VERSIONS), {"number": number, "at": time.time()})

"""The tables of the store and the numbered steps by which an older store becomes the present one."""

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    insert,
    inspect,
    select,
    text,
)

from anomaly_vae import ConfigError

METADATA = MetaData()

_NUMBER = BigInteger().with_variant(Integer, "sqlite")
"""SQLite's row number is an INTEGER, and holds 64 bits."""


def _name(column: str) -> Column[str]:
    return Column(column, String(64), nullable=False)


def _version() -> Column[str]:
    return Column("version", String(16), nullable=False)


VERDICTS = Table(
    "verdicts",
    METADATA,
    Column("id", _NUMBER, primary_key=True, autoincrement=False),
    _name("request"),
    Column("filename", String(255)),
    _name("model"),
    _version(),
    _name("source"),
    Column("score", Double, nullable=False),
    Column("p_value", Double, nullable=False),
    Column("outlier", Boolean, nullable=False),
    Column("alpha", Double, nullable=False),
    Column("policy", Integer, nullable=False),
    Column("parts", Text, nullable=False),
    Index("verdicts_by_outlier", "outlier", "id"),
    Index("verdicts_by_source", "source", "id"),
    Index("verdicts_by_model", "model", "id"),
)
"""`id` is of `ids.Ids` and tells the time. `policy`: the revision that judged. `parts`: JSON."""

PICTURES = Table(
    "pictures",
    METADATA,
    Column("id", _NUMBER, primary_key=True, autoincrement=False),
    Column("bytes", Integer, nullable=False),
    Column("png", LargeBinary, nullable=False),
)
"""What the model saw of some verdicts' pictures."""

REVIEWS = Table(
    "reviews",
    METADATA,
    Column("id", _NUMBER, primary_key=True, autoincrement=False),
    _name("model"),
    _version(),
    Column("score", Double, nullable=False),
    Column("label", String(64)),
    Column("content", BigInteger),
)
"""Verdicts drawn for review by chance alone. They stay when a verdict is forgotten, `label` with what was said of it:
what is left of a sample once outliers are taken out is no sample. `content`: the hash of the file, as a signed number;
null where it was forgotten."""

FEEDBACK = Table(
    "feedback",
    METADATA,
    Column("id", _NUMBER, primary_key=True, autoincrement=False),
    _name("label"),
    Column("note", String(1000), nullable=False),
    _name("by"),
    Column("at", Double, nullable=False),
)
"""What a person said of a verdict; the last word counts."""

RATES = Table(
    "rates",
    METADATA,
    Column("minute", Integer, primary_key=True, autoincrement=False),
    Column("model", String(64), primary_key=True),
    Column("version", String(16), primary_key=True),
    Column("source", String(64), primary_key=True),
    Column("scored", Integer, nullable=False),
    Column("outliers", Integer, nullable=False),
    Column("expected", Double, nullable=False),
)
"""Counts by minute since 1970. `expected`: of the outliers, were all pictures normal."""

HISTOGRAMS = Table(
    "histograms",
    METADATA,
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("model", String(64), primary_key=True),
    Column("version", String(16), primary_key=True),
    Column("source", String(64), primary_key=True),
    Column("bin", Integer, primary_key=True, autoincrement=False),
    Column("n", Integer, nullable=False),
)
"""p-values counted by hour since 1970, in bins of equal width."""

BINS = 20

WORKERS = Table("workers", METADATA, Column("number", Integer, primary_key=True), Column("at", Double, nullable=False))
"""Processes that opened the store, to be told apart by number."""

AUDIT = Table(
    "audit",
    METADATA,
    Column("number", Integer, primary_key=True),
    Column("at", Double, nullable=False),
    _name("by"),
    _name("action"),
    _name("subject"),
    Column("before", Text),
    Column("after", Text),
)
"""Every change that a person made; `before` and `after` are JSON. Its last number tells other processes to look."""


def _decision(name: str, *columns: Column[Any]) -> Table:
    """A table of decisions on a model of which the last counts; nothing in it is ever changed."""
    return Table(
        name,
        METADATA,
        Column("model", String(64), primary_key=True),
        Column("revision", Integer, primary_key=True, autoincrement=False),
        *columns,
        _name("by"),
        Column("at", Double, nullable=False),
    )


POLICIES = _decision(
    "policies",
    Column("alpha", Double),
    Column("mode", String(16)),
    Column("threshold", Double),
    Column("base", String(16)),
)
"""All null: the bundle's own. `base`: the version of the bundle whose scores a threshold is of."""

ACTIVATIONS = _decision("activations", Column("bundle", String(255), nullable=False), _version())

CALIBRATIONS = _decision(
    "calibrations",
    Column("base", String(16), nullable=False),
    _version(),
    Column("scores", LargeBinary),
    Column("seen", LargeBinary),
    Column("independent", Boolean),
)
"""`base`: the bundle's version. `scores`: little-endian float64; null: the bundle's own calibration. `seen`: hashes of
these pictures, little-endian uint64. `independent`: that no two of them belong together; null: nobody said so."""

ALARMS = Table(
    "alarms",
    METADATA,
    Column("model", String(64), primary_key=True),
    Column("version", String(16), primary_key=True),
    Column("source", String(64), primary_key=True),
    Column("policy", Integer, nullable=False),
    Column("begun", Double, nullable=False),
    Column("rate_raised", Double),
    Column("shift_raised", Double),
    Column("rate", Text, nullable=False),
    Column("shift", Text, nullable=False),
    Column("examples", Text, nullable=False),
    Column("sums", LargeBinary, nullable=False),
)
"""What the alarms have seen of each stream. `rate`, `shift`, `examples`: JSON; `sums`: little-endian int32. The
moments of raising are in seconds since 1970."""

SESSIONS = Table(
    "sessions",
    METADATA,
    Column("digest", String(64), primary_key=True),
    Column("ends", Double, nullable=False),
)
"""Who is signed in on the page: see `sessions.Sessions`. Nothing in it lets anybody in."""

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


STEPS: tuple[Callable[[Connection], None], ...] = (
    _create(VERDICTS, PICTURES, REVIEWS, FEEDBACK, RATES, HISTOGRAMS, WORKERS, AUDIT),
    _create(POLICIES, ACTIVATIONS, CALIBRATIONS),
    _create(ALARMS),
    _create(SESSIONS),
    _widen(REVIEWS.c.content, CALIBRATIONS.c.seen, CALIBRATIONS.c.independent),
)
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

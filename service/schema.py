"""The tables of the store and the numbered steps by which an older store becomes the present one."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

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
    Column("kind", Integer, nullable=False, server_default="0"),
)
"""`id` is of `ids.Ids` and tells the time. `policy`: the revision that judged. `parts`: JSON. `kind`: of `KINDS`."""

BY_KIND = Index("verdicts_by_kind", VERDICTS.c.kind, VERDICTS.c.id, VERDICTS.c.p_value)

KINDS = Table(
    "kinds",
    METADATA,
    Column("number", Integer, primary_key=True),
    _name("model"),
    _name("source"),
    Column("outlier", Boolean, nullable=False),
    Column("low", Double, nullable=False),
    Column("high", Double, nullable=False),
    UniqueConstraint("model", "source", "outlier", "high"),
)
"""What verdicts can be looked for by, in one number. `low`, `high`: the p-values are above the one, up to the other."""

RARITY = (*(float(f"{digit}e-{power}") for power in range(6, 0, -1) for digit in (1, 2, 5)), 1.0)
"""Upper ends of the p-values of kinds: the rates that people ask for, so that these are whole kinds."""

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
what is left of a sample once outliers are taken out is no sample. `label`: what was said, null until then. `content`:
the hash of the file, as a signed number; null where it was forgotten."""

_OPEN = REVIEWS.c.label.is_(None)
TO_REVIEW = (
    Index("reviews_open", REVIEWS.c.id, sqlite_where=_OPEN, postgresql_where=_OPEN),
    Index("reviews_open_by_model", REVIEWS.c.model, REVIEWS.c.id, sqlite_where=_OPEN, postgresql_where=_OPEN),
)
REVIEWS_BY_MODEL = Index("reviews_by_model", REVIEWS.c.model, REVIEWS.c.id)

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

BINS = 20
"""p-values are counted in so many bins of equal width."""

MINUTE, HOUR, DAY = 1, 60, 1440
"""Spans over which is counted, in minutes."""


def _counts(name: str, *columns: Column[Any]) -> Table:
    """Counts over spans. `start`: in minutes since 1970, a multiple of the span."""
    return Table(
        name,
        METADATA,
        Column("span", Integer, primary_key=True, autoincrement=False),
        Column("start", Integer, primary_key=True, autoincrement=False),
        Column("model", String(64), primary_key=True),
        Column("version", String(16), primary_key=True),
        Column("source", String(64), primary_key=True),
        *columns,
        sqlite_with_rowid=False,
    )


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


RATES = _counts("outlier_rates", _count("scored"), _count("outliers"), Column("expected", Double, nullable=False))
"""By the minute, the hour and the day. `expected`: of the outliers, were all pictures normal."""

HISTOGRAMS = _counts("p_value_counts", *(_count(f"bin{k}") for k in range(BINS)))
"""p-values by the hour and the day."""

COUNTED_SINCE = Table(
    "counted_since",
    METADATA,
    Column("span", Integer, primary_key=True, autoincrement=False),
    Column("start", Integer, nullable=False),
)
"""From when on (minutes since 1970) there are all counts of a span; those before were deleted, or never made."""

PICTURE_BYTES = Table(
    "picture_bytes",
    METADATA,
    Column("hour", Integer, primary_key=True, autoincrement=False),
    _count("pictures"),
    _count("bytes"),
)
"""How much is kept of each hour's pictures, hours since 1970."""

WORKERS = Table(
    "worker_numbers",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=False),
    _name("holder"),
    Column("until", Double, nullable=False),
)
"""Numbers lent to processes, by which their verdicts' ids are told apart; `until`: by the database's clock."""

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

BY_ACTION = Index("audit_by_action", AUDIT.c.action, AUDIT.c.number)


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

SCANS = Table(
    "scans",
    METADATA,
    Column("id", _NUMBER, primary_key=True, autoincrement=False),
    Column("name", String(255), nullable=False),
    _name("model"),
    _version(),
    _name("source"),
    _name("by"),
    Column("started", Double, nullable=False),
    Column("finished", Double, nullable=False),
    _count("scored"),
    _count("failed"),
    _count("outliers"),
    Column("expected_rate", Double, nullable=False),
    Column("alpha", Double, nullable=False),
    Column("token", String(32)),
    Column("rows", BigInteger),
)
"""Scans of whole folders, as their commands told of them. `id`: of `ids.Ids`. `token`: by which a command that is
repeated finds its scan again; null: it told none. `rows`: how many of its rows have come, from the first on."""

SCANS_BY_TOKEN = Index("scans_by_token", SCANS.c.token, unique=True)

SCAN_REPORTS = Table(
    "scan_reports",
    METADATA,
    Column("id", _NUMBER, primary_key=True, autoincrement=False),
    Column("bytes", Integer, nullable=False),
    Column("html", LargeBinary, nullable=False),
)
"""Their reports, compressed (zlib); `bytes`: as they were sent."""

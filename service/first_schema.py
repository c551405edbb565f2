"""Tables as the first version of the store made them, where later steps changed or replaced them; never edited."""

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, Integer, MetaData, String, Table, Text

METADATA = MetaData()

VERDICTS = Table(
    "verdicts",
    METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    Column("request", String(64), nullable=False),
    Column("filename", String(255)),
    Column("model", String(64), nullable=False),
    Column("version", String(16), nullable=False),
    Column("source", String(64), nullable=False),
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
"""Counts by minute since 1970."""

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
"""p-values counted by hour since 1970, in 20 bins of equal width."""

WORKERS = Table("workers", METADATA, Column("number", Integer, primary_key=True), Column("at", Double, nullable=False))
"""Processes that opened the store."""

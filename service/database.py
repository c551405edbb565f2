"""The connection to a store: SQLite by a path, PostgreSQL by a URL, and what to do that both behave alike."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from anomaly_vae import ConfigError

BUSY_SECONDS = 5
_POSTGRES = ("postgresql", "postgres", "postgresql+psycopg")


class Database:
    """Short transactions on one database; safe in many threads."""

    def __init__(self, place: str) -> None:
        self.url = _url_of(place)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = _sqlite(self.url) if self.is_sqlite else _postgres(self.url)

    @property
    def shown(self) -> str:
        """Where it is, without a password."""
        return str(self.url.database) if self.is_sqlite else self.url.render_as_string(hide_password=True)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state and changes nothing."""
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is durable once the block is left without an error."""
        with self.engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    def outside(self, statements: str) -> None:
        """Run what SQLite allows outside of transactions alone."""
        with self._raw(statements) as cursor:
            # Not `execute`, which takes one step only of a statement that gives no rows.
            cursor.executescript(statements)

    def compact(self) -> bool:
        """Give deleted space back and cut the log of changes, in which deleted rows still stand (SQLite).

        False where somebody reads an older state, such as a backup: it must be done again later.
        """
        if not self.is_sqlite:
            return True
        with self._raw("compacting") as cursor:
            cursor.execute("PRAGMA busy_timeout=200")
            cursor.executescript("PRAGMA incremental_vacuum")
            (busy, *_) = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            cursor.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")
        return not busy

    @contextmanager
    def _raw(self, what: str) -> Iterator[Any]:
        raw = self.engine.raw_connection()
        try:
            yield raw.cursor()
        except sqlite3.Error as error:
            raise OperationalError(what, None, error) from error
        finally:
            raw.close()

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()


def private(path: Path) -> None:
    """Make an empty file for its owner's eyes alone, unless it is there; SQLite's logs beside it are then the same."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; choose another place") from None


def quoted(value: str) -> str:
    """A text as SQL, for statements that take no parameters."""
    return "'" + value.replace("'", "''") + "'"


def reason_of(error: Exception) -> str:
    """Why the database refused, in one line."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return " ".join(str(cause).split())[:300] or type(cause).__name__


def _url_of(place: str) -> URL:
    if "://" not in place:
        return URL.create("sqlite", database=str(Path(place).absolute()))
    try:
        url = make_url(place)
    except ArgumentError:
        url = None
    if url is None or url.drivername not in _POSTGRES:
        raise ConfigError("store: give a path for SQLite, or postgresql://USER:PASSWORD@HOST/DATABASE") from None
    return url.set(drivername="postgresql+psycopg")


def _sqlite(url: URL) -> Engine:
    folder = Path(str(url.database)).parent
    if not folder.is_dir():
        raise ConfigError(f"store: there is no folder {folder}; make it, or choose another place")
    private(Path(str(url.database)))
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS, "isolation_level": None})

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: Any) -> None:
        # Readers and the one writer do not wait for each other; a commit is on the disk when it returns; what is
        # deleted is overwritten; the space of deleted pictures is given back.
        for pragma in ("auto_vacuum=INCREMENTAL", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that will write takes its lock at once: one that asks for it later may find that another was
        # quicker, and then can only fail.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgres(url: URL) -> Engine:
    try:
        return create_engine(
            url, pool_pre_ping=True, pool_timeout=BUSY_SECONDS, connect_args={"connect_timeout": BUSY_SECONDS}
        )
    except ModuleNotFoundError:
        raise ConfigError("store: PostgreSQL needs a driver; pip install 'anomaly-vae[postgres]'") from None

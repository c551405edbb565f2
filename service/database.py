"""The connection to a store: SQLite by a path, PostgreSQL by a URL, and what to do that both behave alike."""

import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, Insert, Table, create_engine, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from anomaly_vae import ConfigError

BUSY_SECONDS = 5
_TURNED_AWAY = r'authentication failed|no pg_hba.conf entry|(database|role) ".*" does not exist|permission denied'
_POSTGRES = ("postgresql", "postgres", "postgresql+psycopg")


class Database:
    """Short transactions on one database; safe in many threads. `as_it_is`: only looked at, and left in every byte."""

    def __init__(self, place: str, as_it_is: bool = False) -> None:
        self.url = _url_of(place)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = _sqlite(self.url, as_it_is) if self.is_sqlite else _postgres(self.url)
        self.opened = as_it_is

    @property
    def shown(self) -> str:
        """Where it is, without a password."""
        return str(self.url.database) if self.is_sqlite else self.url.render_as_string(hide_password=True)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state and changes nothing."""
        # PostgreSQL's own default is another state for each statement, between which a row may have gone.
        self._expect_opened()
        one_state = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with self.engine.connect().execution_options(**one_state) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is durable once the block is left without an error."""
        self._expect_opened()
        with self._writing() as connection:
            yield connection

    @contextmanager
    def opening(self) -> Iterator[Connection]:
        """The transaction that finds the tables as they should be, or makes them; before it there is no other."""
        with self._writing() as connection:
            yield connection
        self.opened = True

    def _expect_opened(self) -> None:
        if not self.opened:
            raise OperationalError("open", None, ConnectionError("it has not been reached yet"))

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
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


def or_nothing(connection: Connection, table: Table) -> Insert:
    """An insertion that leaves what is there as it is, whoever was quicker."""
    query: Insert = _insert(connection, table).on_conflict_do_nothing()
    return query


def or_add(connection: Connection, table: Table, counts: Iterable[str]) -> Insert:
    """An insertion of counters that adds these counts where there is such a row."""
    query = _insert(connection, table)
    more = {name: table.c[name] + query.excluded[name] for name in counts}
    adding: Insert = query.on_conflict_do_update(
        index_elements=[column.name for column in table.primary_key], set_=more
    )
    return adding


def _insert(connection: Connection, table: Table) -> Any:
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    return dialect.insert(table)


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


def is_mistake(error: Exception) -> bool:
    """Whether PostgreSQL was reached and turned us away, as it will the next time."""
    return re.search(_TURNED_AWAY, reason_of(error)) is not None


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


def _sqlite(url: URL, as_it_is: bool) -> Engine:
    folder = Path(str(url.database)).parent
    if not folder.is_dir():
        raise ConfigError(f"store: there is no folder {folder}; make it, or choose another place")
    if Path(str(url.database)).is_dir():
        raise ConfigError(f"store: {url.database} is a folder; give the path of a file in it")
    private(Path(str(url.database)))
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS, "isolation_level": None})

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: Any) -> None:
        # Readers and the one writer do not wait for each other; a commit is on the disk when it returns; what is
        # deleted is overwritten; the space of deleted pictures is given back.
        for pragma in (
            () if as_it_is else ("auto_vacuum=INCREMENTAL", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON")
        ):
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
        engine = create_engine(
            url, pool_pre_ping=True, pool_timeout=BUSY_SECONDS, connect_args={"connect_timeout": BUSY_SECONDS}
        )
    except ModuleNotFoundError:
        raise ConfigError("store: PostgreSQL needs a driver; pip install 'anomaly-vae[postgres]'") from None

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        # To compile a merge of a hundred streams takes a hundred times as long as to read a page of it.
        connection.execute("SET jit = off")
        connection.commit()

    return engine

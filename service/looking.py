"""A store looked at and copied as it is, whatever version it is of and whoever uses it."""

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.exc import SQLAlchemyError

from anomaly_vae import ConfigError
from service import ids
from service.database import Database, private, quoted, reason_of
from service.schema import FEEDBACK, PICTURES, VERDICTS


@dataclass(frozen=True, slots=True)
class Counts:
    """What a store holds; `oldest` in seconds since 1970, None where there is nothing."""

    verdicts: int
    oldest: float | None
    pictures: int
    picture_bytes: int
    feedback: int


class Look:
    """Nothing in the store is changed, brought up to date or written down. Raises `ConfigError`."""

    def __init__(self, place: str) -> None:
        self.database = Database(place, as_it_is=True)

    def counts(self) -> Counts:
        """How much there is; counts all rows, which takes a while where there are millions."""
        try:
            with self.database.reading() as connection:

                def number(of: ColumnElement[Any]) -> int:
                    return int(connection.scalar(select(of)) or 0)

                oldest = connection.scalar(select(func.min(VERDICTS.c.id)))
                return Counts(
                    verdicts=number(func.count(VERDICTS.c.id)),
                    oldest=None if oldest is None else ids.seconds_of(oldest),
                    pictures=number(func.count(PICTURES.c.id)),
                    picture_bytes=number(func.sum(PICTURES.c.bytes)),
                    feedback=number(func.count(FEEDBACK.c.id)),
                )
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise ConfigError(f"{self.database.shown} cannot be read as a store: {reason_of(error)}") from None

    def backup(self, path: Path) -> None:
        """A whole copy of an SQLite store while it is in use."""
        if not self.database.is_sqlite:
            raise ConfigError("a PostgreSQL store is backed up by its own tools: pg_dump DATABASE > FILE")
        if path.exists():
            raise ConfigError(f"{path} exists already; choose another place")
        try:
            private(path)
            self.database.outside(f"VACUUM INTO {quoted(str(path))}")
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise ConfigError(f"the backup {path} cannot be written: {reason_of(error)}") from None

    def close(self) -> None:
        """Give all connections back."""
        self.database.close()

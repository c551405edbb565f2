"""The log of changes that people made: who, when, what it was before and after. Nothing in it is ever changed."""

import json
import time
from typing import Any

from sqlalchemy import Connection, RowMapping, func, insert, select

from service.database import Database
from service.schema import AUDIT


def note(connection: Connection, by: str, action: str, subject: str, before: Any, after: Any) -> None:
    """Write down a change, in the transaction that makes it."""
    row = {"at": time.time(), "by": by, "action": action, "subject": subject}
    connection.execute(insert(AUDIT), {**row, "before": json.dumps(before), "after": json.dumps(after)})


def changes(database: Database, before: int | None = None, limit: int = 100) -> list[RowMapping]:
    """The changes, the newest first; `before`: the last number of the page before."""
    query = select(AUDIT).order_by(AUDIT.c.number.desc()).limit(limit)
    query = query if before is None else query.where(AUDIT.c.number < before)
    with database.reading() as connection:
        return list(connection.execute(query).mappings())


def latest(database: Database) -> int:
    """The number of the last change; it grows with each."""
    with database.reading() as connection:
        return connection.scalar(select(func.max(AUDIT.c.number))) or 0

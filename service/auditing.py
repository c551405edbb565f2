"""The log of changes that people made: who, when, what it was before and after. Nothing in it is ever changed."""

import json
import time
from typing import Any

from sqlalchemy import Connection, RowMapping, func, insert, select, text

from service.database import Database
from service.schema import AUDIT


def note(connection: Connection, by: str, action: str, subject: str, before: Any, after: Any) -> None:
    """Write down a change, in the transaction that makes it."""
    if connection.dialect.name == "postgresql":
        # Numbers are given in the order of commits, so that whoever has seen one has seen all smaller ones.
        connection.execute(text("SELECT pg_advisory_xact_lock(4722090)"))
    row = {"at": time.time(), "by": by, "action": action, "subject": subject}
    connection.execute(insert(AUDIT), {**row, "before": json.dumps(before), "after": json.dumps(after)})


def changes(database: Database, before: int | None = None, limit: int = 100) -> list[RowMapping]:
    """The changes, the newest first; `before`: the last number of the page before."""
    query = select(AUDIT).order_by(AUDIT.c.number.desc()).limit(limit)
    query = query if before is None else query.where(AUDIT.c.number < before)
    with database.reading() as connection:
        return list(connection.execute(query).mappings())


def since(database: Database, action: str, number: int) -> list[RowMapping]:
    """The changes of one kind after that number, the oldest first."""
    query = select(AUDIT).where(AUDIT.c.number > number, AUDIT.c.action == action).order_by(AUDIT.c.number)
    with database.reading() as connection:
        return list(connection.execute(query).mappings())


def latest(database: Database, actions: tuple[str, ...]) -> int:
    """The number of the last change of these kinds; it grows with each."""
    # One at a time, since that is a look at the end of an index each.
    last = [select(func.max(AUDIT.c.number)).where(AUDIT.c.action == action).scalar_subquery() for action in actions]
    with database.reading() as connection:
        return max(number or 0 for number in connection.execute(select(*last)).one())

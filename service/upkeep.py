"""What a process does for its store all the while: open it as soon as it can be reached, and hold a number of its own.

A number is lent for two minutes and lent again before they are over. It goes to another process only when the time was
over ten minutes ago, so that clocks may differ by as much, and those that were free the longest go first. A process
that could not have its number lent again in time, whatever kept it, stops using it by its own clock before that.
"""

import logging
import threading
import time
import uuid

from sqlalchemy import Connection, select, text, update
from sqlalchemy.exc import SQLAlchemyError

from anomaly_vae import ConfigError
from service.database import Database, or_nothing, reason_of
from service.ids import WORKERS as NUMBERS
from service.ids import Ids, steady
from service.schema import WORKERS
from service.store import Store

_log = logging.getLogger(__name__)
LENT_SECONDS, REST_SECONDS = 120.0, 600.0
_RENEW_SECONDS, _MARGIN_SECONDS = 20.0, 30.0
_TURN_SECONDS = 1.0


class Numbers:
    """The numbers of the processes that share a store; `holder` names this process."""

    def __init__(self, database: Database, holder: str) -> None:
        self._database, self._holder = database, holder

    def take(self) -> int | None:
        """A number that no living process has, for `LENT_SECONDS`; None where there is none."""
        w = WORKERS.c
        with self._database.writing() as connection:
            now = _now(connection)
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(4722091)"))
            lent = {int(row[0]): float(row[1]) for row in connection.execute(select(w.number, w.until))}
            number = next((number for number in range(NUMBERS) if number not in lent), None)
            if number is None:
                number = min(lent, key=lambda one: lent[one])
                if lent[number] > now - REST_SECONDS:
                    return None
            row = {"holder": self._holder, "until": now + LENT_SECONDS}
            connection.execute(or_nothing(connection, WORKERS), {"number": number, **row})
            connection.execute(update(WORKERS).where(w.number == number).values(**row))
        return number

    def renew(self, number: int) -> bool:
        """Have it for longer; False where it went to another."""
        return self._set(number, LENT_SECONDS)

    def give_back(self, number: int) -> None:
        """It is used no longer."""
        self._set(number, 0.0)

    def _set(self, number: int, seconds: float) -> bool:
        ours = (WORKERS.c.number == number, WORKERS.c.holder == self._holder)
        with self._database.writing() as connection:
            until = _now(connection) + seconds
            return connection.execute(update(WORKERS).where(*ours).values(until=until)).rowcount == 1


class Upkeep:
    """One thread for one store, which lends `ids` its number."""

    def __init__(self, store: Store, ids: Ids) -> None:
        self._store, self._ids = store, ids
        self._numbers = Numbers(store.database, uuid.uuid4().hex)
        self._number: int | None = None
        self._due = 0.0
        self._said: str | None = None
        self._ending = threading.Event()
        self._turn()
        self._thread = threading.Thread(target=self._work, name="upkeep", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the number back."""
        self._ending.set()
        self._thread.join()
        if self._number is not None and self._store.database.opened:
            try:
                self._numbers.give_back(self._number)
            except SQLAlchemyError as error:
                _log.warning("the store keeps this process's number a while: %s", reason_of(error))

    def _work(self) -> None:
        while not self._ending.wait(_TURN_SECONDS):
            self._turn()

    def _turn(self) -> None:
        try:
            if not self._store.database.opened:
                self._store.open()
                _log.warning("the store is open now")
            if steady() >= self._due:
                self._hold()
            self._said = None
        except (SQLAlchemyError, ConfigError, OSError) as error:
            reason = str(error) if isinstance(error, ConfigError) else reason_of(error)
            if reason != self._said:
                _log.warning("the store is not at hand: %s", reason)
            self._said = reason

    def _hold(self) -> None:
        asked = steady()
        if self._number is None or not self._numbers.renew(self._number):
            self._number = self._numbers.take()
        if self._number is None:
            _log.warning("all %d numbers of processes are lent; ids are drawn by chance meanwhile", NUMBERS)
        else:
            self._ids.lend(self._number, asked + LENT_SECONDS - _MARGIN_SECONDS)
        self._due = asked + _RENEW_SECONDS


def _now(connection: Connection) -> float:
    """Seconds since 1970 by a clock that all processes share."""
    if connection.dialect.name == "postgresql":
        return float(connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())")))
    return time.time()

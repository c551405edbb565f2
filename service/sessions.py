"""Staying signed in on the page: a cookie stands for a key, until the key's end or the session's own.

The store keeps a digest of each cookie, so that whoever reads the store is not signed in. The key's own hash goes into
it: a key that is removed or made anew ends its sessions at once, in every process that shares the store.
"""

import hashlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from sqlalchemy import delete, insert, select

from service.database import Database
from service.keys import Key, Keyring
from service.schema import SESSIONS


@dataclass(frozen=True)
class Session:
    """`ends` is in seconds since 1970."""

    key: Key
    ends: float


class Sessions:
    """Sessions of the keys of a keyring, in a database, or without one in this process's memory."""

    def __init__(
        self, keyring: Keyring, database: Database | None, hours: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._keyring, self._clock, self._seconds = keyring, clock, hours * 3600
        self._shelf: _Kept | _Held = _Held() if database is None else _Kept(database)

    def begin(self, presented: str) -> tuple[str, Session] | None:
        """Sign in with a key as its owner sends it: the cookie and the session, None where the key is not valid."""
        key = self._keyring.find(presented)
        if key is None:
            return None
        now = self._clock()
        ends = now + self._seconds
        if key.expires is not None:
            ends = min(ends, key.expires.timestamp())
        cookie = f"{key.id}_{secrets.token_urlsafe(32)}"
        self._shelf.drop_before(now)
        self._shelf.put(_digest(cookie, key), ends)
        return cookie, Session(key, ends)

    def find(self, cookie: str) -> Session | None:
        """The session that a cookie stands for, None where it is over or never was."""
        key = self._keyring.named(cookie.partition("_")[0])
        ends = None if key is None else self._shelf.ends(_digest(cookie, key))
        return Session(key, ends) if key is not None and ends is not None and self._clock() < ends else None

    def end(self, cookie: str) -> None:
        """Sign out."""
        key = self._keyring.named(cookie.partition("_")[0])
        if key is not None:
            self._shelf.drop(_digest(cookie, key))


def cookie_name(host: str) -> str:
    """The cookie's name for a service that is called `host`, a name and perhaps a port.

    Browsers send cookies to all ports of a machine; two services on one would sign each other's visitors out.
    """
    try:
        port = urlsplit(f"//{host}").port
    except ValueError:
        port = None
    return "anomaly-vae-session" if port is None else f"anomaly-vae-session-{port}"


def _digest(cookie: str, key: Key) -> str:
    return hashlib.sha256(f"{cookie} {key.sha256}".encode("utf-8", "surrogateescape")).hexdigest()


class _Kept:
    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, digest: str, ends: float) -> None:
        with self._database.writing() as connection:
            connection.execute(insert(SESSIONS), {"digest": digest, "ends": ends})

    def ends(self, digest: str) -> float | None:
        with self._database.reading() as connection:
            return connection.scalar(select(SESSIONS.c.ends).where(SESSIONS.c.digest == digest))

    def drop(self, digest: str) -> None:
        with self._database.writing() as connection:
            connection.execute(delete(SESSIONS).where(SESSIONS.c.digest == digest))

    def drop_before(self, moment: float) -> None:
        with self._database.writing() as connection:
            connection.execute(delete(SESSIONS).where(SESSIONS.c.ends <= moment))


class _Held:
    def __init__(self) -> None:
        self._lock, self._ends = threading.Lock(), dict[str, float]()

    def put(self, digest: str, ends: float) -> None:
        with self._lock:
            self._ends[digest] = ends

    def ends(self, digest: str) -> float | None:
        return self._ends.get(digest)

    def drop(self, digest: str) -> None:
        with self._lock:
            self._ends.pop(digest, None)

    def drop_before(self, moment: float) -> None:
        with self._lock:
            self._ends = {digest: ends for digest, ends in self._ends.items() if ends > moment}

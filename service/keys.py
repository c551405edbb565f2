"""API keys: who may ask for what. A secret is shown once, when it is made; the file keeps its hash.

A key reads `av_ID_SECRET`. The secret is 256 random bits, so that a plain SHA-256 cannot be searched through, and is
compared in constant time.
"""

import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

from pydantic import Field, field_serializer, field_validator

from anomaly_vae import ConfigError, Spec, dump_yaml, read_yaml, write_durably

_log = logging.getLogger(__name__)
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_RELOAD_SECONDS = 1.0


class Role(IntEnum):
    """What a key may do; each may also do what stands before it."""

    SCORE = 1
    READ = 2
    ADMIN = 3


class Key(Spec):
    """One line of the file. `source` is what its pictures are counted under; null: the service's own.

    `requests_per_second` and `bytes_in_hand` (of the bodies of all its unanswered requests) are bounds; null: none.
    """

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    name: str = Field(pattern=_NAME)
    role: Role
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    source: str | None = Field(None, pattern=_NAME)
    created: datetime
    expires: datetime | None = None
    requests_per_second: float | None = Field(None, gt=0)
    bytes_in_hand: int | None = Field(None, ge=1)

    @field_validator("role", mode="before")
    @classmethod
    def _by_name(cls, role: Any) -> Any:
        if isinstance(role, str):
            if role.upper() not in Role.__members__:
                raise ValueError(f"{role!r} is no role; use {', '.join(each.name.lower() for each in Role)}")
            return Role[role.upper()]
        return role

    @field_serializer("role")
    def _named(self, role: Role) -> str:
        return role.name.lower()

    @field_validator("created", "expires")
    @classmethod
    def _with_zone(cls, moment: datetime | None) -> datetime | None:
        return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment

    def expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.expires is not None and now >= self.expires


class KeyFile(Spec):
    """All keys of a service."""

    keys: tuple[Key, ...] = ()

    @field_validator("keys")
    @classmethod
    def _apart(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        if len({key.id for key in keys}) < len(keys):
            raise ValueError("two keys have the same id; remove one")
        return keys

    @classmethod
    def of(cls, path: Path) -> "KeyFile":
        """The keys in a file; raises `ConfigError`."""
        return cls.parse(read_yaml(path), str(path))

    def write(self, path: Path) -> None:
        """Replace the file whole, readable by its owner alone."""
        try:
            write_durably(path, dump_yaml(self.model_dump(mode="json")).encode(), mode=0o600)
        except OSError as error:
            raise ConfigError(f"cannot write the keys {path}: {error.strerror}; choose another place") from None


def made(
    name: str, role: Role, source: str | None = None, days: float | None = None, **bounds: float | None
) -> tuple[Key, str]:
    """A new key, within `bounds` (`requests_per_second`, `bytes_in_hand`), and what its owner sends: the only time that
    it is known."""
    number, secret, now = secrets.token_hex(4), secrets.token_urlsafe(32), datetime.now(UTC).replace(microsecond=0)
    key = Key.parse(
        {
            "id": number,
            "name": name,
            "role": role,
            "sha256": _digest(secret),
            "source": source,
            "created": now,
            "expires": None if days is None else now + timedelta(days=days),
            **bounds,
        },
        "the key",
    )
    return key, f"av_{number}_{secret}"


class Keyring:
    """The keys of a file that may change while the service runs: within a second it is read again.

    A file that became unreadable leaves the keys as they were, since an editor's half-written file must not lock
    everybody out; it is said once in the log.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._stamp = self._stamped()
        self._keys = _by_id(KeyFile.of(path).keys)
        self._looked = time.monotonic()

    def find(self, presented: str) -> Key | None:
        """The key that this text is; None for one that is unknown, wrong or expired."""
        self._look_again()
        number, _, secret = presented.removeprefix("av_").partition("_")
        key = self._keys.get(number)
        # A comparison is made in any case, so that the time tells nobody which ids there are.
        right = hmac.compare_digest(_digest(secret), key.sha256 if key else _digest(""))
        return key if right and key is not None and not key.expired(datetime.now(UTC)) else None

    def sources(self) -> set[str]:
        """All sources that keys name."""
        return {key.source for key in self._keys.values() if key.source is not None}

    def named(self, number: str) -> Key | None:
        """The key with this id, if it is still valid; it proves nothing of who asks."""
        self._look_again()
        key = self._keys.get(number)
        return None if key is None or key.expired(datetime.now(UTC)) else key

    def _look_again(self) -> None:
        if time.monotonic() - self._looked < _RELOAD_SECONDS or not self._lock.acquire(blocking=False):
            return
        try:
            self._looked = time.monotonic()
            stamp = self._stamped()
            if stamp != self._stamp:
                self._stamp = stamp
                self._keys = _by_id(KeyFile.of(self._path).keys)
        except ConfigError as error:
            _log.warning("the keys stay as they were: %s", error)
        finally:
            self._lock.release()

    def _stamped(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def _by_id(keys: Sequence[Key]) -> dict[str, Key]:
    return {key.id: key for key in keys}


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()

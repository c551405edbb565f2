"""How much each key may ask for: requests a second, and bytes in hand at once."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from service.errors import Problem
from service.keys import Key


@dataclass
class _Account:
    tokens: float
    filled: float
    bytes_in_hand: int = 0


class Allowance:
    """Accounts by key id. A key that saved up may ask for a second's worth of requests at once (a token bucket)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._accounts: dict[str, _Account] = {}

    def take(self, key: Key, size: int) -> None:
        """Count a request with a body of `size` bytes; raises `Problem` with the time to wait where it is too much.

        What was taken must be given back when the request ends.
        """
        with self._lock:
            account = self._account(key)
            if key.requests_per_second is not None and account.tokens < 1:
                message = f"the key {key.name} may make {key.requests_per_second:g} requests a second; ask more slowly"
                raise _too_much("rate_limited", message, (1 - account.tokens) / key.requests_per_second)
            self._hold(account, key, 0, size)
            account.tokens -= 1

    def grow(self, key: Key, size: int, new_size: int) -> None:
        """Count a request's body as `new_size` bytes instead of `size`; raises `Problem` as `take` does."""
        with self._lock:
            self._hold(self._account(key), key, size, new_size)

    def _hold(self, account: _Account, key: Key, size: int, new_size: int) -> None:
        if key.bytes_in_hand is not None and account.bytes_in_hand - size + new_size > key.bytes_in_hand:
            if new_size > key.bytes_in_hand:
                message = (
                    f"the key {key.name} may send {key.bytes_in_hand} bytes at once; send fewer pictures a request"
                )
                raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", message)
            message = f"the key {key.name} may have {key.bytes_in_hand} bytes in hand at once; wait for earlier answers"
            raise _too_much("too_many_bytes", message, 0.1)
        account.bytes_in_hand += new_size - size

    def give_back(self, key: Key, size: int) -> None:
        """The request has been answered."""
        with self._lock:
            self._account(key).bytes_in_hand -= size

    def _account(self, key: Key) -> _Account:
        now = self._clock()
        most = max(1.0, key.requests_per_second or 0.0)
        account = self._accounts.setdefault(key.id, _Account(most, now))
        grown = account.tokens + (now - account.filled) * (key.requests_per_second or 0.0)
        account.tokens, account.filled = min(most, grown) if key.requests_per_second else most, now
        return account


def _too_much(code: str, message: str, wait: float) -> Problem:
    return Problem(HTTPStatus.TOO_MANY_REQUESTS, code, message, retry_after=wait)

"""Names of verdicts: numbers that grow with time, so that one index orders, pages and bounds them."""

import threading
import time
from collections.abc import Callable

_EPOCH = 1_577_836_800
"""2020-01-01T00:00:00Z in seconds since 1970."""
_SHIFT = 21
_COUNTED = 11
WORKERS = 1 << (_SHIFT - _COUNTED)


class Ids:
    """63-bit numbers, each once and each larger than the last: 42 bits of milliseconds, 10 of the process, 11 counted.

    `worker` tells apart the processes that share a store. More than 2,048 in a millisecond borrow from the next.
    """

    def __init__(self, worker: int = 0, clock: Callable[[], float] = time.time) -> None:
        self._worker, self._clock, self._lock = (worker % WORKERS) << _COUNTED, clock, threading.Lock()
        self._moment, self._count = 0, 0

    def next(self) -> int:
        """A new number."""
        with self._lock:
            now = _milliseconds(self._clock())
            # A clock that was set back must not give a number twice.
            if now > self._moment:
                self._moment, self._count = now, 0
            elif self._count + 1 < 1 << _COUNTED:
                self._count += 1
            else:
                self._moment, self._count = self._moment + 1, 0
            return (self._moment << _SHIFT) | self._worker | self._count


def shown(number: int) -> str:
    """As clients see it: 16 hex digits."""
    return f"{number:016x}"


def read(text: str) -> int | None:
    """The number that 16 hex digits stand for; None for any other text."""
    if len(text) != 16 or not text.isascii() or not all(c in "0123456789abcdef" for c in text) or text[0] > "7":
        return None
    return int(text, 16)


def seconds_of(number: int) -> float:
    """When it was made, in seconds since 1970."""
    return (number >> _SHIFT) / 1000 + _EPOCH


def first_at(seconds: float) -> int:
    """The smallest number of any process made at that time or later."""
    return max(0, min(_milliseconds(seconds), (1 << 42) - 1)) << _SHIFT


def _milliseconds(seconds: float) -> int:
    return round((seconds - _EPOCH) * 1000)

"""Names of verdicts: numbers that grow with time, so that one index orders, pages and bounds them."""

import secrets
import threading
import time
from collections.abc import Callable

_EPOCH = 1_577_836_800
"""2020-01-01T00:00:00Z in seconds since 1970."""
_SHIFT = 21
_COUNTED, _CHANCE = 11, 18
HOUR = 3_600_000 << _SHIFT
"""By how much numbers grow in an hour."""
WORKERS = 7 << (_SHIFT - _COUNTED - 3)
"""How many processes can have a number of their own; what is above it in these bits is for those that have none."""


def steady() -> float:
    """Seconds that never jump, and go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Ids:
    """63-bit numbers, each once and each larger than the last: 42 bits of milliseconds, 10 of the process, 11 counted.

    Processes that share a store are told apart by numbers lent to them (`lend`). One that has none, such as while the
    store is down, draws 18 bits by chance in place of number and count. More in a millisecond than there is room for
    borrow from the next.
    """

    def __init__(self, clock: Callable[[], float] = time.time, steady: Callable[[], float] = steady) -> None:
        self._clock, self._steady, self._lock = clock, steady, threading.Lock()
        self._moment, self._count = 0, 0
        self._worker, self._until = 0, 0.0
        self._counting = False

    def lend(self, worker: int, until: float) -> None:
        """Use this number until then, by `steady`."""
        assert 0 <= worker < WORKERS
        with self._lock:
            self._counting &= worker == self._worker
            self._worker, self._until = worker, until

    def next(self) -> int:
        """A new number."""
        with self._lock:
            now = _milliseconds(self._clock())
            lent = self._steady() < self._until
            # A clock that was set back must not give a number twice.
            if now > self._moment or not lent or not self._counting:
                self._moment, self._count = max(now, self._moment + 1), 0
            elif self._count + 1 < 1 << _COUNTED:
                self._count += 1
            else:
                self._moment, self._count = self._moment + 1, 0
            self._counting = lent
            if not lent:
                return (self._moment << _SHIFT) | (WORKERS << _COUNTED) | secrets.randbits(_CHANCE)
            return (self._moment << _SHIFT) | (self._worker << _COUNTED) | self._count


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

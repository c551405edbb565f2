"""Taking from a source that may be slow: full batches while it is quick, what there is when it is not."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

_T = TypeVar("_T")

PATIENCE = 0.5
"""Seconds that the first of a batch waits for others."""
_ROOM = 2048
"""How many are held that nobody has taken yet."""


class Trickle(Generic[_T]):
    """Takes from `source` in a thread of its own, which is left alone once this is closed, even if it still waits.

    `room`: how many are held at a time. Use it in a `with`.
    """

    def __init__(self, source: Iterator[_T], patience: float = PATIENCE, room: int = _ROOM) -> None:
        self._source, self._patience, self._room = source, patience, room
        self._changed = threading.Condition()
        self._held: deque[tuple[float, _T]] = deque()
        self._ended = self._closed = False
        self._error: BaseException | None = None

    def __enter__(self) -> "Trickle[_T]":
        # A daemon: whoever writes a list may never end, and must not keep the command from ending.
        threading.Thread(target=self._fill, name="trickle", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._held.clear()
            self._changed.notify_all()

    def take(self, most: int) -> list[_T]:
        """At least one and at most so many, none at the end; raises what the source raised, once all before was taken.

        Fewer than `most` come where the first of them has waited for `patience` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._held or self._ended or self._closed)
            if self._held:
                left = self._held[0][0] + self._patience - time.monotonic()
                full = min(most, self._room)
                self._changed.wait_for(lambda: len(self._held) >= full or self._ended or self._closed, max(0.0, left))
            taken = [self._held.popleft()[1] for _ in range(min(most, len(self._held)))]
            self._changed.notify_all()
            if not taken and self._error is not None and not self._closed:
                raise self._error
            return taken

    def _fill(self) -> None:
        error: BaseException | None = None
        try:
            for one in self._source:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._held) < self._room or self._closed)
                    if self._closed:
                        return
                    self._held.append((time.monotonic(), one))
                    self._changed.notify_all()
        except BaseException as found:
            error = found
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()

"""Which files are fully written: those whose size and time have not changed for a while. No clock of its own."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anomaly_vae.watch_state import Seen, path_of

Look = Callable[[bytes], Seen | None]
"""A file of this key as it is now; None where there is none."""


@dataclass
class _Arrival:
    file: Seen
    due: float
    doubtful: bool = False


class Arrivals:
    """Files on their way. `settle`: seconds without a change until a file is taken to be whole; `patience`: seconds
    without a change until one that ends before its last pixel is taken to be broken."""

    def __init__(self, look: Look, settle: float, patience: float) -> None:
        self._look, self._settle, self._patience = look, settle, max(patience, settle)
        self._arrivals: dict[bytes, _Arrival] = {}
        self._heap: list[tuple[float, bytes]] = []

    def __len__(self) -> int:
        return len(self._arrivals)

    def saw(self, file: Seen, now: float) -> None:
        """A file was seen like this."""
        known = self._arrivals.get(file.key)
        if known is None or known.file != file:
            self._wait(_Arrival(file, now + self._settle))

    def doubt(self, file: Seen, now: float) -> None:
        """A file that seemed whole is not: it gets more time, once for each change."""
        self._wait(_Arrival(file, now + self._patience - self._settle, doubtful=True))

    def ready(self, now: float, most: int) -> list[tuple[Seen, bool]]:
        """Whole files, at most so many, and of each whether it has had its time: they are no longer waited for."""
        found: list[tuple[Seen, bool]] = []
        while self._heap and self._heap[0][0] <= now and len(found) < most:
            due, key = heapq.heappop(self._heap)
            arrival = self._arrivals.get(key)
            if arrival is None or arrival.due != due:
                continue
            del self._arrivals[key]
            seen = self._look(key)
            if seen == arrival.file:
                found.append((seen, arrival.doubtful))
            elif seen is not None:
                self._wait(_Arrival(seen, now + self._settle))
        return found

    def next_due(self) -> float | None:
        """When to ask again; None where nothing is waited for."""
        return self._heap[0][0] if self._heap else None

    def _wait(self, arrival: _Arrival) -> None:
        self._arrivals[arrival.file.key] = arrival
        heapq.heappush(self._heap, (arrival.due, arrival.file.key))


def looking_in(root: Path) -> Look:
    """Looks for files below `root`."""

    def look(key: bytes) -> Seen | None:
        try:
            found = path_of(root, key).stat()
        except OSError:
            return None
        return Seen(key, found.st_size, found.st_mtime_ns)

    return look

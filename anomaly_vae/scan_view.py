"""How far a scan is: a bar on a terminal, a line every ten seconds elsewhere."""

import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from anomaly_vae import console

if TYPE_CHECKING:
    from anomaly_vae.scan_summary import Counts

_AT_ONCE = 1000


class ScanView:
    """Takes the counts so far. `entries`: the same source once more, to be counted meanwhile for the time that is left,
    on a terminal; None where that is not to be known. Use it in a `with`."""

    def __init__(self, entries: Iterable[Any] | None, terminal: bool | None = None) -> None:
        terminal = console.err.is_terminal if terminal is None else terminal
        self._entries = entries if terminal else None
        self._bar = _bar() if terminal else None
        self._task = None if self._bar is None else self._bar.add_task("scanning", total=None, found="")
        self._started = self._printed = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> "ScanView":
        if self._bar is not None:
            self._bar.start()
        if self._entries is not None:
            threading.Thread(target=self._count, name="count", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, counts: "Counts") -> None:
        now = time.monotonic()
        done = counts.images + counts.errors
        rate = f"{done / max(now - self._started, 1e-9):,.0f} images/s"
        found = f"{counts.outliers:,} outliers ({counts.rate:.2%}), {counts.errors:,} unreadable"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, found=f"{rate}, {found}")
        elif now - self._printed >= console.PLAIN_SECONDS:
            self._printed = now
            console.note(f"{done:,} files, {found}, {rate}")

    def _count(self) -> None:
        total = 0
        for _ in self._entries or ():
            total += 1
            if self._ended.is_set():
                return
            if total % _AT_ONCE == 0:
                time.sleep(0.005)  # counting must not keep the scan from working
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(show_speed=False),
               TimeRemainingColumn(), TextColumn("{task.completed:,} files, {task.fields[found]}"))  # fmt: skip
    return Progress(*columns, console=console.err, transient=True)

"""How far a scan is: a bar on a terminal, a line every ten seconds elsewhere."""

import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

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
        self._bar = _Bar() if terminal else None
        self._task = None if self._bar is None else self._bar.add_task("scanning", total=None, facts=("starting",))
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
        found = f"{counts.outliers:,} outliers ({counts.rate:.2%})", f"{counts.errors:,} unreadable"
        facts = f"{done:,} files", rate, *found
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, facts=facts)
        elif now - self._printed >= console.PLAIN_SECONDS:
            self._printed = now
            console.note(", ".join(facts))

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


_BAR, _BESIDE = 40, 28
"""Columns of the bar, and of what stands beside it in its line."""


class _Left(TimeRemainingColumn):
    """The time that is left, by its name, once it can be known."""

    def render(self, task: Task) -> Text:
        left = super().render(task)
        return Text.assemble("ETA ", left) if task.total is not None else Text("")


class _Bar(Progress):
    """A line with the bar, and below it the facts: as many in a line as fit, however narrow the terminal is."""

    def __init__(self) -> None:
        self._drawn = BarColumn()
        columns = (TextColumn("{task.description}"), self._drawn, TaskProgressColumn(show_speed=False), _Left())
        super().__init__(*columns, console=console.err, transient=True)

    def get_renderables(self) -> Iterator[RenderableType]:
        width = console.err.width
        self._drawn.bar_width = max(1, min(_BAR, width - _BESIDE))
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text("\n".join(fitted(task.fields["facts"], width)), no_wrap=True, overflow="ellipsis")


def fitted(facts: Iterable[str], width: int) -> list[str]:
    """Facts with commas between them, in lines of at most so many columns where a single one is not longer."""
    lines: list[str] = []
    for fact in facts:
        if lines and len(lines[-1]) + len(fact) + 3 <= width:
            lines[-1] += f", {fact}"
        else:
            lines[-1:] = [*(f"{line}," for line in lines[-1:]), fact]
    return lines

"""What a scan still has to do, on disk in blocks while the source lists: for workers that have no `Entry` at hand."""

import errno
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from anomaly_vae.entries import Entry, Failed, Reader, as_os_error
from anomaly_vae.trickling import Trickle

FEWEST, MOST = 64, 1024
"""Entries of a block: few at first, so that all workers soon have one, and more of a long scan."""

_SCHEMA = pa.schema([("path", pa.string()), ("size", pa.int64()), ("mtime", pa.float64()), ("error", pa.string())])

Announce = Callable[[int, bool], None]
"""Is told how many blocks there are, and whether that is all."""


def place_of(folder: Path, number: int) -> Path:
    """Where a block lies."""
    return folder / f"{number:08d}.parquet"


def table_of(entries: list[Entry]) -> pa.Table:
    """A block; what could not be listed carries why."""
    rows = [{"path": one.path, "size": one.size, "mtime": one.mtime, "error": _why(one)} for one in entries]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def entries_of(block: pa.Table, reader: Reader) -> Iterator[Entry]:
    """The entries of a block, wherever they are read."""
    for row in block.to_pylist():
        if row["error"] is None:
            yield Entry(row["path"], row["size"], row["mtime"], reader(row["path"]))
        else:
            yield Entry(row["path"], row["size"], row["mtime"], Failed(OSError(errno.EIO, row["error"])))


def _why(entry: Entry) -> str | None:
    return as_os_error(entry.read.error).strerror if isinstance(entry.read, Failed) else None


@dataclass
class Manifest:
    """Writes blocks of `entries` into `folder`, in a thread, never more than `ahead` of those that were taken.

    Blocks stay until the scan ends, so that one that was lost on its way can be had again. Use it in a `with`; once
    `announce` has heard that these are all, `check` raises what cut the listing short.
    """

    entries: Iterator[Entry]
    folder: Path
    ahead: int
    announce: Announce
    _error: BaseException | None = field(default=None, init=False)

    def __enter__(self) -> "Manifest":
        shutil.rmtree(self.folder, ignore_errors=True)  # of a go that was cut short
        self.folder.mkdir()
        self._room, self._stopped = threading.Semaphore(self.ahead), threading.Event()
        self._coming = Trickle(self.entries).__enter__()
        self._thread = threading.Thread(target=self._list, name="manifest", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stopped.set()
        self._coming.__exit__()
        self._room.release()
        self._thread.join()

    def took(self) -> None:
        """One more block has become rows."""
        self._room.release()

    def check(self) -> None:
        """Raise what the source raised."""
        if self._error is not None:
            raise self._error

    def _list(self) -> None:
        number, listed = 0, 0
        try:
            while not self._stopped.is_set():
                size = min(MOST, max(FEWEST, listed // (2 * self.ahead)))
                block = self._coming.take(size)
                if not block:
                    break
                self._room.acquire()
                pq.write_table(table_of(block), place_of(self.folder, number), compression="zstd")
                number, listed = number + 1, listed + len(block)
                self.announce(number, False)
        except BaseException as error:
            self._error = error
        # Nobody may be there any more to hear it.
        with suppress(Exception):
            self.announce(number, True)


def read_block(place: Path) -> pa.Table:
    """A block."""
    return pq.read_table(place, schema=_SCHEMA)

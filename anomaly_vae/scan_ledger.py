"""What a scan has done so far, on disk beside its result: killed at any moment, it goes on from there.

`.RESULT.scan/` holds `scan.json`, what the scan is of, and segments: tables that were written, synced and then renamed,
so that each is whole or not there. Every go of a scan has segments of its own. Whoever works on it holds a lock.
"""

import fcntl
import heapq
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import groupby, pairwise
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from anomaly_vae.bundle import sync_folder, write_durably
from anomaly_vae.errors import DataError
from anomaly_vae.paths import order_of, printable

_ROWS, _SECONDS = 16_384, 5.0
"""A segment is written when it has so many rows, or is so old: what a kill may cost."""
_AT_ONCE = 4096
_FACTS = "scan.json"

Row = dict[str, Any]


class _Lane:
    """Rows of one go on their way to a segment, in order."""

    def __init__(self) -> None:
        self.tables: list[pa.Table] = []
        self.written, self._rows, self._since = 0, 0, 0.0

    def add(self, table: pa.Table) -> bool:
        """Take rows; True when it is time to write them."""
        if not self.tables:
            self._rows, self._since = 0, time.monotonic()
        self.tables.append(table)
        self._rows += len(table)
        return self._rows >= _ROWS or time.monotonic() - self._since >= _SECONDS


class Ledger:
    """Rows of one scan. `facts`: what it is of; another scan's ledger is refused. Use it in a `with`.

    `started`: when its first go began, in seconds since 1970.

    `sorted`: whether rows come in the order of `order_of`; otherwise they come in one order that never changes.
    """

    def __init__(self, out: Path, schema: pa.Schema, facts: Mapping[str, Any], sorted_: bool, fresh: bool) -> None:
        self._out, self.folder = out, out.with_name(f".{out.name}.scan")
        self._schema, self._facts, self.sorted = schema, dict(facts), sorted_
        self._fresh = fresh
        self._lock: IO[bytes] | None = None
        self._go = 0
        self.started = time.time()
        self._lanes = (_Lane(), _Lane())
        # Rows may come so slowly that nobody else is there to write them in time.
        self._guard = threading.RLock()
        self._timer: threading.Timer | None = None
        self._late_error: OSError | None = None

    def __enter__(self) -> "Ledger":
        try:
            self._claim()
            self._open()
        except OSError as error:
            self._release()
            what = f"cannot write beside {printable(self._out)} ({error.strerror}); choose another --out"
            raise DataError(what) from None
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._stop_timer()
        self._release()

    @property
    def begun(self) -> bool:
        """Whether an earlier go left something."""
        return self._go > 0

    def add(self, table: pa.Table, lane: int = 0) -> None:
        """Take rows, and have them on disk soon. Those of a `lane`, of which there are two, are in order."""
        with self._guard:
            if self._lanes[lane].add(table):
                self.flush()
            elif self._timer is None:
                self._timer = threading.Timer(_SECONDS, self._flush_late)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Put on disk what was taken."""
        with self._guard:
            self._stop_timer()
            error, self._late_error = self._late_error, None
            if error is not None:
                raise error
            for i, lane in enumerate(self._lanes):
                if lane.tables:
                    segment = pa.BufferOutputStream()
                    pq.write_table(pa.concat_tables(lane.tables), segment)
                    place = self.folder / f"{self._go + i:04d}-{lane.written:06d}.parquet"
                    write_durably(place, segment.getvalue().to_pybytes())
                    lane.tables, lane.written = [], lane.written + 1

    def _flush_late(self) -> None:
        with self._guard:
            if self._timer is not threading.current_thread():
                return  # somebody was quicker
            try:
                self.flush()
            except OSError as error:
                self._late_error = error  # for whoever adds or flushes next

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def done(self, columns: tuple[str, ...] = ("path", "size", "mtime", "error")) -> Iterator[Row]:
        """Of rows that earlier goes left, these columns, in order."""
        for table in self._tables(range(self._go), list(columns)):
            yield from table.to_pylist()

    def tables(self) -> Iterator[pa.Table]:
        """All rows in order, once each."""
        self.flush()
        return self._tables(range(self._go + len(self._lanes)), None)

    def _tables(self, goes: range, columns: list[str] | None) -> Iterator[pa.Table]:
        runs = [segments for go in goes if (segments := sorted(self.folder.glob(f"{go:04d}-*.parquet")))]
        if not self.sorted or self._apart(runs):
            for segments in runs:
                yield from _read(segments, columns)
            return
        schema = self._schema if columns is None else pa.schema([self._schema.field(name) for name in columns])
        streams = [_ordered(i, segments, columns) for i, segments in enumerate(runs)]
        rows: list[Row] = []
        for _, same in groupby(heapq.merge(*streams, key=lambda one: one[:2]), key=lambda one: one[0]):
            rows.append(list(same)[-1][2])  # the last go knows best
            if len(rows) == _AT_ONCE:
                yield pa.Table.from_pylist(rows, schema=schema)
                rows = []
        if rows:
            yield pa.Table.from_pylist(rows, schema=schema)

    def _apart(self, runs: list[list[Path]]) -> bool:
        """Whether each go began behind the end of the one before, as it does unless files came or changed."""
        spans = [(_end(segments[0], 0), _end(segments[-1], -1)) for segments in runs]
        return all(before[1] < after[0] for before, after in pairwise(spans))

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the scan is of."""
        return self._facts

    def finish(self, write: Callable[[Path], None], keep: Callable[[Path], None] | None = None) -> None:
        """Have the result written beside its place, rename it, and forget the segments.

        `keep` is called with the result before it has its name, and may put something into `folder`, which then stays.
        """
        temporary = self.folder / "result.tmp"
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if keep is not None:
            keep(temporary)
        temporary.replace(self._out)
        sync_folder(self._out.parent)
        if keep is None:
            self.forget()
        else:
            self._drop_segments()

    def _drop_segments(self) -> None:
        for left in self.folder.glob("*.parquet"):
            left.unlink()

    def forget(self) -> None:
        """Delete the ledger; the lock is held until the end."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _claim(self) -> None:
        while True:
            self.folder.mkdir(exist_ok=True)
            # Who held the lock before may just be deleting the folder, and the lock with it.
            with suppress(FileNotFoundError):
                self._lock = (self.folder / "lock").open("ab")
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    where = printable(self._out)
                    busy = f"another scan is writing {where}; wait for it, stop it, or choose another --out"
                    raise DataError(busy) from None
                if os.fstat(self._lock.fileno()).st_ino == (self.folder / "lock").stat().st_ino:
                    return
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _open(self) -> None:
        place = self.folder / _FACTS
        if place.exists() and not self._fresh and any(self.folder.glob("*-*.parquet")):
            found = json.loads(place.read_text())
            self.started = found.pop("started", self.started)
            self._compare(found)
        else:
            self._drop_segments()
            write_durably(place, json.dumps({**self._facts, "started": self.started}, indent=1).encode())
        for left in self.folder.glob(".*"):
            left.unlink()  # what was being written when an earlier go was killed
        goes = [int(one.name[:4]) for one in self.folder.glob("*-*.parquet")]
        self._go = max(goes) // 2 * 2 + 2 if goes else 0

    def _compare(self, facts: dict[str, Any]) -> None:
        other = [name for name in {**facts, **self._facts} if facts.get(name) != self._facts.get(name)]
        if other:
            what = ", ".join(f"{name} was {facts.get(name)}, now {self._facts.get(name)}" for name in other)
            where = printable(self._out)
            raise DataError(f"a scan into {where} was left unfinished, of another kind ({what}); "
                            "repeat it as it was to go on, or give --fresh to begin anew")  # fmt: skip


def _read(segments: list[Path], columns: list[str] | None) -> Iterator[pa.Table]:
    for place in segments:
        with place.open("rb") as opened, pq.ParquetFile(opened) as file:
            for batch in file.iter_batches(_AT_ONCE, columns=columns):
                yield pa.Table.from_batches([batch])


def _ordered(go: int, segments: list[Path], columns: list[str] | None) -> Iterator[tuple[tuple[bytes, ...], int, Row]]:
    for table in _read(segments, columns):
        for row in table.to_pylist():
            yield order_of(row["path"]), go, row


def _end(place: Path, which: int) -> tuple[bytes, ...]:
    with place.open("rb") as opened, pq.ParquetFile(opened) as file:
        group = file.read_row_group(0 if which == 0 else file.num_row_groups - 1, columns=["path"])
    return order_of(group["path"][which].as_py())

"""The verb `scan`: every picture under a folder becomes one row of a table, a bad file a row with its error."""

import csv
import errno
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from anomaly_vae.engine import Engine
from anomaly_vae.errors import BadImage, DataError
from anomaly_vae.images import IMAGE_SUFFIXES

_AHEAD = 4
"""Batches being read and decoded while one is judged."""

Row = dict[str, Any]


@dataclass
class Tally:
    """Counts of a scan so far. `expected`: false alarms if every readable picture were normal."""

    images: int = 0
    outliers: int = 0
    errors: int = 0
    expected: float = 0.0


def scan(engine: Engine, folder: Path, out: Path, report: Callable[[Tally], None] = lambda tally: None) -> Tally:
    """Score all pictures under `folder`, recursively and in sorted order, into `out` (.csv, .jsonl or .parquet).

    The result is complete or absent: it is written beside its place and renamed.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the folder whose pictures are to be scored")
    writer = _WRITERS.get(out.suffix.lower())
    if writer is None:
        raise DataError(f"--out {out.name}: the ending decides the format; use .csv, .jsonl or .parquet")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    tally = Tally()
    try:
        with writer(temporary, list(engine.detector.spec.parts)) as table:
            for rows in _rows(engine, folder):
                table.write(rows)
                _count(tally, rows, engine.detector.policy.expected_false_alarm_rate)
                report(tally)
        if not tally.images + tally.errors:
            raise DataError(f"{folder} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
        temporary.replace(out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    finally:
        temporary.unlink(missing_ok=True)
    return tally


def list_pictures(folder: Path) -> Iterator[Path]:
    """Files with an image's ending under `folder`, sorted; hidden ones and links to folders are not followed.

    A folder that cannot be listed is yielded itself: whoever reads it gets the reason.
    """
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError:
        yield folder
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from list_pictures(Path(entry.path))
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            yield Path(entry.path)


def read_picture(path: Path, max_bytes: int) -> bytes:
    """A plain file's bytes, no more of a huge one than it takes to refuse it; raises `OSError`."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a plain file" if not path.is_dir() else "the folder cannot be listed")
    with path.open("rb") as file:
        return file.read(max_bytes + 1)


def printable(path: Path) -> str:
    """A path as valid Unicode: bytes that are none are shown as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _rows(engine: Engine, folder: Path) -> Iterator[list[Row]]:
    """Rows in batches; reading and decoding of the next batches overlap the judging of this one."""
    paths = list_pictures(folder)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        waiting: deque[list[tuple[Path, Future[Tensor | str]]]] = deque()

        def read_ahead() -> None:
            batch = list(islice(paths, engine.max_batch))
            if batch:
                waiting.append([(path, pool.submit(_prepared, engine, path)) for path in batch])

        for _ in range(_AHEAD):
            read_ahead()
        while waiting:
            batch = [(path, future.result()) for path, future in waiting.popleft()]
            read_ahead()
            yield _judged(engine, batch)


def _prepared(engine: Engine, path: Path) -> Tensor | str:
    try:
        return engine.prepare(read_picture(path, engine.detector.image.max_bytes))
    except BadImage as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _judged(engine: Engine, batch: list[tuple[Path, Tensor | str]]) -> list[Row]:
    good = [image for _, image in batch if isinstance(image, Tensor)]
    judged = engine.judge(torch.stack(good)) if good else None
    rows, next_good = [], 0
    for path, image in batch:
        row: Row = {"path": printable(path), "error": image if isinstance(image, str) else None}
        if judged is not None and isinstance(image, Tensor):
            verdict = judged.row(next_good)
            row |= {name: verdict[name] for name in ("score", "p_value", "outlier")}
            row |= {f"part_{name}": value for name, value in verdict["parts"].items()}
            next_good += 1
        rows.append(row | {"version": engine.detector.version})
    return rows


def _count(tally: Tally, rows: list[Row], expected_rate: float) -> None:
    good = [row for row in rows if row["error"] is None]
    tally.images += len(good)
    tally.errors += len(rows) - len(good)
    tally.outliers += sum(row["outlier"] for row in good)
    tally.expected = tally.images * expected_rate


class _Table(Protocol):
    def write(self, rows: list[Row]) -> None: ...


def _columns(parts: list[str]) -> list[str]:
    return ["path", "score", "p_value", "outlier", *(f"part_{part}" for part in parts), "error", "version"]


class _Csv:
    def __init__(self, file: IO[str], parts: list[str]) -> None:
        self.writer = csv.DictWriter(file, _columns(parts), restval="")
        self.writer.writeheader()

    def write(self, rows: list[Row]) -> None:
        self.writer.writerows(rows)


class _Jsonl:
    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, rows: list[Row]) -> None:
        self.file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class _Parquet:
    def __init__(self, writer: pq.ParquetWriter) -> None:
        self.writer = writer

    def write(self, rows: list[Row]) -> None:
        self.writer.write_table(pa.Table.from_pylist(rows, schema=self.writer.schema))


@contextmanager
def _csv(path: Path, parts: list[str]) -> Iterator[_Table]:
    with path.open("w", newline="", encoding="utf-8") as file:
        yield _Csv(file, parts)


@contextmanager
def _jsonl(path: Path, parts: list[str]) -> Iterator[_Table]:  # noqa: ARG001 - rows name their own columns
    with path.open("w", encoding="utf-8") as file:
        yield _Jsonl(file)


@contextmanager
def _parquet(path: Path, parts: list[str]) -> Iterator[_Table]:
    types = {"path": pa.string(), "outlier": pa.bool_(), "error": pa.string(), "version": pa.string()}
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in _columns(parts)])
    with pq.ParquetWriter(path, schema) as writer:
        yield _Parquet(writer)


_WRITERS: dict[str, Any] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}

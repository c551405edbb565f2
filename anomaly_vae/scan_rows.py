"""Entries become rows, a table for each batch: listing, reading, decoding and judging overlap, in bounded memory."""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from anomaly_vae.engine import Engine
from anomaly_vae.entries import Entry
from anomaly_vae.errors import BadImage
from anomaly_vae.gpu_decoding import GpuDecoding, Jpeg
from anomaly_vae.judgement import Judgement
from anomaly_vae.trickling import Trickle

_AHEAD = 4
"""Batches that are listed, read and decoded while one is judged, or fewer of large pictures."""
_AHEAD_BYTES = 192 << 20
_WARM_AFTER = 1000
"""Pictures from which on it pays to warm an engine, which takes seconds."""
_CHUNK = 8
"""Files that a thread takes at once."""


@dataclass(frozen=True)
class Prepared:
    """An entry that was read: its picture, uint8 (C, H, W), or why there is none; `code`: that of a `BadImage`. `jpeg`:
    what a GPU shall make the picture of."""

    entry: Entry
    sha256: str | None
    image: Tensor | None
    error: str | None
    code: str | None = None
    jpeg: Jpeg | None = None


def schema_of(parts: Sequence[str]) -> pa.Schema:
    """The columns of results. `size` in bytes, `mtime` in seconds since 1970; what a bad file lacks is null."""
    about = [("path", pa.string()), ("size", pa.int64()), ("mtime", pa.float64()), ("sha256", pa.string())]
    verdict = [("score", pa.float64()), ("p_value", pa.float64()), ("outlier", pa.bool_())]
    columns = [*about, *verdict, *((part_name(part), pa.float64()) for part in parts)]
    return pa.schema([*columns, ("error", pa.string()), ("version", pa.string())])


def part_name(part: str) -> str:
    """The column of a part of the score."""
    return f"part_{part}"


def scored(
    engine: Engine, entries: Iterator[Entry], workers: int | None = None, decoding: GpuDecoding | None = None
) -> Iterator[pa.Table]:
    """A table for each batch of entries, in their order; a bad file is a row with its error.

    Where entries come slowly, a batch is what has come: see `trickling`. `decoding`: what the GPU decodes.
    """
    image = engine.detector.image
    of_batch = engine.max_batch * image.channels * image.height * image.width
    ahead = max(1, min(_AHEAD, _AHEAD_BYTES // of_batch))
    schema, seen = schema_of(engine.detector.spec.parts), 0
    # The entries are let go of first: whoever lists may wait for one that never comes.
    with (
        _pool(1, "list") as lister,
        _pool(workers or os.cpu_count() or 1, "decode") as pool,
        Trickle(entries) as coming,
    ):

        def listed() -> list[Future[list[Prepared]]]:
            batch = coming.take(engine.max_batch)
            chunks = [batch[i : i + _CHUNK] for i in range(0, len(batch), _CHUNK)]
            return [pool.submit(_prepared, engine, chunk, decoding) for chunk in chunks]

        waiting = deque(lister.submit(listed) for _ in range(ahead + 1))
        while chunks := waiting.popleft().result():
            batch = [one for chunk in chunks for one in chunk.result()]
            waiting.append(lister.submit(listed))
            if decoding is not None:
                batch = _finished(engine, decoding, batch)
            seen += len(batch)
            if seen > _WARM_AFTER and not engine.warmed:
                engine.warm()
            yield table_of(engine, batch, schema)


@contextmanager
def _pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    found = ThreadPoolExecutor(threads, name)
    try:
        yield found
    finally:
        found.shutdown(cancel_futures=True)


def prepared(engine: Engine, entry: Entry, decoding: GpuDecoding | None = None) -> Prepared:
    """Read one entry, and decode it unless a GPU shall."""
    most = engine.detector.image.max_bytes
    try:
        data = entry.read(most + 1)
    except OSError as error:
        return Prepared(entry, None, None, f"cannot be read: {error.strerror}")
    digest = hashlib.sha256(data).hexdigest() if len(data) <= most else None
    try:
        jpeg = decoding.begin(data) if decoding is not None else None
        return Prepared(entry, digest, engine.prepare(data) if jpeg is None else None, None, jpeg=jpeg)
    except BadImage as error:
        return Prepared(entry, digest, None, str(error), error.code)


def _prepared(engine: Engine, entries: Iterable[Entry], decoding: GpuDecoding | None) -> list[Prepared]:
    return [prepared(engine, entry, decoding) for entry in entries]


def _finished(engine: Engine, decoding: GpuDecoding, batch: Sequence[Prepared]) -> list[Prepared]:
    """The batch with all of its pictures."""
    pictures = iter(decoding.finish([one.jpeg for one in batch if one.jpeg is not None]))
    done = [one if one.jpeg is None else _with(one, next(pictures)) for one in batch]
    return [one if one.image is None else replace(one, image=one.image.to(engine.device)) for one in done]


def _with(one: Prepared, picture: Tensor | BadImage) -> Prepared:
    if isinstance(picture, BadImage):
        return replace(one, error=str(picture), code=picture.code)
    return replace(one, image=picture)


def table_of(engine: Engine, batch: Sequence[Prepared], schema: pa.Schema) -> pa.Table:
    """Judge what could be decoded; a row for each."""
    images = [one.image for one in batch if one.image is not None]
    judged = engine.judge(torch.stack(images)) if images else None
    columns: dict[str, Sequence[Any]] = {
        "path": [one.entry.path for one in batch],
        "size": [one.entry.size for one in batch],
        "mtime": [one.entry.mtime for one in batch],
        "sha256": [one.sha256 for one in batch],
        "error": [one.error for one in batch],
        "version": [engine.detector.version] * len(batch),
    }
    places = [i for i, one in enumerate(batch) if one.image is not None]
    for name in schema.names:
        if name not in columns:
            columns[name] = _spread(_verdict(judged, name), places, len(batch))
    return pa.table(columns, schema=schema)


def _verdict(judged: Judgement | None, name: str) -> Sequence[Any]:
    if judged is None:
        return ()
    return judged.parts[name.removeprefix("part_")] if name.startswith("part_") else getattr(judged, name)


def _spread(values: Sequence[Any], places: Sequence[int], count: int) -> Sequence[Any]:
    """`values` at their places, null elsewhere."""
    if len(places) == count:
        return values
    found: list[Any] = [None] * count
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found

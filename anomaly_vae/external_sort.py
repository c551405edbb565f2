"""Sorting more than memory should hold: sorted runs in temporary files, merged as they are read."""

import heapq
import struct
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import IO

_LENGTH = struct.Struct("<I")


def in_order(records: Iterable[bytes], most: int = 200_000) -> Iterator[bytes]:
    """`records` in ascending order; no more than `most` of them are in memory at a time."""
    records = iter(records)
    run = sorted(islice(records, most))
    if len(run) < most:
        yield from run
        return
    files: list[IO[bytes]] = []
    try:
        while run:
            files.append(_written(run))
            run = sorted(islice(records, most))
        yield from heapq.merge(*(_read(file) for file in files))
    finally:
        for file in files:
            file.close()


def _written(run: Iterable[bytes]) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - whoever merges closes it
    for record in run:
        file.write(_LENGTH.pack(len(record)) + record)
    file.seek(0)
    return file


def _read(file: IO[bytes]) -> Iterator[bytes]:
    while head := file.read(_LENGTH.size):
        yield file.read(_LENGTH.unpack(head)[0])

"""Moves files into other folders so that no file is ever lost, doubled or written over, whenever it is interrupted."""

import errno
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from anomaly_vae.bundle import sync_folder

_PIECE = 1 << 20


class Clash(Exception):
    """Another file took the place meanwhile; choose another."""


def free_place(wanted: Path, taken: Collection[Path] = ()) -> Path:
    """`wanted`, or with the number that makes it a name of no other file: `a-1.png`."""

    def is_free(number: int) -> bool:
        return not os.path.lexists(place := numbered(wanted, number)) and place not in taken

    low, high = -1, 0
    while not is_free(high):
        low, high = high, max(1, 2 * high)
    while high - low > 1:  # among thousands of one name not each is asked for
        middle = (low + high) // 2
        low, high = (low, middle) if is_free(middle) else (middle, high)
    return numbered(wanted, high)


def numbered(place: Path, number: int) -> Path:
    """`place` with a number behind its stem; 0 is none."""
    return place.with_name(f"{place.stem}-{number}{place.suffix}") if number else place


def moved(source: Path, place: Path, size: int, mtime: int) -> bool:
    """Move `source`, if it still has this size and time (nanoseconds), to `place`, which was free when it was chosen.

    The same call finishes a move that was cut short. False where the file is gone or another now. Raises `Clash`, and
    `OSError` where it cannot be done now.
    """
    if not _is(source, size, mtime):
        if size and _size(place) == 0:
            place.unlink()  # reserved, and then there was nothing to move
        return _size(place) == size
    place.parent.mkdir(parents=True, exist_ok=True)
    if not _reserved(place):
        if not _same(source, place, size):
            raise Clash
        source.unlink()  # an earlier copy was cut short just before this
    else:
        _put(source, place, size, mtime)
    sync_folder(source.parent)
    sync_folder(place.parent)
    return True


def _put(source: Path, place: Path, size: int, mtime: int) -> None:
    try:
        source.replace(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            if _size(place) == 0 and size:
                place.unlink()
            raise
        _copy(source, place, size, mtime)


def _copy(source: Path, place: Path, size: int, mtime: int) -> None:
    """Onto another file system."""
    partial = place.with_name(f".{place.name}.part")
    try:
        with source.open("rb") as reading, partial.open("wb") as writing:
            shutil.copyfileobj(reading, writing, _PIECE)
            writing.flush()
            shutil.copystat(source, partial)
            os.fsync(writing.fileno())
        if not _is(source, size, mtime) or _size(partial) != size:
            raise OSError(errno.EBUSY, "the file changed while it was copied")
        partial.replace(place)
    except BaseException:
        partial.unlink(missing_ok=True)
        if _size(place) == 0:
            place.unlink()
        raise
    sync_folder(place.parent)
    source.unlink()


def _reserved(place: Path) -> bool:
    """Whether the name is ours: renaming would write over a file that came there meanwhile."""
    try:
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        return _size(place) == 0  # left by an earlier go
    return True


def _is(path: Path, size: int, mtime: int) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return (found.st_size, found.st_mtime_ns) == (size, mtime)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _same(one: Path, other: Path, size: int) -> bool:
    if not size or _size(other) != size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        while piece := first.read(_PIECE):
            if piece != second.read(_PIECE):
                return False
    return True

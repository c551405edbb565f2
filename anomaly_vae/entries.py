"""`Entry`: one file of a scan's source, wherever it lies."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from anomaly_vae.images import IMAGE_SUFFIXES
from anomaly_vae.paths import printable, read_file

Read = Callable[[int], bytes]
"""The first so many bytes of a file; raises `OSError`."""


@dataclass(frozen=True)
class Entry:
    """One file. `path`: valid Unicode, and no other entry's; `size` in bytes and `mtime` in seconds, where known."""

    path: str
    size: int | None
    mtime: float | None
    read: Read


def is_picture(name: str) -> bool:
    """Whether a file's name, or its path, ends as those of pictures do; hidden files are none."""
    path = PurePosixPath(name)
    return not path.name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES


def entry_of(path: Path) -> Entry:
    """A file on disk, there or not."""
    try:
        found = path.stat()
    except OSError as error:
        return failed(printable(path), error)
    return Entry(printable(path), found.st_size, found.st_mtime, partial(read_file, path))


def failed(path: str, error: Exception) -> Entry:
    """An entry whose reading tells why there is nothing to read."""

    def read(_: int) -> bytes:
        raise as_os_error(error)

    return Entry(path, None, None, read)


def as_os_error(error: Exception) -> OSError:
    """What went wrong, in one line, as what `read` may raise."""
    if isinstance(error, OSError) and error.strerror:
        return error
    words = str(error).splitlines()
    return OSError(errno.EIO, words[0][:200] if words else type(error).__name__)


def as_it_is(path: Path) -> str:
    """A file that must not change between two goes of a scan; raises `OSError`."""
    found = path.stat()
    return f"{printable(path.absolute())} ({found.st_size} bytes of {found.st_mtime_ns})"

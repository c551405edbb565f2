"""`Entry`: one file of a scan's source, wherever it lies."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from anomaly_vae.images import IMAGE_SUFFIXES
from anomaly_vae.paths import on_disk, printable, read_file

Read = Callable[[int], bytes]
"""The first so many bytes of a file; raises `OSError`."""

Reader = Callable[[str], Read]
"""How to read the file of an entry's path; it may be sent to another machine that sees the same files."""


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


@dataclass(frozen=True)
class Failed:
    """A reading that tells why there is nothing to read."""

    error: Exception

    def __call__(self, _: int) -> bytes:
        raise as_os_error(self.error)


def failed(path: str, error: Exception) -> Entry:
    """An entry that could not even be listed."""
    return Entry(path, None, None, Failed(error))


@dataclass(frozen=True)
class DiskReader:
    """Reads files on disk; paths that are relative begin at the folder `start`."""

    start: Path

    def __call__(self, path: str) -> Read:
        return partial(read_file, self.start / on_disk(path))


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

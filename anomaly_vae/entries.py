"""`Entry`: one file of a scan's source, wherever it lies."""

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anomaly_vae.image_sniffing import IMAGE_SUFFIXES
from anomaly_vae.paths import on_disk, printable, read_file

Read = Callable[[int], bytes]
"""The first so many bytes of a file; raises `OSError`."""

Reader = Callable[[str], Read]
"""How to read the file of an entry's path; it may be sent to another machine that sees the same files."""


@dataclass(frozen=True)
class Entry:
    """One file. `path`: valid Unicode, no other file's; `size` in bytes and `mtime` in seconds, where known."""

    path: str
    size: int | None
    mtime: float | None
    read: Read


Nested = Iterator["Entry | Nested"]


def flat(entries: Nested) -> Iterator[Entry]:
    """Entries, and in the place of an iterator what it yields; folders of any depth need no recursion."""
    levels = [entries]
    while levels:
        one = next(levels[-1], None)
        if one is None:
            levels.pop()
        elif isinstance(one, Entry):
            yield one
        else:
            levels.append(one)


def is_picture(name: str) -> bool:
    """Whether a name, or a path below a source, ends as those of pictures do; what is hidden is none, nor is what lies
    in a hidden folder."""
    *folders, last = name.split("/")
    if is_hidden(last) or any(map(is_hidden, folders)):
        return False
    return f".{last.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES and "." in last


def is_hidden(name: str) -> bool:
    """Whether the name of a file or folder begins with a dot."""
    return name.startswith(".") and name not in (".", "..")


def entry_of(path: Path) -> Entry:
    """A file on disk, there or not."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # no path holds a NUL
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
    """What went wrong as what `read` may raise."""
    if isinstance(error, OSError) and error.strerror:
        return error
    return OSError(errno.EIO, words_of(error))


def words_of(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = str(error).splitlines()
    return words[0][:200].rstrip(".") if words else type(error).__name__


def as_it_is(path: Path) -> str:
    """A file that must not change between two goes of a scan; raises `OSError`."""
    found = path.stat()
    return f"{printable(path.absolute())} ({found.st_size} bytes of {found.st_mtime_ns})"

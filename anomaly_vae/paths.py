"""Paths as text: valid Unicode whatever the bytes, back again, and in one order everywhere."""

import errno
import os
import re
import stat
from pathlib import Path


def printable(path: Path | str | bytes) -> str:
    r"""A path as valid Unicode, and as no other path: bytes that are none become \xNN, a backslash two."""
    return os.fsencode(path).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def unprinted(path: str) -> str:
    """What `printable` showed."""
    return os.fsdecode(_bytes_of(path))


def on_disk(path: str) -> Path:
    """The path that `printable` showed."""
    return Path(unprinted(path))


def order_of(path: str) -> tuple[bytes, ...]:
    """What sorted sources are sorted by: the names of folders and file, as bytes. No two paths have the same."""
    return tuple(_bytes_of(path).split(b"/"))


def _bytes_of(path: str) -> bytes:
    return re.sub(rb"\\(\\|x([0-9a-f]{2}))", lambda m: bytes.fromhex(m[2].decode()) if m[2] else b"\\", path.encode())


def read_file(path: Path, most: int) -> bytes:
    """A plain file's first bytes; raises `OSError`."""
    # Not to wait for ever on a pipe that nobody writes to.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        return file.read(most)

"""Pictures in archives on disk, read where they lie. Nothing is unpacked: names of members are names only."""

import bz2
import errno
import gzip
import lzma
import math
import os
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from anomaly_vae.entries import Entry, Read, as_it_is, as_os_error, failed, is_picture
from anomaly_vae.paths import printable

_BROKEN = (
    OSError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError,
    struct.error, OverflowError,
)  # fmt: skip
"""What damaged archives, unknown compression and encryption raise."""


class Zip:
    """Pictures in a .zip, in the order of its table."""

    sorted = plain = False
    reader = None

    def __init__(self, path: Path) -> None:
        self._path, self.identity = path, as_it_is(path)

    def __iter__(self) -> Iterator[Entry]:
        try:
            archive = zipfile.ZipFile(self._path)
        except _BROKEN as error:
            yield failed(printable(self._path), error)
            return
        # Not closed here: what was listed may be read a little later.
        seen: set[str] = set()
        for member in archive.infolist():
            name = _name_of(member)
            if not member.is_dir() and is_picture(name):
                path = _own(f"{printable(self._path)}/{printable(name)}", seen)
                yield Entry(path, _size(member.file_size), None, partial(_unzipped, archive, member))


def _name_of(member: zipfile.ZipInfo) -> str:
    """A name of no stated encoding as its bytes; most who do not state it mean UTF-8."""
    if member.flag_bits & 0x800:
        return member.filename
    try:
        return os.fsdecode(member.filename.encode("cp437"))
    except UnicodeEncodeError:
        return member.filename


def _own(path: str, seen: set[str]) -> str:
    """A path that no member before has: the second "a.png" is "a.png (2)", which no picture is called."""
    own, n = path, 1
    while own in seen:
        n += 1
        own = f"{path} ({n})"
    seen.add(own)
    return own


def _size(size: int) -> int | None:
    """The size that an archive states, unless it is nonsense."""
    return size if size < 1 << 63 else None


def _unzipped(archive: zipfile.ZipFile, member: zipfile.ZipInfo, most: int) -> bytes:
    try:
        with archive.open(member) as file:
            return file.read(most)
    except _BROKEN as error:
        raise as_os_error(error) from None


class Tar:
    """Pictures in a .tar, compressed or not, in its order. It is read once, so that each is read when it is listed.

    Links in it are pictures that cannot be read.
    """

    sorted = plain = False
    reader = None

    def __init__(self, path: Path, most: int) -> None:
        self._path, self._most, self.identity = path, most, as_it_is(path)

    def __iter__(self) -> Iterator[Entry]:
        seen: set[str] = set()
        try:
            with (
                _opened(self._path) as file,
                tarfile.open(
                    fileobj=file, mode="r|", tarinfo=_Member, encoding="utf-8", errors="surrogateescape"
                ) as archive,
            ):
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined] # they would add up
                    if not member.isdir() and is_picture(member.name):
                        yield self._entry(
                            archive, member, _own(f"{printable(self._path)}/{printable(member.name)}", seen)
                        )
                while file.read(1 << 20):  # the sums over what was compressed stand behind the end marker
                    pass
        except _BROKEN as error:
            yield failed(printable(self._path), error)

    def _entry(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> Entry:
        file = archive.extractfile(member) if member.isreg() else None
        if file is None:
            what = "a link within the archive; unpack it to scan it" if member.linkname else "not a plain file"
            return failed(path, OSError(errno.EINVAL, what))
        mtime = float(member.mtime) if math.isfinite(member.mtime) else None
        return Entry(path, _size(member.size), mtime, _kept(file.read(self._most + 1)))


class _Member(tarfile.TarInfo):
    """A header whose damage is told. The standard library takes it for the end of the archive, and loses the rest."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            found = super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"it is damaged or cut short: {error}") from None
        if found.size < 0:  # it would be read over and over
            raise tarfile.ReadError("it is damaged: negative size")
        return found


_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


def _opened(path: Path) -> IO[bytes]:
    """What was compressed, of as many streams as there are one behind the other."""
    with path.open("rb") as file:
        start = file.read(6)
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), open)
    file_: IO[bytes] = opener(path, "rb")
    return file_


_IN_MEMORY = 1 << 20
"""Bytes of a picture that waits for its turn; some hundred may wait."""


def _kept(data: bytes) -> Read:
    if len(data) <= _IN_MEMORY:
        return lambda most: data[:most]
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - gone when nobody can read it any more
    file.write(data)
    return lambda most: os.pread(file.fileno(), most, 0)

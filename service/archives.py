"""Pictures out of an archive: a zip, a tar or a tar.gz on disk is read entry by entry, never unpacked to disk.

Whoever made the archive may be hostile. Names are shown back and never used as paths; what would need more memory or
work than `Bounds` allow is refused before it is spent. The tar's chain of headers is walked here because `TarFile`
reads headers of any size whole and, in some of the Python versions supported, in quadratic time.
"""

import io
import stat
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import IO, Literal

from service.errors import Problem

Kind = Literal["zip", "tar", "tar.gz"]

BLOCK = 512
"""Bytes of a tar's block; so many bytes of a file also tell what it is."""
SMALL = 256 * 1024 * 1024
"""Up to this many bytes, an archive may expand by any factor."""
CHUNK = 128 * 1024
MOST_OF_A_HEADER = 64 * 1024  # with its long name and other extensions
DIRECTORY_ENTRY = 512  # bytes of a zip's directory, on average
SHOWN = 1024  # characters of a name
_KINDS: dict[str, Kind] = {
    "application/zip": "zip",
    "application/x-zip-compressed": "zip",
    "application/x-tar": "tar",
    "application/tar": "tar",
    "application/gzip": "tar.gz",
    "application/x-gzip": "tar.gz",
    "application/x-gtar": "tar.gz",
    "application/x-tgz": "tar.gz",
}
_ANY = frozenset({"", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded"})
_OTHERS = (
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!\x1a\x07", "RAR"),
)
_JUNK = frozenset({"__macosx", "thumbs.db", "desktop.ini"})
# What the parsers of the standard library stumble over bad bytes with.
_BROKEN = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, OverflowError,
    NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """How much of an archive is read: `entries` of all kinds, bytes of one, bytes of all expanded, and until when
    (a `time.monotonic()`)."""

    entries: int
    entry_bytes: int
    expanded: int
    deadline: float

    def check(self, left: int) -> None:
        """Go on only with time, and with bytes left to expand; raises `Problem`."""
        if left < 0:
            message = (
                "the archive expands to far more than its size; store the pictures plainly, or raise max_expansion"
            )
            raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "expands_too_much", message)
        if time.monotonic() >= self.deadline:
            raise too_late()


@dataclass(frozen=True, slots=True)
class Entry:
    """One regular file of an archive, or why it cannot be had."""

    name: str
    content: bytes | Problem


def archive_kind(head: bytes, content_type: str) -> Kind | None:
    """What a body is, given its first `BLOCK` bytes and its bare content type; None: no archive. Raises `Problem`."""
    if content_type not in _ANY and content_type not in _KINDS:
        return None
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"\x1f\x8b"):
        return "tar.gz"
    for magic, name in _OTHERS:
        if head.startswith(magic):
            message = f"archives compressed by {name} are not read; send a zip, a tar or a tar.gz"
            raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_archive", message)
    if _parsed(head) is not None:
        return "tar"
    return _KINDS.get(content_type)


def entries(file: IO[bytes], kind: Kind, bounds: Bounds) -> Iterator[Entry]:
    """The regular files in the archive's order; raises `Problem` where it cannot be read on.

    Directories, links and devices are passed over, and so is what desktops leave behind: `__MACOSX`, `Thumbs.db`,
    `desktop.ini` and names that start with a dot, files and folders alike.
    """
    empty = True
    try:
        for entry in _zip(file, bounds) if kind == "zip" else _tar(file, kind == "tar.gz", bounds):
            yield entry
            empty = False
    except _BROKEN as error:
        raise _bad_archive(f"it cannot be read ({_said(error)})") from None
    if empty:
        message = "the archive holds no files, hidden ones not counted; put pictures into it"
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "empty_archive", message)


def too_late() -> Problem:
    """What ends an archive at its deadline."""
    message = "the deadline passed inside the archive; send the rest again, or allow more time"
    return Problem(HTTPStatus.GATEWAY_TIMEOUT, "deadline_exceeded", message)


def _zip(file: IO[bytes], bounds: Bounds) -> Iterator[Entry]:
    archive = zipfile.ZipFile(_Sparing(file, bounds))
    found = archive.infolist()
    if len(found) > bounds.entries:
        raise _too_many(bounds)
    left = bounds.expanded
    for info in found:
        regular = not info.filename.endswith("/") and stat.S_IFMT(info.external_attr >> 16) in {0, stat.S_IFREG}
        if not regular or _is_junk(info.filename):
            continue
        content: bytes | Problem | None = _unfit(info, bounds)
        if content is None:
            left -= info.file_size
            bounds.check(left)
            content = _unzipped(archive, info)
        yield Entry(_shown(info.filename), content)


class _Sparing:
    """What `ZipFile` reads from. It takes a zip's directory into memory whole: one too large is refused unread."""

    def __init__(self, file: IO[bytes], bounds: Bounds) -> None:
        self._file, self._bounds = file, bounds
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > max(CHUNK, self._bounds.entries * DIRECTORY_ENTRY):
            raise _too_many(self._bounds)
        return self._file.read(size)


def _unfit(info: zipfile.ZipInfo, bounds: Bounds) -> Problem | None:
    """Why an entry is not even looked into."""
    if info.flag_bits & 1:
        message = "the entry is encrypted; send an archive without a password"
        return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "encrypted_entry", message)
    if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        return _bad_entry("is compressed in an unusual way; make the zip with the method store or deflate")
    return _too_large(bounds) if info.file_size > bounds.entry_bytes else None


def _unzipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes | Problem:
    try:
        with archive.open(info) as entry:
            content = b"".join(iter(partial(entry.read, CHUNK), b""))
    except _BROKEN as error:
        return _bad_entry(f"cannot be read ({_said(error)}); make the archive again")
    if len(content) != info.file_size:
        return _bad_entry("is shorter than the archive says; make the archive again")
    return content


def _tar(file: IO[bytes], gzipped: bool, bounds: Bounds) -> Iterator[Entry]:
    tape = _Tape(file, gzipped, bounds)
    for _ in range(bounds.entries):
        header = _next_header(tape)
        if header is None:
            tape.finish()
            return
        size, padding = header.data_size, -header.data_size % BLOCK
        if not header.regular or _is_junk(header.name):
            tape.skip(size + padding)
            continue
        content: bytes | Problem
        if header.sparse or size > bounds.entry_bytes:
            tape.skip(size)
            content = (
                _bad_entry("is stored as a sparse file; store it plainly") if header.sparse else _too_large(bounds)
            )
        else:
            content = tape.take(size)
        tape.skip(padding)
        yield Entry(_shown(header.name), content)
    if _next_header(tape) is not None:
        raise _too_many(bounds)


@dataclass(frozen=True, slots=True)
class _Header:
    name: str
    regular: bool
    sparse: bool
    data_size: int


def _next_header(tape: "_Tape") -> _Header | None:
    """The next entry's header with its extensions; None at the end mark."""
    name, said, spent = None, dict[str, str](), 0
    while True:
        block = tape.take(BLOCK)
        if not any(block):
            return None
        info = _parsed(block)
        if info is None:
            raise _bad_archive("no tar header stands where one should")
        if info.type not in _EXTENSIONS:
            break
        spent += BLOCK + info.size
        if info.size < 0 or spent > MOST_OF_A_HEADER:
            raise _bad_archive("the header of an entry is too long")
        extension = tape.take(info.size)
        tape.skip(-info.size % BLOCK)
        if info.type == tarfile.GNUTYPE_LONGNAME:
            name = extension.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        elif info.type in {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}:
            said |= _pax(extension)
    sparse = info.type == tarfile.GNUTYPE_SPARSE
    more = sparse and block[482]
    while more:  # the map of an old sparse file goes on in blocks of its own
        more = tape.take(BLOCK)[504]
    has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    size = int(said.get("size", info.size)) if has_data else 0
    if size < 0:
        raise _bad_archive("an entry has a negative size")
    name = said.get("GNU.sparse.name") or said.get("path") or name or info.name
    return _Header(name, info.isreg(), sparse or any(key.startswith("GNU.sparse.") for key in said), size)


_EXTENSIONS = frozenset(
    {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
)


def _pax(extension: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE` of a POSIX header, where the length counts all of it and a newline."""
    found, place = {}, 0
    while place < len(extension):
        length = extension[place : place + 12].partition(b" ")[0]
        if not length.isdigit() or not len(length) < int(length) <= len(extension) - place:
            raise _bad_archive("an extended header is damaged")
        key, _, value = extension[place + len(length) + 1 : place + int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        place += int(length)
    return found


class _Tape:
    """A tar's bytes from first to last, inflated where need be, never more of them than the bounds allow."""

    def __init__(self, file: IO[bytes], gzipped: bool, bounds: Bounds) -> None:
        self._bytes = io.BufferedReader(_Inflated(file), CHUNK) if gzipped else file
        self._bounds, self._left = bounds, bounds.expanded if gzipped else sys.maxsize

    def take(self, size: int) -> bytes:
        """The next `size` bytes; raises `Problem` if there are fewer."""
        self._left -= size
        self._bounds.check(self._left)
        found = self._bytes.read(size)
        if len(found) < size:
            raise _bad_archive("it is cut off")
        return found

    def skip(self, size: int) -> None:
        """Pass over the next `size` bytes."""
        self._bounds.check(self._left - size)
        while size > 0:
            size -= len(self.take(min(size, CHUNK)))

    def finish(self) -> None:
        """Read the padding behind the end mark, so that a gzip's checksum, which comes last, is looked at."""
        for _ in range(16):
            if not self._bytes.read(CHUNK):
                return


class _Inflated(io.RawIOBase):
    """What a gzip file holds; no more is inflated at a time than is asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._inflate = file, zlib.decompressobj(16 + zlib.MAX_WBITS)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # this is what BufferedReader hands over
        found = b""
        while not found and not self._inflate.eof:
            fed = self._inflate.unconsumed_tail or self._file.read(CHUNK)
            found = self._inflate.decompress(fed, len(buffer))
            if not fed and not found:
                raise EOFError("the gzip is cut off")
        buffer[: len(found)] = found
        return len(found)


def _parsed(block: bytes) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None


def _is_junk(name: str) -> bool:
    parts = (part for part in name.replace("\\", "/").casefold().split("/") if part not in {"", ".", ".."})
    return any(part.startswith(".") or part in _JUNK for part in parts)


def _shown(name: str) -> str:
    """A name as JSON can say it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")[:SHOWN]


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _bad_archive(what: str) -> Problem:
    return Problem(
        HTTPStatus.UNPROCESSABLE_ENTITY, "bad_archive", f"the archive is bad: {what}; make it again and send it whole"
    )


def _bad_entry(what: str) -> Problem:
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "bad_entry", f"the entry {what}")


def _too_large(bounds: Bounds) -> Problem:
    message = f"the entry is larger than {bounds.entry_bytes} bytes; send a smaller picture, or raise max_request_bytes"
    return Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", message)


def _too_many(bounds: Bounds) -> Problem:
    message = f"the archive has more than {bounds.entries} entries; split it, or raise max_archive_entries"
    return Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_many_entries", message)

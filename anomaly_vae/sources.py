"""Where a scan's pictures come from: a folder, a pattern, a list of files, an archive, or an object store by its URL.

A source yields `Entry` after `Entry` and never holds all of them. What cannot be listed or read is an entry too:
whoever reads it gets the reason.
"""

import codecs
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from anomaly_vae.entries import (
    DiskReader,
    Entry,
    Nested,
    Reader,
    as_it_is,
    entry_of,
    failed,
    flat,
    is_hidden,
    is_picture,
    words_of,
)
from anomaly_vae.errors import DataError
from anomaly_vae.external_sort import in_order
from anomaly_vae.image_sniffing import IMAGE_SUFFIXES
from anomaly_vae.object_store import ObjectStore
from anomaly_vae.paths import printable
from anomaly_vae.source_archives import Tar, Zip

_ZIPS, _TARS, _LISTS = (".zip",), (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"), (".txt", ".lst")
_KINDS = (
    "a folder, a pattern such as 'in/**/*.png', a list of files (.txt), a .zip or .tar archive, or a URL such as "
    "s3://bucket/in"
)


class Source(Protocol):
    """`sorted`: whether entries come in the order of `order_of`, so that two listings can be merged.

    `plain`: whether entries are files on disk, at `on_disk(path)`.

    `identity`: what a scan that goes on must find unchanged.

    `reader`: how other processes read an entry by its path; None where they cannot.
    """

    @property
    def sorted(self) -> bool: ...
    @property
    def plain(self) -> bool: ...
    @property
    def identity(self) -> str: ...
    @property
    def reader(self) -> Reader | None: ...
    def __iter__(self) -> Iterator[Entry]: ...


def source_of(place: str, most: int) -> Source:
    """The source that a user means by `place`; `most`: bytes that a picture may have. Raises `DataError`."""
    place = place.removeprefix("file://")
    if "://" in place:
        return ObjectStore(place)
    if place == "-":
        return FileList(place)
    try:
        return _on_disk(Path(place).expanduser(), most)
    except (OSError, RuntimeError) as error:  # the latter: nobody's home is known by that name
        raise DataError(f"{printable(place)}: {words_of(error)}; give {_KINDS}") from None


def _on_disk(path: Path, most: int) -> Source:
    suffix = path.name.lower()
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        if glob.has_magic(str(path)):
            return Pattern(path)
        raise DataError(f"{printable(path)} does not exist; give {_KINDS}")
    if suffix.endswith(_ZIPS):
        return Zip(path)
    if suffix.endswith(_TARS):
        return Tar(path, most)
    if suffix.endswith(_LISTS):
        return FileList(str(path))
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return OneFile(path)
    raise DataError(f"{printable(path)} is no source of pictures; give {_KINDS}")


class Folder:
    """Pictures under a folder in the order of their paths, hidden ones left out.

    Links to folders are followed; no folder is listed twice, so that loops end: its first path counts.
    """

    sorted = plain = True

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def identity(self) -> str:
        return printable(self.root.absolute())

    def chosen(self, path: str) -> bool:
        """Whether a file is wanted, by its path below the folder."""
        return is_picture(path)

    @property
    def reader(self) -> Reader:
        return DiskReader(Path.cwd())

    def entered(self, path: str) -> bool:
        """Whether there may be wanted files in a folder, by its path below this one."""
        return True

    def __iter__(self) -> Iterator[Entry]:
        return flat(self._below(self.root, "", set()))

    def _below(self, folder: Path, inside: str, seen: set[tuple[int, int]]) -> Nested:
        try:
            found = folder.stat()
            if (found.st_dev, found.st_ino) in seen:
                return
            seen.add((found.st_dev, found.st_ino))
            for marked in in_order(_names(folder)):
                name = os.fsdecode(marked.rstrip(_FOLDER))
                if not marked.endswith(_FOLDER):
                    if self.chosen(inside + name):
                        yield entry_of(folder / name)
                elif self.entered(inside + name):
                    yield self._below(folder / name, f"{inside}{name}/", seen)
        except OSError as error:
            yield failed(printable(folder), error)


_FOLDER = b"\0"
"""Behind the name of a folder: less than all that a longer name could go on with, as `order_of` has it."""


def _names(folder: Path) -> Iterator[bytes]:
    with os.scandir(folder) as listed:
        for entry in listed:
            if not is_hidden(entry.name):
                yield os.fsencode(entry.name) + (_FOLDER if _is_folder(entry) else b"")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


class Pattern(Folder):
    """Files that a pattern chooses: `*` and `?` within a name, `**` over folders; hidden ones are left out."""

    def __init__(self, pattern: Path) -> None:
        # The standard library has the like of it from Python 3.13 on.
        from fsspec.utils import glob_translate

        plain = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
        super().__init__(Path(*pattern.parts[:plain]))
        parts = pattern.parts[plain:]
        self._below_root = "/".join(parts)
        # Behind ** a folder may have any name; before it, one that is not of the pattern is not even looked into.
        certain = parts.index("**") if "**" in parts else len(parts) - 1
        self._deep = "**" in parts
        try:
            self._chosen = re.compile(glob_translate(self._below_root))
            self._entered = [re.compile(glob_translate("/".join(parts[: i + 1]))) for i in range(certain)]
        except (ValueError, re.error) as error:
            raise DataError(f"{printable(pattern)}: {error}") from None
        if not self.root.is_dir():
            raise DataError(f"{printable(self.root)} is no folder; mend the pattern")

    @property
    def identity(self) -> str:
        return f"{super().identity}/{printable(self._below_root)}"

    def chosen(self, path: str) -> bool:
        return self._chosen.match(path) is not None

    def entered(self, path: str) -> bool:
        depth = path.count("/")
        return self._entered[depth].match(path) is not None if depth < len(self._entered) else self._deep


class OneFile:
    """A single file."""

    sorted, plain = False, True

    def __init__(self, path: Path) -> None:
        self._path, self.identity, self.reader = path, printable(path.absolute()), DiskReader(Path.cwd())

    def __iter__(self) -> Iterator[Entry]:
        yield entry_of(self._path)


class FileList:
    """A file with a path on each line, or with a NUL behind each (`find -print0`); `-` reads it from standard input.

    Paths are relative to the current folder, as those that `find` prints. A path that is there twice is scanned twice.
    """

    sorted, plain = False, True

    def __init__(self, place: str) -> None:
        self._place = place
        self._name = "standard input" if place == "-" else printable(place)
        listed = "-" if place == "-" else as_it_is(Path(place))
        self.identity = f"{listed}, from {printable(Path.cwd())}"
        self.reader = DiskReader(Path.cwd())

    def __iter__(self) -> Iterator[Entry]:
        try:
            with _opened(self._place) as file:
                for name in _pieces(file, self._name):
                    yield entry_of(Path(os.fsdecode(name)))
        except OSError as error:
            raise DataError(
                f"{self._name} cannot be read: {error.strerror}; mend that and repeat the command"
            ) from None


_LONGEST = 1 << 16
"""Bytes of a piece of a list; paths are far shorter."""
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MARKS = (*_WIDE, codecs.BOM_UTF8)


def _opened(place: str) -> IO[bytes]:
    """Without a buffer, so that what is there is read; not `sys.stdin`, which a thread that waits would lock."""
    return os.fdopen(os.dup(0), "rb", buffering=0) if place == "-" else Path(place).open("rb", buffering=0)


def _pieces(file: IO[bytes], name: str) -> Iterator[bytes]:
    """What stands between ends of lines, or between NULs if there is one in the beginning, each as soon as it is whole;
    empty ones are left out."""
    rest, more = b"", file.read(_LONGEST)
    while more and any(mark.startswith(rest + more) and mark != rest + more for mark in _MARKS):
        rest, more = rest + more, file.read(_LONGEST)
    rest += more
    if rest.startswith(_WIDE):
        raise DataError(f"{name} is UTF-16; save it as UTF-8")
    rest = rest.removeprefix(codecs.BOM_UTF8)
    # Of what comes by and by, a NUL or an end of line has to come before it is known which of them ends a name.
    while more and not (b"\0" in rest or b"\n" in rest or len(rest) > _LONGEST):
        more = file.read(_LONGEST)
        rest += more
    end, seen = b"\0" if b"\0" in rest else b"\n", len(rest)
    while True:
        *whole, rest = rest.split(end)
        yield from filter(None, (_stripped(piece, end) for piece in whole))
        if len(rest) > _LONGEST:
            raise DataError(f"{name} is no list of files: what stands on one line is too long for a path")
        more = file.read(_LONGEST)
        if not more:
            break
        if end == b"\n" and seen < _LONGEST and b"\0" in more[: _LONGEST - seen]:
            what = f"{name} has an end of line before its first NUL, which came later"
            raise DataError(f"{what}; write the list into a file (.txt) and scan that")
        rest, seen = rest + more, seen + len(more)
    yield from filter(None, [_stripped(rest, end)])


def _stripped(piece: bytes, end: bytes) -> bytes:
    """Without what lists from Windows have before the end of a line."""
    return piece.removesuffix(b"\r") if end == b"\n" else piece

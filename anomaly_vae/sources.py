"""Where a scan's pictures come from: a folder, a pattern, a list of files, an archive, or an object store by its URL.

A source yields `Entry` after `Entry` and never holds all of them. What cannot be listed or read is an entry too:
whoever reads it gets the reason.
"""

import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from anomaly_vae.entries import DiskReader, Entry, Reader, as_it_is, entry_of, failed, is_picture
from anomaly_vae.errors import DataError
from anomaly_vae.external_sort import in_order
from anomaly_vae.images import IMAGE_SUFFIXES
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
    path = Path(place).expanduser()
    suffix = path.name.lower()
    if "://" in place:
        return ObjectStore(place)
    if place == "-":
        return FileList(place)
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        if glob.has_magic(place):
            return Pattern(path)
        raise DataError(f"{printable(path)} does not exist; give {_KINDS}")
    if suffix.endswith(_ZIPS):
        return Zip(path)
    if suffix.endswith(_TARS):
        return Tar(path, most)
    if suffix.endswith(_LISTS):
        return FileList(place)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return Listed([path], str(path))
    raise DataError(f"{printable(path)} is no source of pictures; give {_KINDS}")


@dataclass(frozen=True)
class Folder:
    """Pictures under a folder in the order of their paths, hidden ones left out.

    Links to folders are followed; no folder is listed twice, so that loops end. `chosen`: those wanted, by their path
    below the folder.
    """

    root: Path
    chosen: Callable[[str], bool] = is_picture
    sorted = plain = True

    @property
    def identity(self) -> str:
        return printable(self.root.absolute())

    @property
    def reader(self) -> Reader:
        return DiskReader(Path.cwd())

    def __iter__(self) -> Iterator[Entry]:
        return self._below(self.root, "", set())

    def _below(self, folder: Path, inside: str, seen: set[tuple[int, int]]) -> Iterator[Entry]:
        try:
            found = folder.stat()
            if (found.st_dev, found.st_ino) in seen:
                return
            seen.add((found.st_dev, found.st_ino))
            listed = os.scandir(folder)
        except OSError as error:
            yield failed(printable(folder), error)
            return
        with listed:
            for name in in_order(_marked(entry) for entry in listed if not entry.name.startswith(".")):
                path = folder / os.fsdecode(name.rstrip(_FOLDER))
                if name.endswith(_FOLDER):
                    yield from self._below(path, f"{inside}{path.name}/", seen)
                elif self.chosen(inside + path.name):
                    yield entry_of(path)


_FOLDER = b"\0"
"""Behind the name of a folder: less than all that a longer name could go on with, as `order_of` has it."""


def _marked(entry: os.DirEntry[str]) -> bytes:
    try:
        is_folder = entry.is_dir()
    except OSError:
        is_folder = False
    return os.fsencode(entry.name) + (_FOLDER if is_folder else b"")


class Pattern(Folder):
    """Files that a pattern chooses: `*` and `?` within a name, `**` over folders; hidden ones are left out."""

    def __init__(self, pattern: Path) -> None:
        plain = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
        # The standard library has the like of it from Python 3.13 on.
        from fsspec.utils import glob_translate

        below = "/".join(pattern.parts[plain:])
        matches = re.compile(glob_translate(below)).match
        super().__init__(Path(*pattern.parts[:plain]), lambda path: matches(path) is not None)
        object.__setattr__(self, "below", below)
        if not self.root.is_dir():
            raise DataError(f"{printable(self.root)} is no folder; mend the pattern")

    below: str

    @property
    def identity(self) -> str:
        return f"{super().identity}/{self.below}"


class Listed:
    """Given files, in the order given."""

    sorted, plain = False, True

    def __init__(self, paths: Iterable[Path], identity: str) -> None:
        self._paths, self.identity, self.reader = paths, identity, DiskReader(Path.cwd())

    def __iter__(self) -> Iterator[Entry]:
        return map(entry_of, self._paths)


class FileList:
    """A file with a path on each line, or with a NUL behind each (`find -print0`); `-` reads it from standard input.

    Paths are relative to the current folder, as those that `find` prints.
    """

    sorted, plain = False, True

    def __init__(self, place: str) -> None:
        self._place, self.identity = place, "-" if place == "-" else as_it_is(Path(place).expanduser())
        self.reader = DiskReader(Path.cwd())

    def __iter__(self) -> Iterator[Entry]:
        with sys.stdin.buffer if self._place == "-" else Path(self._place).expanduser().open("rb") as file:
            for name in _pieces(file):
                yield entry_of(Path(os.fsdecode(name)).expanduser())


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    """What stands between ends of lines, or between NULs if the first piece ends in one; empty ones are left out."""
    end, rest = None, b""
    while more := file.read(1 << 16):
        rest += more
        if end is None and (b"\0" in rest or b"\n" in rest):
            end = b"\0" if b"\0" in rest else b"\n"
        *whole, rest = rest.split(end) if end else [rest]
        yield from (_stripped(piece) for piece in whole if _stripped(piece))
    if _stripped(rest):
        yield _stripped(rest)


def _stripped(piece: bytes) -> bytes:
    return piece.removesuffix(b"\r")

"""Pictures in archives on disk, read where they lie."""

import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from anomaly_vae.entries import Entry, as_it_is, as_os_error, failed, is_picture
from anomaly_vae.paths import printable

_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError)
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
        except (OSError, *_BROKEN) as error:
            yield failed(printable(self._path), error)
            return
        # Not closed here: what was listed may be read a little later.
        seen: set[str] = set()
        for member in archive.infolist():
            path = f"{printable(self._path)}/{printable(member.filename)}"
            if not member.is_dir() and is_picture(member.filename) and path not in seen:
                seen.add(path)
                yield Entry(path, member.file_size, None, partial(_unzipped, archive, member))


def _unzipped(archive: zipfile.ZipFile, member: zipfile.ZipInfo, most: int) -> bytes:
    try:
        with archive.open(member) as file:
            return file.read(most)
    except _BROKEN as error:
        raise as_os_error(error) from None


class Tar:
    """Pictures in a .tar, compressed or not, in its order. It is read once, so that each is read when it is listed."""

    sorted = plain = False
    reader = None

    def __init__(self, path: Path, most: int) -> None:
        self._path, self._most, self.identity = path, most, as_it_is(path)

    def __iter__(self) -> Iterator[Entry]:
        seen: set[str] = set()
        try:
            with tarfile.open(self._path, "r|*", errors="surrogateescape") as archive:
                for member in archive:
                    path = f"{printable(self._path)}/{printable(member.name)}"
                    file = archive.extractfile(member) if member.isreg() and path not in seen else None
                    if file is not None and is_picture(member.name):
                        seen.add(path)
                        data = file.read(self._most + 1)
                        yield Entry(path, member.size, float(member.mtime), partial(_cut, data))
        except (OSError, *_BROKEN) as error:
            yield failed(printable(self._path), error)


def _cut(data: bytes, most: int) -> bytes:
    return data[:most]

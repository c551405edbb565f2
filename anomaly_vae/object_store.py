"""Pictures in an object store, by URL: whatever fsspec knows."""

import os
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from typing import Any

from anomaly_vae.entries import Entry, Read, Reader, as_os_error, failed, is_picture
from anomaly_vae.errors import DataError
from anomaly_vae.paths import printable, unprinted


class ObjectStore:
    """Pictures below a URL that fsspec knows (s3://, gs://, az://, http:// ..), in the order of their paths.

    Keys are taken from where the store's own tools have them: environment or profile.
    """

    sorted, plain = True, False

    def __init__(self, url: str) -> None:
        import fsspec

        self._scheme = url.partition("://")[0]
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise DataError(f"{url}: {error}; for s3:// pip install 'anomaly-vae[s3]'") from None
        except ValueError as error:
            raise DataError(f"{url}: {error}; known are {', '.join(_SCHEMES)} and what else fsspec lists") from None
        self.identity = url

    @property
    def reader(self) -> Reader:
        return partial(_reading, self.identity)

    def __iter__(self) -> Iterator[Entry]:
        return self._below(self._root)

    def _below(self, folder: str) -> Iterator[Entry]:
        try:
            found = self._files.ls(folder, detail=True)
        except Exception as error:  # every store has errors of its own
            yield failed(self._shown(folder), error)
            return
        self._files.invalidate_cache(folder)
        for one in sorted(found, key=lambda one: os.fsencode(one["name"].rstrip("/"))):
            path = one["name"].rstrip("/")
            if one["type"] == "directory" and path != folder.rstrip("/"):
                yield from self._below(path)
            elif one["type"] == "file" and is_picture(path):
                read = partial(self._read, path)
                yield Entry(self._shown(path), one.get("size"), _modified(one), read)

    def read_of(self, shown: str) -> Read:
        """How to read the entry of this path."""
        return partial(self._read, unprinted(shown).removeprefix(f"{self._scheme}://"))

    def _read(self, path: str, most: int) -> bytes:
        try:
            return bytes(self._files.cat_file(path, start=0, end=most))
        except Exception as error:
            raise as_os_error(error) from None

    def _shown(self, path: str) -> str:
        return printable(f"{self._scheme}://{path.lstrip('/') if self._scheme != 'file' else path}")


def _reading(url: str, path: str) -> Read:
    # Cheap for every file: fsspec keeps one connection for each store.
    return ObjectStore(url).read_of(path)


_SCHEMES = ("s3://", "gs://", "az://", "https://", "file://", "memory://")


def _modified(found: dict[str, Any]) -> float | None:
    """Seconds since 1970, by whatever name a store tells it."""
    when = next(
        (found[name] for name in ("mtime", "LastModified", "last_modified", "updated", "created") if name in found),
        None,
    )
    if isinstance(when, int | float):
        return float(when)
    return when.timestamp() if isinstance(when, datetime) else None

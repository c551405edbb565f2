"""Pictures in an object store, by URL: whatever fsspec knows."""

import struct
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

from anomaly_vae.entries import (
    Entry,
    Nested,
    Read,
    Reader,
    as_os_error,
    failed,
    flat,
    is_hidden,
    is_picture,
    words_of,
)
from anomaly_vae.errors import DataError
from anomaly_vae.external_sort import in_order
from anomaly_vae.paths import printable, unprinted

_SCHEMES = ("s3://", "gs://", "az://", "https://", "memory://")


class ObjectStore:
    """Pictures below a URL that fsspec knows (s3://, gs://, az://, http:// ..), in the order of their paths.

    Keys are taken from where the store's own tools have them: environment or profile. Raises `DataError` where there
    is nothing to list.
    """

    sorted, plain = True, False

    def __init__(self, url: str) -> None:
        import fsspec

        self._url, self.identity = url, printable(url)
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise DataError(f"{self.identity}: {error}; for s3:// pip install 'anomaly-vae[s3]'") from None
        except ValueError as error:
            known = f"known are {', '.join(_SCHEMES)} and what else fsspec lists"
            raise DataError(f"{self.identity}: {error}; {known}") from None
        self._is_s3 = "s3" in self._files.protocol
        if self._is_s3 and not root:
            raise DataError(f"{self.identity}: name a bucket, as in s3://bucket/in")
        self._root = f"{root.rstrip('/')}/"
        self._bucket = self._files.split_path(root)[0] if self._is_s3 else ""
        try:
            self._one = self._looked_at(root)
        except Exception as error:  # every store has errors of its own
            what = f"{self.identity} cannot be listed: {words_of(error)}"
            raise DataError(f"{what}; look at its name and your keys") from None

    def _looked_at(self, root: str) -> dict[str, Any] | None:
        """What is known of a single picture; of all else, whether it can be listed."""
        if is_picture(root.rpartition("/")[2]) and self._files.isfile(root):
            found: dict[str, Any] = self._files.info(root)
            return found
        if self._is_s3:
            self._page(self._root, MaxKeys=1)
        else:
            self._files.info(root)
        return None

    @property
    def reader(self) -> Reader:
        return partial(_reading, self._url)

    def __iter__(self) -> Iterator[Entry]:
        if self._one is not None:
            return iter([self._entry(self._root[:-1], self._one.get("size"), _modified(self._one))])
        return flat(self._below(self._root, ""))

    def _entry(self, path: str, size: int | None, mtime: float | None) -> Entry:
        return Entry(self._shown(path), size, mtime, partial(_read, self._files, path))

    def _below(self, folder: str, inside: str) -> Nested:
        try:
            found = self._pages(folder) if self._is_s3 else self._listed(folder)
            for record in in_order(found):
                name, is_folder, size, mtime = _unpacked(record)
                if is_folder and not is_hidden(name):
                    yield self._below(f"{folder}{name}/", f"{inside}{name}/")
                elif not is_folder and is_picture(inside + name):
                    yield self._entry(folder + name, size, mtime)
        except Exception as error:
            yield failed(self._shown(folder.rstrip("/")), error)

    def _pages(self, folder: str) -> Iterator[bytes]:
        """What is in a folder of S3, page by page: fsspec would hold all of it, and loses names with two slashes."""
        more: dict[str, str] = {}
        start = len(folder) - len(self._bucket) - 1
        while True:
            page = self._page(folder, **more)
            for one in page.get("CommonPrefixes", ()):
                yield _packed(one["Prefix"][start:-1], True, None, None)
            for one in page.get("Contents", ()):
                if one["Key"][start:]:  # what stands for the folder itself
                    yield _packed(one["Key"][start:], False, one["Size"], one["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, folder: str, **more: Any) -> dict[str, Any]:
        prefix, always = folder.removeprefix(f"{self._bucket}/"), self._files.req_kw
        found: dict[str, Any] = self._files.call_s3(
            "list_objects_v2", Bucket=self._bucket, Prefix=prefix, Delimiter="/", **always, **more
        )
        return found

    def _listed(self, folder: str) -> Iterator[bytes]:
        """What is in a folder of any other store."""
        self._files.invalidate_cache()
        for one in self._files.ls(folder, detail=True):
            path = one["name"].rstrip("/")
            # Pages on the web name the folder above, and what is elsewhere.
            if path.startswith(folder) and path != folder:
                yield _packed(path[len(folder) :], one["type"] == "directory", one.get("size"), _modified(one))

    def _shown(self, path: str) -> str:
        return printable(self._files.unstrip_protocol(path))


def _packed(name: str, is_folder: bool, size: int | None, mtime: float | None) -> bytes:
    """A record that sorts by name, a file before the folder of its name, and a folder before all longer names."""
    known = (size is not None) + 2 * (mtime is not None)
    return name.encode("utf-8", "surrogateescape") + struct.pack("<xBBqd", is_folder, known, size or 0, mtime or 0.0)


_PACKED = struct.calcsize("<xBBqd")


def _unpacked(record: bytes) -> tuple[str, bool, int | None, float | None]:
    is_folder, known, size, mtime = struct.unpack("<xBBqd", record[-_PACKED:])
    name = record[:-_PACKED].decode("utf-8", "surrogateescape")
    return name, bool(is_folder), size if known & 1 else None, mtime if known & 2 else None


def _reading(url: str, path: str) -> Read:
    """How to read one object, on whatever machine."""
    import fsspec

    files, _ = fsspec.core.url_to_fs(url)  # cheap for every file: fsspec keeps one connection for each store
    stored = unprinted(path)
    return partial(
        _read, files, stored if "http" in files.protocol else stored.removeprefix(files.unstrip_protocol(""))
    )


def _read(files: Any, path: str, most: int) -> bytes:
    try:
        return bytes(files.cat_file(path, start=0, end=most))[:most]
    except Exception as error:
        with suppress(Exception):
            if files.size(path) == 0:
                return b""  # of which stores refuse a range
        raise as_os_error(error) from None


def _modified(found: dict[str, Any]) -> float | None:
    """Seconds since 1970, by whatever name a store tells it."""
    when = next(
        (found[name] for name in ("mtime", "LastModified", "last_modified", "updated", "created") if name in found),
        None,
    )
    if isinstance(when, int | float):
        return float(when)
    return when.timestamp() if isinstance(when, datetime) else None

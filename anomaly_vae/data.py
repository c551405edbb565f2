"""`Pictures`: what training and evaluation read. Every file is hashed and decoded once at opening, so that what cannot
be read is known before pictures are divided; small data then stays decoded in memory, larger data streams.

Streaming uses threads, not worker processes: reading, JPEG decoding and resizing run outside Python's lock, threads
start at once, and need neither a fork (unsafe after CUDA), nor a script that can be imported again (spawn), nor the
shared memory that containers keep to 64 MB.
"""

import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anomaly_vae.errors import BadImage, DataError
from anomaly_vae.images import ImageSpec, decode, encode_png, masked
from anomaly_vae.layouts import DataSpec as DataSpec
from anomaly_vae.layouts import Item as Item
from anomaly_vae.layouts import Listing, counted, shown
from anomaly_vae.listing import list_pictures as list_pictures
from anomaly_vae.seeds import content_hash
from anomaly_vae.splitting import MINIMUM_NORMALS as MINIMUM_NORMALS
from anomaly_vae.splitting import Split as Split
from anomaly_vae.splitting import folds as folds
from anomaly_vae.splitting import split as split
from anomaly_vae.splitting import units
from anomaly_vae.surveying import Survey as Survey
from anomaly_vae.surveying import spread
from anomaly_vae.surveying import suggest_image_spec as suggest_image_spec
from anomaly_vae.surveying import survey as survey

Indices: TypeAlias = npt.NDArray[np.int64]
Report: TypeAlias = Callable[[int, int], None]
T = TypeVar("T")

_TINY_BYTES = 8 * 1024
_TASK = 16  # pictures read by one task of a thread


@dataclass(frozen=True, eq=False)
class _Source:
    """What all selections share. Rows are positions in `listing`; `decoded` is (rows,C,H,W) where data is small."""

    listing: Listing
    image: ImageSpec
    workers: int
    decoded: Tensor | None

    def read(self, row: int) -> bytes:
        """The file's bytes, or a PNG of an array's picture; no more of a huge file than it takes to refuse it."""
        if self.listing.pixels is not None:
            pixels = self.listing.pixels[row]
            return encode_png(pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
        path = self.listing.items[row].path
        assert path is not None
        with path.open("rb") as file:
            return file.read(self.image.max_bytes + 1)

    def picture(self, row: int) -> Tensor:
        """uint8 (C, H, W); raises `BadImage` or `OSError`."""
        pixels, spec = self.listing.pixels, self.image
        # An array's picture that needs no change: encoding and decoding it would take longer than all the rest.
        if pixels is not None and pixels.shape[1:] == (spec.height, spec.width, *((3,) if spec.channels == 3 else ())):
            channels = pixels[row].reshape(spec.height, spec.width, spec.channels).transpose(2, 0, 1)
            return masked(torch.from_numpy(np.array(channels)), spec)
        return decode(self.read(row), spec)

    def again(self, row: int) -> Tensor:
        """Decode a picture that could be read at opening."""
        try:
            return self.picture(row)
        except (BadImage, OSError) as error:
            key = self.listing.items[row].key
            raise DataError(f"{key} has changed since it was first read: {_reason(error)}; start again") from None

    def load(self, row: int) -> "_Loaded":
        """Read, hash and decode a picture for the first time, and look whether its mask can be read."""
        item = self.listing.items[row]
        try:
            if self.listing.pixels is None:
                content = self.read(row)
                picture = decode(content, self.image)
            else:
                content, picture = self.listing.pixels[row].tobytes(), self.picture(row)
        except (BadImage, OSError) as error:
            return _Loaded(item, unreadable=_reason(error))
        hashed = content_hash(content)
        if self.decoded is not None:
            self.decoded[row] = picture
        try:
            if item.mask is not None:
                _read_mask(item.mask, self.image)
        except (BadImage, OSError) as error:
            return _Loaded(replace(item, mask=None), hashed, bad_mask=_reason(error))
        return _Loaded(item, hashed)


@dataclass(frozen=True)
class _Loaded:
    item: Item
    fingerprint: int = 0
    unreadable: str | None = None
    bad_mask: str | None = None


@dataclass(frozen=True, eq=False)
class Pictures:
    """Readable pictures in a fixed order; all indices below are positions in `items`.

    `fingerprints`: uint64 hashes (BLAKE2b) of the files' bytes, or of the pixels of array data sets. `unreadable`:
    (key, reason) of the files that were skipped. `notes`: remarks for people on what was ignored and why.
    """

    items: tuple[Item, ...]
    fingerprints: npt.NDArray[np.uint64]
    unreadable: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    _rows: Indices
    _source: _Source

    def __len__(self) -> int:
        return len(self.items)

    @property
    def image(self) -> ImageSpec:
        """The spec every picture was decoded to."""
        return self._source.image

    @property
    def cached(self) -> bool:
        """Whether decoded pictures are kept in memory."""
        return self._source.decoded is not None

    @property
    def units(self) -> Indices:
        """The unit of each picture, int64: pictures of one group, and identical ones, must never be parted."""
        return units(self.items, self.fingerprints)

    @property
    def groups(self) -> Indices | None:
        """`units` where groups are given; None where pictures stand alone, identical ones apart."""
        return self.units if any(item.group is not None for item in self.items) else None

    def select(self, indices: npt.ArrayLike) -> "Pictures":
        """These pictures, in this order; nothing is copied or read."""
        chosen = np.asarray(indices, np.int64)
        items = tuple(self.items[i] for i in chosen)
        return replace(self, items=items, fingerprints=self.fingerprints[chosen], _rows=self._rows[chosen])

    def images(self, indices: npt.ArrayLike) -> Tensor:
        """uint8 (n,C,H,W)."""
        chosen = np.asarray(indices, np.int64)
        return next((images for _, images in self.batches(max(1, len(chosen)), chosen)), self._none())

    def batches(
        self, batch_size: int, order: npt.ArrayLike | None = None, drop_last: bool = False
    ) -> Iterator[tuple[Indices, Tensor]]:
        """(indices, uint8 (n,C,H,W)) in exactly the given order, the next ones being read meanwhile."""
        chosen = np.arange(len(self)) if order is None else np.asarray(order, np.int64)
        end = len(chosen) - len(chosen) % batch_size if drop_last else len(chosen)
        starts = range(0, end, batch_size)
        if self._source.decoded is not None:
            for start in starts:
                part = chosen[start : min(start + batch_size, end)]
                yield part, self._source.decoded[torch.from_numpy(self._rows[part])]
            return
        workers = self._source.workers
        pictures = in_order(self._source.again, self._rows[chosen[:end]].tolist(), workers, batch_size)
        for start in starts:
            part = chosen[start : min(start + batch_size, end)]
            yield part, torch.stack([next(pictures) for _ in part])

    def read(self, index: int) -> bytes:
        """The bytes of the file (of a PNG, for array data sets)."""
        return self._source.read(int(self._rows[index]))

    def mask(self, index: int) -> npt.NDArray[np.bool_] | None:
        """Abnormal pixels, bool (H,W), placed as the picture is; all False for a normal picture, None if unknown."""
        item = self.items[index]
        if item.mask is not None:
            return _read_mask(item.mask, self.image)
        return np.zeros((self.image.height, self.image.width), bool) if item.normal else None

    def _none(self) -> Tensor:
        return torch.empty((0, self.image.channels, self.image.height, self.image.width), dtype=torch.uint8)


def open_pictures(root: Path | str, data: DataSpec, image: ImageSpec, progress: Report | None = None) -> Pictures:
    """List, hash and decode what `root` holds. Unreadable files are skipped and listed; `progress(done, of)` reports.

    Raises `DataError` when nothing, or nothing normal, can be read.
    """
    return open_listing(list_pictures(root, data), data, image, progress)


def open_listing(listing: Listing, data: DataSpec, image: ImageSpec, progress: Report | None = None) -> Pictures:
    """`open_pictures` of what has been listed already."""
    shape = (len(listing.items), image.channels, image.height, image.width)
    small = int(np.prod(shape, dtype=np.int64)) <= data.cache_mib * 2**20
    workers = data.workers or _suitable_workers(listing)
    source = _Source(listing, image, workers, torch.empty(shape, dtype=torch.uint8) if small else None)
    loaded = []
    for done, one in enumerate(in_order(source.load, range(len(listing.items)), workers), 1):
        loaded.append(one)
        if progress and (done % 100 == 0 or done == len(listing.items)):
            progress(done, len(listing.items))
    return _of_readable(source, loaded)


def in_order(work: Callable[[int], T], rows: Sequence[int], workers: int, ahead: int = 0) -> Iterator[T]:
    """`work` of every row by `workers` threads, yielded in the order of the rows, little more than `ahead` begun."""
    waiting: deque[Future[list[T]]] = deque()
    with ThreadPoolExecutor(workers, "pictures") as pool:
        try:
            for start in range(0, len(rows), _TASK):  # several rows a task: handing over one small picture costs more
                waiting.append(pool.submit(lambda part: [work(row) for row in part], rows[start : start + _TASK]))
                if len(waiting) >= 2 * workers + ahead // _TASK:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _suitable_workers(listing: Listing) -> int:
    """One for arrays and tiny files, whose decoding is mostly Python's and gets slower by sharing its lock."""
    paths = [listing.items[i].path for i in spread(range(len(listing.items)), 64)]
    sizes = [path.stat().st_size for path in paths if path is not None and path.is_file()]
    return 1 if sum(sizes) < len(paths) * _TINY_BYTES else min(16, os.cpu_count() or 1)


def _of_readable(source: _Source, loaded: list[_Loaded]) -> Pictures:
    rows = [row for row, one in enumerate(loaded) if one.unreadable is None]
    unreadable = tuple((one.item.key, one.unreadable) for one in loaded if one.unreadable is not None)
    normal = [one for one in loaded if one.item.normal]
    if normal and all(one.unreadable is not None for one in normal):
        key, reason = normal[0].item.key, normal[0].unreadable
        raise DataError(f"none of the {len(normal):,} normal pictures can be read; the first, {key}: {reason}")
    bad_masks = [(one.item.key, one.bad_mask) for one in loaded if one.bad_mask is not None]
    notes = [*source.listing.notes]
    if bad_masks:
        notes.append(
            f"could not read {counted(len(bad_masks), 'mask')}, such as that of {bad_masks[0][0]}: {bad_masks[0][1]}"
        )
    return Pictures(
        items=tuple(loaded[row].item for row in rows),
        fingerprints=np.array([loaded[row].fingerprint for row in rows], np.uint64),
        unreadable=unreadable,
        notes=tuple(notes),
        _rows=np.array(rows, np.int64),
        _source=source,
    )


def _read_mask(path: Path, image: ImageSpec) -> npt.NDArray[np.bool_]:
    """Any nonzero pixel is abnormal (0/1 and 0/255 masks alike; in a JPEG, more than half of its brightest).

    The mask then goes the way of the picture. A pixel is abnormal where at least half of it is, and where nothing
    reaches that, at the most covered ones, so that a thin scratch does not vanish.
    """
    from PIL import Image

    content = path.read_bytes()
    decode(content, image)  # refuses what is no picture, or too large, in the same words
    with Image.open(io.BytesIO(content)) as picture:
        values = np.asarray(picture)
        lossy = picture.format == "JPEG"
        values = values[..., :3].max(axis=2) if values.ndim == 3 else values
    binary = (values > (values.max() // 2 if lossy else 0)).astype(np.uint8) * 255
    flat = image.model_copy(update={"channels": 1, "background": (0, 0, 0), "max_bytes": 2**31})
    cover = decode(encode_png(binary), flat)[0].numpy()
    return np.asarray(cover >= max(1, min(128, int(cover.max()))), np.bool_)


def _reason(error: Exception) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else shown(str(error))

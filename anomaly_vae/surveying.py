"""A cheap look at pictures before any of them is decoded: sizes, modes, counts; and the `ImageSpec` that suits them."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from anomaly_vae.errors import BadImage, DataError
from anomaly_vae.images import ImageInfo, ImageSpec, decode, peek
from anomaly_vae.layouts import DataSpec, Item, Listing
from anomaly_vae.listing import list_pictures

_HEADER_BYTES = 64 * 1024
_SAMPLE = 500
_COLOUR_SAMPLE = 32
_GREY_TOLERANCE = 6  # levels between channels that JPEG alone can cause
_SIDES = (64, 128)
_SMALLEST = 16
_SQUARE_ENOUGH = 1.25
_LONGEST_RATIO = 8
_CANVAS_PIXELS, _LONGEST_CANVAS = 2**20, 4096


@dataclass(frozen=True)
class Survey:
    """What headers say. `counts`: pictures by label. The rest is of a sample of normals, of which `looked_at` had a
    readable header: `width` and `height` (medians, pixels, as displayed), `aspect` (median of width / height), sizes,
    formats and modes with their counts, and whether they are `grey`, if need be stored as colour.
    """

    counts: dict[str, int]
    normals: int
    looked_at: int
    width: int
    height: int
    aspect: float
    grey: bool
    sizes: dict[tuple[int, int], int]
    formats: dict[str, int]
    modes: dict[str, int]


def survey(root: Path | str, data: DataSpec) -> Survey:
    """Look at the headers of up to 500 normal pictures spread over the folder, and at the colours of 32."""
    listing = list_pictures(root, data)
    normals = [i for i, item in enumerate(listing.items) if item.normal]
    chosen = spread(normals, _SAMPLE)
    found = [(i, info) for i, info in zip(chosen, headers(listing, chosen), strict=True) if info]
    if not found:
        raise DataError(f"none of {len(chosen)} normal pictures looked at can be read; run: anomaly-vae check {root}")
    infos = [info for _, info in found]
    return Survey(
        counts=dict(sorted(Counter(item.label for item in listing.items).items())),
        normals=len(normals),
        looked_at=len(infos),
        width=round(median(info.width for info in infos)),
        height=round(median(info.height for info in infos)),
        aspect=median(info.width / info.height for info in infos),
        grey=_all_grey(listing, found),
        sizes=dict(Counter((info.width, info.height) for info in infos).most_common()),
        formats=dict(Counter(info.format for info in infos).most_common()),
        modes=dict(Counter(info.mode for info in infos).most_common()),
    )


def suggest_image_spec(survey: Survey, tile: int | None = None) -> ImageSpec:
    """About 64 or 128 pixels square, never more than the pictures have; smaller ones keep their size, from 16 on.

    Beyond an aspect ratio of 1.25 the ratio is kept, with sides that are multiples of 16 and about the same area.
    For tiles of `tile` px a side, the pictures' own ratio and size, of a megapixel at most.
    """
    if tile is not None:
        return _canvas(survey, tile)
    short = min(survey.width, survey.height)
    side = max([side for side in _SIDES if side <= short], default=max(short, _SMALLEST))
    width = height = side
    if max(survey.aspect, 1 / survey.aspect) > _SQUARE_ENOUGH:
        longer = max(survey.aspect, 1 / survey.aspect)
        short = _sixteens(side / math.sqrt(longer))
        # Of a short side that had to grow, the long one is its multiple, lest the ratio be lost.
        long = _sixteens(short * min(longer, _LONGEST_RATIO) if short == _SMALLEST else side * math.sqrt(longer))
        width, height = (long, short) if survey.aspect > 1 else (short, long)
    return ImageSpec(height=height, width=width, channels=1 if survey.grey else 3, fit="stretch")


def _canvas(survey: Survey, tile: int) -> ImageSpec:
    long, short = max(survey.width, survey.height), min(survey.width, survey.height)
    scale = min(1.0, math.sqrt(_CANVAS_PIXELS / (long * short)), _LONGEST_CANVAS / long)
    # Smaller pictures are enlarged to one tile, unless that makes their longer side too long.
    scale = max(scale, min(tile / short, _LONGEST_CANVAS / long))
    width, height = (max(tile, 8 * round(side * scale / 8)) for side in (survey.width, survey.height))
    return ImageSpec(height=height, width=width, channels=1 if survey.grey else 3, fit="stretch")


def headers(listing: Listing, rows: Sequence[int], workers: int = 8) -> Iterator[ImageInfo | None]:
    """The header of each picture of `rows`, in order; None where there is no readable one."""
    if listing.pixels is not None:
        shape = listing.pixels.shape
        info = ImageInfo("array", shape[2], shape[1], "grey" if len(shape) == 3 else "rgb", 8)
        yield from (info for _ in rows)
        return
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(rows), 4096):
            yield from pool.map(_header, (listing.items[row] for row in rows[start : start + 4096]))


def spread(rows: Sequence[int], at_most: int) -> list[int]:
    """At most `at_most` of `rows`, evenly spaced."""
    if len(rows) <= at_most:
        return list(rows)
    return [rows[int(i)] for i in np.linspace(0, len(rows) - 1, at_most).round()]


def _header(item: Item) -> ImageInfo | None:
    """From the first 64 KiB if they are enough; a long EXIF block or a TIFF may keep it at the end."""
    assert item.path is not None
    try:
        with item.path.open("rb") as file:
            start = file.read(_HEADER_BYTES)
            try:
                return peek(start)
            except BadImage:
                return peek(start + file.read())
    except (BadImage, OSError):
        return None


def _all_grey(listing: Listing, found: Sequence[tuple[int, ImageInfo]]) -> bool:
    if all(info.mode == "grey" for _, info in found):
        return True
    small = ImageSpec(height=32, width=32, channels=3, fit="stretch")
    sample = spread([i for i, info in found if info.mode != "grey"], _COLOUR_SAMPLE)
    return all(_is_grey(listing, row, small) for row in sample)


def _is_grey(listing: Listing, row: int, spec: ImageSpec) -> bool:
    path = listing.items[row].path
    if listing.pixels is not None:
        planes = listing.pixels[row].transpose(2, 0, 1).astype(np.int16)
    else:
        assert path is not None
        try:
            planes = decode(path.read_bytes(), spec).numpy().astype(np.int16)
        except (BadImage, OSError):
            return True  # says nothing about colour
    return int(np.ptp(planes, axis=0).max()) <= _GREY_TOLERANCE


def _sixteens(side: float) -> int:
    return min(512, max(16, 16 * round(side / 16)))

"""Files that a scan makes beside its table: heat maps of what is odd, and a place for what cannot be read."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from anomaly_vae.engine import Engine
from anomaly_vae.entries import Entry, entry_of
from anomaly_vae.errors import DataError
from anomaly_vae.overlaying import overlay_png
from anomaly_vae.paths import on_disk, printable
from anomaly_vae.scan_rows import prepared
from anomaly_vae.sources import Source

Keep = Literal["link", "move"]


@dataclass(frozen=True)
class Look:
    """A picture seen again: uint8 (C, H, W) with its heat (H, W), whose `scale` is painted brightest."""

    path: str
    data: bytes
    image: npt.NDArray[np.uint8]
    heat: npt.NDArray[np.float32]
    scale: float


def looks(engine: Engine, source: Source, paths: Iterable[str]) -> Iterator[Look]:
    """Pictures of a source by their paths, one by one; those that can no longer be read are left out."""
    for entry in _entries(source, list(paths)):
        most = engine.detector.image.max_bytes
        found = prepared(engine, entry)
        if found.image is not None:
            judged = engine.judge(found.image[None], heat=True)
            assert judged.heat is not None
            yield Look(entry.path, entry.read(most), found.image.numpy(), judged.heat[0], judged.heat_scale)


def _entries(source: Source, paths: list[str]) -> Iterator[Entry]:
    if source.plain:
        return (entry_of(on_disk(path)) for path in paths)
    wanted = set(paths)
    return (entry for entry in source if entry.path in wanted) if wanted else iter(())


def write_heat_maps(engine: Engine, source: Source, paths: Iterable[str], folder: Path) -> int:
    """A picture of each under its heat map, NAME.HASH.png in `folder`; how many. Raises `DataError`."""
    count = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for look in looks(engine, source, paths):
            png = overlay_png(look.heat, look.scale, engine.detector.image, look.data)
            (folder / f"{_own_name(look.path)}.png").write_bytes(png)
            count += 1
    except OSError as error:
        where = printable(folder)
        raise DataError(f"cannot write {where} ({error.strerror}); choose another --heatmaps-to") from None
    return count


def quarantine(paths: Iterable[str], folder: Path, keep: Keep) -> int:
    """Link, or move, files that cannot be read into `folder`, as NAME.HASH.ENDING; how many. Raises `DataError`."""
    count = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in map(on_disk, paths):
            place = folder / _own_name(printable(path), path.suffix)
            if not path.is_file() or os.path.lexists(place):
                continue  # a folder that cannot be listed, or an earlier go of this scan
            if keep == "move":
                shutil.move(path, place)
            else:
                place.symlink_to(path.absolute())
            count += 1
    except OSError as error:
        where = printable(folder)
        raise DataError(f"cannot put files into {where} ({error.strerror}); choose another --quarantine") from None
    return count


def _own_name(path: str, suffix: str = "") -> str:
    """A file name that no other path has."""
    stem = path.rsplit("/", 1)[-1].removesuffix(suffix)[:150]
    return f"{stem}.{hashlib.sha256(path.encode()).hexdigest()[:8]}{suffix}"

"""`--data` as a person writes it -> `Listing`: a folder, a CSV manifest, or a data set by name."""

import re
from dataclasses import replace
from pathlib import Path

from anomaly_vae.datasets import NAMES, list_named, split_name
from anomaly_vae.errors import DataError
from anomaly_vae.layouts import DataSpec, Item, Listing, counted, list_folder, shown
from anomaly_vae.manifest import find_manifest, list_manifest


def list_pictures(root: Path | str, data: DataSpec) -> Listing:
    """List what `root` holds, with groups and the official part that `data` asks for; raises `DataError`."""
    named = split_name(root)
    if named:
        listing = list_named(*named, data)
    elif data.layout == "named":
        raise DataError(f"data.layout=named needs one of {', '.join(NAMES)}, such as --data mnist:FOLDER")
    else:
        listing = _on_disk(Path(root).expanduser(), data)
    return _grouped(_one_part(listing, data), data)


def _on_disk(root: Path, data: DataSpec) -> Listing:
    if not root.exists():
        raise DataError(
            f"{shown(root)} does not exist; give a folder of pictures, a CSV manifest, or NAME:FOLDER with NAME one of "
            f"{', '.join(NAMES)}"
        )
    manifest = find_manifest(root, data)
    return list_manifest(manifest, data) if manifest else list_folder(root, data)


def _one_part(listing: Listing, data: DataSpec) -> Listing:
    if data.part == "all":
        unused = sum(1 for item in listing.items if not item.normal and item.split == "train")
        note = f"no use for {counted(unused, 'abnormal picture')} of the training part"
        return replace(listing, notes=(*listing.notes, note)) if unused else listing
    kept = [i for i, item in enumerate(listing.items) if item.split == data.part]
    if not kept:
        raise DataError(f"no picture belongs to the official part {data.part!r}; leave data.part=all")
    items = tuple(replace(listing.items[i], split=None) for i in kept)
    known = listing.known if data.part == "train" else ()
    return Listing(items, listing.notes, None if listing.pixels is None else listing.pixels[kept], known)


def _grouped(listing: Listing, data: DataSpec) -> Listing:
    """Items with the group that `data.group` finds in their key; those without a match stand alone."""
    if data.group is None:
        return listing
    pattern = re.compile(data.group)
    items = tuple(_with_group(item, pattern) for item in listing.items)
    alone = sum(1 for item in items if item.group is None)
    if alone == len(items):
        raise DataError(f"data.group={data.group!r} matches no picture, not even {items[0].key}; mend the expression")
    note = f"data.group does not match {counted(alone, 'picture')}; each stands alone"
    known = tuple(_with_group(item, pattern) for item in listing.known)
    return replace(listing, items=items, notes=(*listing.notes, note) if alone else listing.notes, known=known)


def _with_group(item: Item, pattern: re.Pattern[str]) -> Item:
    found = pattern.search(item.key)
    return replace(item, group=found[1] if found else None)

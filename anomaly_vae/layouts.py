"""Folder layouts as people have them -> `Item`s. Names are read here, never pixels."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from anomaly_vae.errors import DataError
from anomaly_vae.image_sniffing import IMAGE_SUFFIXES
from anomaly_vae.spec import Spec

Layout: TypeAlias = Literal["auto", "folder", "mvtec", "flat", "manifest", "named"]

MASK_FOLDERS = ("mask", "masks", "ground_truth")
KNOWN_ANOMALIES = "known_anomalies"
_LITTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}
_MASK_SUFFIX = re.compile(r"[_-](mask|gt|seg|label)$", re.IGNORECASE)


class DataSpec(Spec):
    """Where pictures come from and which of them are normal.

    `layout`: how the folder is organised; `auto` looks. `normal`: names of the normal folders, labels or classes.
    `part`: "train" or "test" keeps one official part alone and forgets that it was one.
    `test_fraction`: of normals, held out where there is no official test part. `group`: a regular expression searched
    in the relative path, whose first capture group says which pictures belong together. `cache_mib`: decoded pictures
    up to this size stay in memory. `workers`: reading threads; 0 takes one a CPU, at
    most 16, and a single one for tiny files.
    """

    layout: Layout = "auto"
    normal: tuple[str, ...] = ("good", "normal")
    part: Literal["all", "train", "test"] = "all"
    test_fraction: float = Field(0.2, ge=0.0, le=0.9)
    group: str | None = None
    cache_mib: int = Field(2048, ge=0)
    workers: int = Field(0, ge=0, le=256)

    @field_validator("normal", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(str(name) if isinstance(name, int) and not isinstance(name, bool) else name for name in values)

    @field_validator("normal")
    @classmethod
    def _some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(name.strip() for name in value):
            raise ValueError("name at least one normal folder, label or class, such as [good]")
        return value

    @field_validator("group")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            pattern = re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        if not pattern.groups:
            raise ValueError(f"{value!r} has no capture group; put the part that names the group in (parentheses)")
        return value

    def is_normal(self, name: str) -> bool:
        """Whether a folder or label of this name is a normal one; upper and lower case are the same."""
        return name.casefold() in {wanted.casefold() for wanted in self.normal}


@dataclass(frozen=True)
class Item:
    """One picture: where it is and what is known of it.

    `path` is None for a picture of an array; `key` is its stable relative name, always printable. `label` is the name
    of its folder or class ("good" where there is none). `split` is its official part, if it has one.
    """

    path: Path | None
    key: str
    label: str
    normal: bool
    mask: Path | None = None
    group: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Listing:
    """Items in a fixed order, remarks for people, and the uint8 pixels (N,H,W) or (N,H,W,3) of an array data set.

    `known`: known anomalies, which training alone may see; they are none of the items.
    """

    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()
    pixels: npt.NDArray[np.uint8] | None = None
    known: tuple[Item, ...] = ()


def list_folder(root: Path, data: DataSpec) -> Listing:
    """List the pictures below the folder `root`; raises `DataError` naming what to change."""
    layout = _look(root) if data.layout == "auto" else data.layout
    if layout in ("manifest", "named"):
        raise DataError(f"data.layout={layout} does not fit the folder {shown(root)}; use auto, folder, mvtec or flat")
    ignored: Counter[str] = Counter()
    if layout == "flat":
        listing = Listing(tuple(_item(root, path, "good", True) for path in _pictures(root, ignored, skip=True)))
    else:
        listing = (_mvtec if layout == "mvtec" else _kinds)(root, data, ignored)
    if not listing.items:
        raise _nothing(root)
    known = tuple(_known_anomalies(root, ignored))
    return replace(listing, notes=(*listing.notes, *_left_out(ignored), *set_aside(known)), known=known)


def set_aside(known: Sequence[Item]) -> list[str]:
    """What there is to tell people of known anomalies."""
    return [f"{KNOWN_ANOMALIES}: {counted(len(known), 'picture')}, for training alone"] if known else []


def shown(path: Path | str) -> str:
    """A path as printable text; bytes that are no UTF-8 become escapes such as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def counted(count: int, noun: str) -> str:
    """`1 picture`, `2,000 pictures`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _nothing(folder: Path) -> DataError:
    if any(folder.glob("*-ubyte*")):
        return DataError(
            f"{shown(folder)} holds no pictures but idx files; say which set: --data mnist:{shown(folder)}"
        )
    return DataError(f"{shown(folder)} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}); give another folder")


def _left_out(ignored: Counter[str]) -> Iterator[str]:
    if ignored["other"]:
        yield f"ignored {counted(ignored['other'], 'file')} of other kinds"
    if ignored["loop"]:
        yield f"did not follow {counted(ignored['loop'], 'link')} back to a folder above"
    if ignored["closed"]:
        yield f"could not open {counted(ignored['closed'], 'folder')}; check permissions"


def _look(root: Path) -> Layout:
    folders = [folder.name for folder in _subfolders(root)]
    if "train" in folders:
        return "mvtec"
    used = [name for name in folders if name.casefold() not in (*MASK_FOLDERS, KNOWN_ANOMALIES)]
    return "folder" if any(next(_walk(root / name, Counter()), None) for name in used) else "flat"


def _kinds(root: Path, data: DataSpec, ignored: Counter[str]) -> Listing:
    """`good|normal/`, any other folder a kind of abnormal, `mask/`."""
    items = list(_labelled(root, root, data, None, ignored))
    if not any(item.normal for item in items):
        raise _which_is_normal(root, data)
    loose = sum(1 for entry in _entries(root, ignored) if not entry.is_dir() and _is_picture(entry.name))
    notes = [f"ignored {counted(loose, 'picture')} beside the folders, for want of a label"] if loose else []
    return _with_masks(root, items, notes, ignored)


def _mvtec(root: Path, data: DataSpec, ignored: Counter[str]) -> Listing:
    """`train/good`, `test/<kind>`, `ground_truth/<kind>`; pictures directly in `train/` are normal."""
    items: list[Item] = []
    for folder, split in (("train", "train"), ("validation", "train"), ("val", "train"), ("test", "test")):
        items += _labelled(root, root / folder, data, split, ignored)
    if not any(item.normal for item in items):
        loose = [path for path in _pictures(root / "train", ignored) if path.parent == root / "train"]
        items = [_item(root, path, "good", True, "train") for path in loose] + items
    if not any(item.normal for item in items):
        raise _which_is_normal(root / "train", data)
    return _with_masks(root, items, [], ignored)


def _labelled(root: Path, folder: Path, data: DataSpec, split: str | None, ignored: Counter[str]) -> Iterator[Item]:
    """Items of every sub-folder of `folder`, which is their label."""
    for kind in _subfolders(folder):
        if kind.name.casefold() not in (*MASK_FOLDERS, KNOWN_ANOMALIES):
            normal = data.is_normal(kind.name)
            for path in _pictures(kind, ignored, skip=True):
                yield _item(root, path, shown(kind.name), normal, split)


def _item(root: Path, path: Path, label: str, normal: bool, split: str | None = None) -> Item:
    return Item(path, shown(path.relative_to(root).as_posix()), label, normal, split=split)


def _which_is_normal(folder: Path, data: DataSpec) -> DataError:
    names = [shown(sub.name) for sub in _subfolders(folder) if sub.name.casefold() not in MASK_FOLDERS]
    if not names:
        return DataError(
            f"{shown(folder)} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}); give another folder"
        )
    inner = [name for name in names if any((folder / name / good).is_dir() for good in ("train", *data.normal))]
    if inner:
        return DataError(
            f"{shown(folder)} holds several data sets; give one of them, such as {shown(folder / inner[0])}"
        )
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    close = [near for wanted in data.normal for near in get_close_matches(wanted, names, 1)]
    # Never a name at random: whoever followed that might train on the defects.
    guess = f" (did you mean {close[0]}?)" if close else ""
    return DataError(
        f"{shown(folder)} has the folders {listed}, none of them called {' or '.join(data.normal)}{guess}; "
        "say which is normal, -o 'data.normal=[NAME]', or -o data.layout=flat if every picture is"
    )


def _known_anomalies(root: Path, ignored: Counter[str]) -> list[Item]:
    """Pictures of `known_anomalies/<kind>/`, and those directly in it, whose kind nobody knows."""
    items = []
    for folder in _subfolders(root):
        if folder.name.casefold() == KNOWN_ANOMALIES:
            for path in _pictures(folder, ignored, skip=True):
                inner = path.relative_to(folder).parts[:-1]
                items.append(_item(root, path, shown(inner[0]) if inner else KNOWN_ANOMALIES, False))
    return [replace(item, mask=None) for item in _without_inline_masks(items)]


def _with_masks(root: Path, items: Sequence[Item], notes: Iterable[str], ignored: Counter[str]) -> Listing:
    """Give abnormal items the mask of the same name: `mask/<kind>/x.png` first, else `mask/x.png`."""
    items = _without_inline_masks(items)
    masks = _masks(root, ignored)
    if not masks:
        return Listing(tuple(items), tuple(notes))
    names = [_mask_names(root, item) for item in items]
    claims = Counter(name for item, own in zip(items, names, strict=True) if not item.normal for name in own)
    result, used, unsure = [], set(), 0
    for item, own in zip(items, names, strict=True):
        found = next((name for name in own if name in masks), None)
        used.add(found)
        if found and not item.normal:
            unsure += claims[found] > 1
            item = replace(item, mask=masks[found]) if claims[found] == 1 else item
        result.append(item)
    remarks = list(notes)
    if unsure:
        remarks.append(
            f"gave no mask to {counted(unsure, 'picture')} of a name that several kinds have; use mask/<kind>/<name>"
        )
    if spare := len(set(masks) - used):
        remarks.append(f"found no picture of the name of {counted(spare, 'mask')}")
    return Listing(tuple(result), tuple(remarks))


def _masks(root: Path, ignored: Counter[str]) -> dict[str, Path]:
    """Masks by their name below the mask folder, without extension and without a suffix such as `_mask`."""
    masks: dict[str, Path] = {}
    for folder in _subfolders(root):
        if folder.name.casefold() in MASK_FOLDERS:
            for path in _pictures(folder, ignored):
                name = path.relative_to(folder).with_suffix("").as_posix()
                masks.setdefault(_MASK_SUFFIX.sub("", name), path)
    return masks


def _mask_names(root: Path, item: Item) -> tuple[str, ...]:
    """Names under which the mask of `item` may lie, the most particular first: <kind>/sub/x, sub/x, x."""
    if item.path is None:
        return ()
    parts = item.path.relative_to(root).with_suffix("").parts[0 if item.split is None else 1 :]
    names = ("/".join(parts), "/".join(parts[1:]), parts[-1])
    return tuple(dict.fromkeys(_MASK_SUFFIX.sub("", name) for name in names))


def _without_inline_masks(items: Sequence[Item]) -> list[Item]:
    """`defect/x_mask.png` beside `defect/x.png` is the mask of the latter, not a picture."""
    by_stem = {item.path.with_suffix(""): item for item in items if item.path}
    masks: dict[Path, Path] = {}
    for stem, item in by_stem.items():
        owner = stem.with_name(re.sub(r"[_-]mask$", "", stem.name, flags=re.IGNORECASE))
        if owner != stem and owner in by_stem and item.path:
            masks[owner] = item.path
    taken = set(masks.values())
    kept = [item for item in items if item.path not in taken]
    return [replace(i, mask=masks.get(i.path.with_suffix(""))) if i.path and not i.normal else i for i in kept]


def _is_picture(name: str) -> bool:
    return name[name.rfind(".") :].casefold() in IMAGE_SUFFIXES


def _subfolders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder, Counter()) if entry.is_dir()]


def _entries(folder: Path, ignored: Counter[str]) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted by the bytes of its names, without hidden files and system litter."""
    try:
        with os.scandir(folder) as found:
            entries = [e for e in found if not e.name.startswith(".") and e.name.casefold() not in _LITTER]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        ignored["closed"] += 1
        return []
    return sorted(entries, key=lambda entry: os.fsencode(entry.name))


def _pictures(folder: Path, ignored: Counter[str], skip: bool = False) -> list[Path]:
    """Pictures at any depth in a fixed order; `skip` leaves out mask folders and known anomalies."""
    return sorted(_walk(folder, ignored, skip), key=os.fsencode)


def _walk(folder: Path, ignored: Counter[str], skip: bool = False, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Pictures at any depth. Linked folders are followed unless they lead back to a folder above."""
    here = os.path.realpath(folder)
    if here in above:
        ignored["loop"] += 1
        return
    for entry in _entries(folder, ignored):
        if entry.is_dir():
            if not (skip and entry.name.casefold() in (*MASK_FOLDERS, KNOWN_ANOMALIES)):
                yield from _walk(Path(entry.path), ignored, skip, (*above, here))
        elif _is_picture(entry.name) and (entry.is_file() or entry.is_symlink()):  # a broken link is told, not hidden
            yield Path(entry.path)
        else:
            ignored["other"] += 1

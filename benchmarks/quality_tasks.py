"""What `quality.py` measures: which pictures a detector is made from, and which it is then tested on.

Everything becomes a folder with a manifest, so that every method reads the same pictures in the same way. `dev` takes
nothing from official test parts nor from PIPED's last four papers; `test` takes the test from nowhere else.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from anomaly_vae import ConfigError, DataError
from anomaly_vae.data import list_pictures, open_pictures, split, suggest_image_spec, survey
from anomaly_vae.datasets import split_name
from anomaly_vae.image_sniffing import IMAGE_SUFFIXES
from anomaly_vae.layouts import DataSpec

T = TypeVar("T")

QUICK_TRAIN, QUICK_NORMAL, QUICK_ABNORMAL = 120, 40, 60
PAPERS_A_SPLIT = 4

ONE_CLASS = {"mnist": "MNIST one-class", "fashion_mnist": "FashionMNIST one-class", "cifar10": "CIFAR-10 one-class"}
LEAVE_ONE_OUT, PIPED, FACES, MVTEC = "MNIST leave-one-out", "PIPED", "London faces", "MVTec AD"
CONTAMINATED, FEW, SHOWN = "Contaminated training set", "Few normals", "Known anomalies"
KNOWN = (ONE_CLASS["mnist"], LEAVE_ONE_OUT, PIPED, FACES, CONTAMINATED, FEW, SHOWN,
         ONE_CLASS["fashion_mnist"], ONE_CLASS["cifar10"], MVTEC)  # fmt: skip


class AbsentError(Exception):
    """The data of a benchmark are not on this machine."""


@dataclass(frozen=True)
class Wanted:
    """What the command line says of tasks. `root` replaces the place below `data` where a set is looked for."""

    data: Path
    scratch: Path
    split: str = "dev"
    quick: bool = False
    root: Path | str | None = None
    classes: tuple[str, ...] = ()
    papers: str = ""
    limit: int | None = None
    group_sheets: bool = False
    spec: DataSpec = field(default_factory=DataSpec)

    def place(self, name: str) -> Path:
        """The folder of a data set; raises `AbsentError`."""
        folder = Path(self.root or self.data / name)
        if not folder.is_dir():
            raise AbsentError(f"there is no folder {folder}")
        return folder

    def named(self, data_set: str) -> str:
        """A data set divided otherwise than usual is another one: its figures must not stand in for the usual ones."""
        limited = f", at most {self.limit:,} training pictures" if self.limit else ""
        return data_set + limited + (", grouped by sheet" if self.group_sheets else "")


@dataclass(frozen=True, eq=False)
class Entry:
    """A picture of a task: a file, or pixels that become one. `known`: an anomaly that training is shown."""

    path: Path
    label: str
    train: bool
    mask: Path | None = None
    group: str | None = None
    pixels: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    known: bool = False

    @property
    def part(self) -> str:
        """What the manifest says of it."""
        return "known" if self.known else "train" if self.train else "test"


@dataclass(frozen=True, eq=False)
class Task:
    """One row of a data set's table. `normal`: labels of normal pictures; `split`: `only` where there is no choice."""

    data_set: str
    row: str
    split: str
    about: str
    normal: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def n_train(self) -> int:
        """Pictures that a detector is made from, those that calibrate it included."""
        return sum(entry.train for entry in self.entries)

    @property
    def overrides(self) -> list[str]:
        """Settings of a detector without which it would not read the manifest as it is meant."""
        return [f"data.normal={json.dumps(self.normal)}"]

    def digest(self) -> str:
        """Stands for the division: another picture, label, group or part gives another."""
        lines = (
            f"{e.path.name}|{e.label}|{e.train}{'|known' * e.known}|{e.group}|{e.mask is not None}"
            for e in self.entries
        )
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def write(self, folder: Path) -> Path:
        """The manifest in a new folder, and the files of pictures that were none."""
        folder.mkdir(parents=True)
        for entry in self.entries:
            if entry.pixels is not None and not entry.path.exists():
                entry.path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(entry.pixels).save(entry.path)
        with (folder / "manifest.csv").open("w", newline="", errors="surrogateescape") as file:
            lines = csv.writer(file)
            lines.writerow(("path", "label", "mask", "group", "split"))
            for entry in self.entries:
                mask = entry.mask.resolve() if entry.mask else ""
                lines.writerow((entry.path.resolve(), entry.label, mask, entry.group or "", entry.part))
        return folder


def thin(items: Sequence[T], count: int | None) -> list[T]:
    """`count` of the items at even distances, or all."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


# --- data sets of classes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classes:
    """A data set of classes, divided into what may be trained on and what is the test, both by class."""

    split: str
    made: dict[str, list[Entry]]
    test: dict[str, list[Entry]]
    chosen: tuple[str, ...]
    about: str

    def test_of(self, normal: Sequence[str], quick: bool) -> list[Entry]:
        """All test pictures; with `quick` a few normal and a few abnormal ones."""
        ours = [entry for name in self.test if name in normal for entry in self.test[name]]
        others = [entry for name in self.test if name not in normal for entry in self.test[name]]
        return [*thin(ours, QUICK_NORMAL), *thin(others, QUICK_ABNORMAL)] if quick else [*ours, *others]


def classes_of(name: str, wanted: Wanted) -> Classes:
    """`dev`: the last sixth of each class's official training pictures is the test; `test`: the official one."""
    root = f"{name}:{wanted.place(name)}"
    try:
        listing = list_pictures(root, DataSpec(normal=tuple("0123456789")))
    except DataError as error:
        raise AbsentError(str(error)) from None
    assert listing.pixels is not None
    parts: dict[tuple[str | None, str], list[Entry]] = {}
    for item, pixels in zip(listing.items, listing.pixels, strict=True):
        path = wanted.scratch / name / f"{item.key.replace('/', '-')}.png"
        parts.setdefault((item.split, item.label), []).append(Entry(path, item.label, True, pixels=pixels))
    names = sorted({label for _, label in parts})
    made, test = {}, {}
    for label in names:
        official = parts.get(("train", label), [])
        kept = len(official) - len(official) // 6 if wanted.split == "dev" else len(official)
        made[label] = official[:kept]
        held = official[kept:] if wanted.split == "dev" else parts.get(("test", label), [])
        test[label] = [replace(entry, train=False) for entry in held]
    unknown = [label for label in wanted.classes if label not in names]
    if unknown:
        raise ConfigError(f"--classes: {name} has no class {unknown[0]!r}, but {', '.join(names)}")
    tested = "the last sixth of each class's official training pictures" if wanted.split == "dev" else "its test part"
    return Classes(wanted.split, made, test, wanted.classes or tuple(names), f"tested on {tested}")


def one_class(name: str, wanted: Wanted) -> Iterator[Task]:
    """Each class in turn is normal, and all others are abnormal."""
    found = classes_of(name, wanted)
    for label in found.chosen:
        train = thin(found.made[label], QUICK_TRAIN if wanted.quick else wanted.limit)
        about = f"made from one class, all others abnormal; {found.about}"
        entries = (*train, *found.test_of([label], wanted.quick))
        yield Task(wanted.named(ONE_CLASS[name]), label, found.split, about, (label,), entries)


def leave_one_out(wanted: Wanted) -> Iterator[Task]:
    """Each digit in turn is abnormal, and the nine others are normal."""
    found = classes_of("mnist", wanted)
    limit = QUICK_TRAIN if wanted.quick else wanted.limit
    for label in found.chosen:
        normal = tuple(name for name in found.made if name != label)
        train = [entry for name in normal for entry in thin(found.made[name], limit and limit // len(normal))]
        about = f"made from nine digits, the tenth abnormal; {found.about}"
        entries = (*train, *found.test_of(normal, wanted.quick))
        yield Task(wanted.named(LEAVE_ONE_OUT), label, found.split, about, normal, entries)


# --- pictures in files ----------------------------------------------------------------------------------------------


def piped(wanted: Wanted) -> Iterator[Task]:
    """A paper's first 32 clean crops by name make the detector; the other 16 and all defective ones are the test."""
    about = "32 clean crops; tested on 16 clean and 48 defective ones"
    for paper in papers_of(wanted):
        train, test = crops_of(paper, wanted)
        yield Task(wanted.named(PIPED), paper.name, wanted.split, about, ("good",), (*train, *test))


def papers_of(wanted: Wanted) -> list[Path]:
    """The papers asked for, of the first four (`dev`) or the others (`test`)."""
    papers = sorted(path for path in wanted.place("piped").iterdir() if (path / "good").is_dir())
    if not papers:
        raise AbsentError(f"{wanted.place('piped')} holds no papers")
    own = papers[:PAPERS_A_SPLIT] if wanted.split == "dev" else papers[PAPERS_A_SPLIT:]
    if not wanted.papers:
        return own
    try:
        first, colon, end = wanted.papers.partition(":")
        span = slice(int(first or 0), int(end) if end else None) if colon else slice(int(first), int(first) + 1)
    except ValueError:
        raise ConfigError(f"--papers {wanted.papers}: write a range such as 0:4, or a number such as 2") from None
    chosen = papers[span]
    if not chosen or any(paper not in own for paper in chosen):
        held = "0:4 for --split dev" if wanted.split == "dev" else "4:8 for --split test"
        raise ConfigError(f"--papers {wanted.papers}: choose among {held}, so that no paper serves for both")
    return chosen


def crops_of(paper: Path, wanted: Wanted) -> tuple[list[Entry], list[Entry]]:
    """Those that make a paper's detector, and those that test it."""
    good, bad = _images(paper / "good"), _images(paper / "defect")
    group = {path: sheet_of(path) if wanted.group_sheets else None for path in (*good, *bad)}
    train = [Entry(path, "good", True, group=group[path]) for path in good[:32]]
    test = [Entry(path, "good", False, group=group[path]) for path in good[32:]]
    masks = {mask.stem: mask for mask in _images(paper / "mask")}
    test += [Entry(path, "defect", False, masks.get(path.stem), group[path]) for path in bad]
    return train, test


def sheet_of(path: Path) -> str:
    """All of a crop's name but the number of the crop."""
    return path.stem.rpartition("_")[0]


def faces(wanted: Wanted) -> Iterator[Task]:
    """70 neutral people make the detector; the others, neutral and smiling, are the test."""
    root = wanted.place("faces_london")
    neutral, smiling = _images(root / "neutral"), _images(root / "smiling")
    if not neutral or not smiling:
        raise AbsentError(f"{root} has no folders neutral and smiling with pictures")
    trained = {path.name for path in neutral[:70]}
    entries = [Entry(path, "neutral", path.name in trained) for path in neutral]
    entries += [Entry(path, "smiling", False) for path in smiling if path.name not in trained]
    about = "70 neutral people; tested on both pictures of the others, smiling being abnormal"
    yield Task(FACES, "smiling", "only", about, ("neutral",), tuple(entries))


def mvtec(wanted: Wanted) -> Iterator[Task]:
    """Every category, with its official training and test part."""
    root = wanted.place("mvtec")
    found = sorted(path for path in root.iterdir() if (path / "train").is_dir())
    chosen = [path for path in found if not wanted.classes or path.name in wanted.classes]
    if not chosen:
        raise AbsentError(f"{root} holds no categories with train/ and test/")
    for path in chosen:
        yield _of_folder(MVTEC, path.name, path, DataSpec(), "its official parts", wanted)


def folder(wanted: Wanted) -> Iterator[Task]:
    """Anybody's pictures, in any layout; without a test part of their own a fifth of the normals is the test.

    Of a data set by name, such as mnist:FOLDER, `dev` sees the official training part alone.
    """
    root, data = str(wanted.root), wanted.spec
    official = split_name(root) is not None and root != "digits"
    if official and wanted.split == "dev":
        data = data.model_copy(update={"part": "train"})
    name = Path(root.rpartition(":")[2]).resolve().name
    about = "its own test part, or a fifth of the normals and all that is abnormal"
    task = _of_folder(f"Folder {name}", name, root, data, about, wanted)
    yield replace(task, split=wanted.split) if official else task


def _of_folder(data_set: str, row: str, root: Path | str, data: DataSpec, about: str, wanted: Wanted) -> Task:
    pictures = open_pictures(root, data, suggest_image_spec(survey(root, data)))
    parts = split(pictures, seed=0, test_fraction=data.test_fraction)
    if not len(parts.test_normal) or not len(parts.test_abnormal):
        lacking = "abnormal" if len(parts.test_normal) else "normal"
        raise DataError(f"{root} has no {lacking} pictures to test on; give a folder that has both kinds")
    listing = list_pictures(root, data)
    arrays = [] if listing.pixels is None else zip(listing.items, listing.pixels, strict=True)
    pixels = {item.key: array for item, array in arrays}

    def entries(chosen: npt.NDArray[np.int64], train: bool, most: int) -> Iterator[Entry]:
        for i in thin(chosen.tolist(), most if wanted.quick else None):
            item = pictures.items[i]
            path = item.path or wanted.scratch / row / f"{item.key.replace('/', '-')}.png"
            yield Entry(path, item.label, train, item.mask, item.group, pixels.get(item.key))

    found = (
        *entries(parts.pool, True, QUICK_TRAIN),
        *entries(parts.test_normal, False, QUICK_NORMAL),
        *entries(parts.test_abnormal, False, QUICK_ABNORMAL),
    )
    normal = tuple(dict.fromkeys(item.label for item in pictures.items if item.normal))
    return Task(data_set, row, "only", f"tested on {about}", normal, found)


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.casefold() in IMAGE_SUFFIXES)

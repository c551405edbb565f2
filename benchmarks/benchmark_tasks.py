"""Real pictures, divided as benchmarks use them: MNIST, London faces and PIPED, as manifests in a folder.

Nothing here comes from MNIST's official test part, nor from any paper of PIPED but the first.
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from anomaly_vae.data import list_pictures
from anomaly_vae.layouts import DataSpec


@dataclass(frozen=True)
class Task:
    """A data set as it is divided here: a manifest of pictures, their labels and parts, and what is normal in it."""

    folder: Path
    normal: tuple[str, ...]
    side: int
    channels: int
    about: str

    @property
    def overrides(self) -> list[str]:
        """Settings of a detector for it; alpha is one that few pictures support, and no figure here depends on it."""
        return [
            f"image={{height: {self.side}, width: {self.side}, channels: {self.channels}}}",
            f"data.normal={json.dumps(self.normal)}",
            "calibration.few_normals=0",
            "calibration.alpha=0.25",
            "probes=0",
        ]


def mnist(source: Path, into: Path, quick: bool, classes: bool = False) -> Task:
    """Digit 3 (with `classes`: 3 and 5) of MNIST's official training part against its other digits."""
    normal = ("3", "5") if classes else ("3",)
    made, tested = (120, 40) if quick else (1000, 300)
    listing = list_pictures(f"mnist:{source}", DataSpec(normal=normal, part="train"))
    assert listing.pixels is not None
    labels = np.array([item.label for item in listing.items])
    rows = []
    for digit in "0123456789":
        if digit in normal:
            parts = ["train"] * (made // len(normal)) + ["test"] * (tested // len(normal))
        else:
            parts = ["test"] * (tested // (10 - len(normal)))
        for part, i in zip(parts, np.flatnonzero(labels == digit), strict=False):
            path = into / f"{i:05d}.png"
            Image.fromarray(listing.pixels[i]).save(path)
            rows.append((path, digit, "", part))
    _manifest(into, rows)
    named = "digits " + " and ".join(normal) if classes else f"digit {normal[0]}"
    return Task(into, normal, 32, 1, f"{named} of the training part, others of it abnormal; 32 px, grey")


def faces(source: Path, into: Path, _quick: bool) -> Task:
    """The first 70 people with a neutral face make the detector; the others are the test, smiling being abnormal."""
    rows = []
    for label in ("neutral", "smiling"):
        for i, path in enumerate(_images(source / label)):
            if i >= 70 or label == "neutral":
                rows.append((path, label, "", "test" if i >= 70 else "train"))
    _manifest(into, rows)
    return Task(into, ("neutral",), 64, 3, "70 neutral people; 32 other people neutral and smiling; 64 px, colour")


def piped(source: Path, into: Path, _quick: bool) -> Task:
    """The first paper: 32 clean crops, divided by sheet, make the detector; 16 clean and all defective are the test."""
    paper = min(path for path in source.iterdir() if path.is_dir())
    good = _images(paper / "good")
    rows = [(path, "good", path.stem.split("_")[-2], "test" if i >= 32 else "train") for i, path in enumerate(good)]
    rows += [(path, "defect", "", "test") for path in _images(paper / "defect")]
    _manifest(into, rows)
    return Task(into, ("good",), 64, 3, f"paper {paper.name}: 32 clean crops; 16 clean, 48 defective; 64 px, colour")


MAKERS: dict[str, tuple[str, Callable[[Path, Path, bool], Task]]] = {
    "mnist": ("MNIST", mnist),
    "faces_london": ("London faces", faces),
    "piped": ("PIPED", piped),
}


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))


def _manifest(folder: Path, rows: Sequence[tuple[Path, str, str, str]]) -> None:
    with (folder / "manifest.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("path", "label", "group", "split"))
        lines.writerows((str(path.resolve()), *rest) for path, *rest in rows)


def tasks_of(name: str, data: Path, scratch: Path, quick: bool) -> tuple[Task, Task | None] | None:
    """The task of a data set, and the one with normals of several classes where there is such; None without data."""
    source, make = data / name, MAKERS[name][1]
    if not source.is_dir():
        return None
    folders = scratch / name, scratch / f"{name}-classes"
    for folder in folders:
        folder.mkdir(parents=True)
    return make(source, folders[0], quick), mnist(source, folders[1], quick, True) if name == "mnist" else None

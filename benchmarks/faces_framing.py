"""What tells smiling from neutral faces without any network: where the face stands in the frame, and plain distances.

A control for the exercise on faces: a score that separates the two folders need not have seen a smile.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from anomaly_vae.data import DataSpec, Pictures, open_pictures
from anomaly_vae.errors import DataError
from anomaly_vae.presets import read_preset

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Faces:
    """Pictures of people sorted by name: positions in `pictures` of each one's neutral and smiling face."""

    pictures: Pictures
    names: list[str]
    neutral: Indices
    smiling: Indices

    def pixels(self, rows: Indices) -> Floats:
        """Pictures in [0, 1], float64 (n, C, H, W)."""
        return self.pictures.images(rows).double().numpy() / 255


def open_faces(root: Path, options: argparse.Namespace) -> Faces:
    """Everybody who is in both folders; raises `DataError` where there are none, or too few for `options`."""
    missing = [kind for kind in ("neutral", "smiling") if not (root / kind).is_dir()]
    if missing:
        raise DataError(
            f"{root} holds no {' and no '.join(f'{kind}/' for kind in missing)}; name the folder that holds neutral/ "
            "and smiling/, such as: make faces FACES=DIR"
        )
    image = read_preset("lecture-conv").image
    assert image is not None
    pictures = open_pictures(root, DataSpec(normal=("neutral",), layout="folder", test_fraction=0), image)
    of: dict[str, dict[str, int]] = {"neutral": {}, "smiling": {}}
    for i, item in enumerate(pictures.items):
        if item.path is not None and item.label in of:
            of[item.label][item.path.name] = i
    names = sorted(of["neutral"].keys() & of["smiling"].keys())
    most = max(options.first, options.people)
    if len(names) < most + 2:
        raise DataError(
            f"{root} holds {len(names)} people with one file name in neutral/ and smiling/; it takes {most + 2}: "
            "add people, or give smaller --first and --people"
        )
    rows = [np.array([of[kind][name] for name in names], np.int64) for kind in ("neutral", "smiling")]
    return Faces(pictures, names, *rows)


def separation(normal: Floats, abnormal: Floats) -> dict[str, Any]:
    """AUROC of two pictures of each person, row by row the same one, with a 95% interval over people.

    Both pictures of one are alike, so that people, not pictures, are what was drawn (Obuchowski 1997, clusters of one
    normal and one abnormal). `pairs`: how often somebody's abnormal picture scores above the same person's normal one;
    ties count half.
    """
    above = (abnormal[None] > normal[:, None]) + 0.5 * (abnormal[None] == normal[:, None])
    auroc, of_person = float(above.mean()), above.mean(0) + above.mean(1)
    reach = 1.959964 * math.sqrt(of_person.var(ddof=1) / len(normal))
    interval = [max(0.0, auroc - reach), min(1.0, auroc + reach)]
    return {"auroc": auroc, "interval": interval, "pairs": float(np.diag(above).mean())}


def plain_scores(faces: Faces, learnt: int) -> dict[str, Any]:
    """Squared distance of the other people's faces from the mean of the `learnt` ones, and from the nearest of them."""
    known = faces.pixels(faces.neutral[:learnt])

    def scores(rows: Indices) -> dict[str, Floats]:
        seen = faces.pixels(rows)
        nearest = [((known - one) ** 2).mean((1, 2, 3)).min() for one in seen]
        return {"mean_face": ((seen - known.mean(0)) ** 2).mean((1, 2, 3)), "nearest_face": np.array(nearest)}

    normal, abnormal = scores(faces.neutral[learnt:]), scores(faces.smiling[learnt:])
    return {kind: separation(normal[kind], abnormal[kind]) for kind in normal}


def shifts(faces: Faces, people: int) -> Indices:
    """How many rows lower the smiling face of each of the first people stands: where both differ least.

    Mean squared difference over the rows that both have, for shifts up to a quarter of the height either way.
    """
    neutral, smiling = (faces.pixels(rows[:people]) for rows in (faces.neutral, faces.smiling))
    height = neutral.shape[2]
    tried = range(-(height // 4), height // 4 + 1)
    errors = []
    for shift in tried:
        above, below = neutral[:, :, max(0, -shift) : height - max(0, shift)], smiling[:, :, max(0, shift) :]
        errors.append(((above - below[:, :, : above.shape[2]]) ** 2).mean((1, 2, 3)))
    return np.asarray(np.array(tried)[np.argmin(errors, 0)], np.int64)


def write_aligned(faces: Faces, shift: int, out: Path) -> Path:
    """The same faces so cropped to a square that those of both folders stand at one height, as PNGs; their folder.

    One `shift` in rows for everybody: the smiling lose it above and the neutral below, both half of it left and right.
    """
    height, width = faces.pictures.image.height, faces.pictures.image.width
    for kind, rows, lower in (("neutral", faces.neutral, min(shift, 0)), ("smiling", faces.smiling, max(shift, 0))):
        (out / kind).mkdir(parents=True, exist_ok=True)
        first = abs(lower)
        for name, row in zip(faces.names, rows, strict=True):
            path = faces.pictures.items[row].path
            assert path is not None
            with Image.open(path) as picture:
                down, across = picture.height / height, picture.width / width
                side = abs(shift) / 2 * across
                box = (side, first * down, picture.width - side, (first + height - abs(shift)) * down)
                cropped = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, box)
            cropped.save(out / kind / f"{Path(name).stem}.png")
    return out

"""The pictures that `explore` looks at: a bounded number, drawn by chance, judged and encoded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from anomaly_vae.data import Pictures
from anomaly_vae.detector import Detector
from anomaly_vae.engine import Engine
from anomaly_vae.explore_page import Sheet
from anomaly_vae.grids import arrays, sheet_jpeg, thumbnail
from anomaly_vae.latent_space import Codes, codes
from anomaly_vae.seeds import seed_of

Indices = npt.NDArray[np.int64]

MOST_LOOKED_AT = 2000
"""Of more pictures so many are drawn by chance, half of them training pictures where there are enough."""
_THUMB, _THUMBS_ACROSS = 64, 40


@dataclass(frozen=True)
class Looked:
    """Pictures looked at, row by row: position in `pictures`, code, verdict, and a thumbnail."""

    pictures: Pictures
    index: Indices
    training: npt.NDArray[np.bool_]
    codes: Codes
    score: npt.NDArray[np.float64]
    p_value: npt.NDArray[np.float64]
    outlier: npt.NDArray[np.bool_]
    sheet: Sheet

    def label(self, row: int | np.int64) -> str:
        """The folder or class of a picture."""
        return self.pictures.items[int(self.index[row])].label

    def images(self, rows: Sequence[int | np.int64] | Indices) -> Tensor:
        """uint8 (n, C, H, W)."""
        return self.pictures.images(self.index[np.asarray(rows, np.int64)])


def look_at(engine: Engine, pictures: Pictures, seed: int) -> tuple[Looked, list[str]]:
    """Judge and encode at most `MOST_LOOKED_AT` pictures, keeping numbers and thumbnails."""
    known = np.isin(pictures.fingerprints, engine.detector.seen)
    training, test = np.nonzero(known)[0], np.nonzero(~known)[0]
    share = max(MOST_LOOKED_AT // 2, MOST_LOOKED_AT - len(test))
    some_training = drawn(training, share, seed, "training")
    some_test = drawn(test, MOST_LOOKED_AT - len(some_training), seed, "test")
    order = np.concatenate([some_training, some_test])
    columns, thumbs = [], []
    for indices, images in pictures.batches(engine.max_batch, order):
        judged = engine.judge(images, classes=classes_of(engine.detector, pictures, indices))
        seen = codes_of(engine.detector, pictures, indices, images)
        columns.append((seen, judged.score, judged.p_value, judged.outlier))
        thumbs += [thumbnail(image, _THUMB) for image in arrays(images)]
    seen_codes, score, p_value, outlier = zip(*columns, strict=True)
    looked = Looked(
        pictures,
        order,
        known[order],
        Codes.join(seen_codes),
        np.concatenate(score),
        np.concatenate(p_value),
        np.concatenate(outlier),
        Sheet(sheet_jpeg(thumbs, _THUMBS_ACROSS), _THUMB, _THUMBS_ACROSS),
    )
    return looked, list(_remarks(looked, len(training), len(test)))


def classes_of(detector: Detector, pictures: Pictures, indices: Indices) -> list[str] | None:
    """The classes by which pictures are judged: their labels, where the detector wants to be told."""
    return [pictures.items[int(i)].label for i in indices] if detector.wants_classes else None


def codes_of(detector: Detector, pictures: Pictures, indices: Indices, images: Tensor) -> Codes:
    """Codes of `images` (n, C, H, W), which are those at `indices`, by the first model."""
    label = detector.numbers_of(classes_of(detector, pictures, indices))
    return codes(detector.members[0].model, images, label)


def _remarks(looked: Looked, training: int, test: int) -> Iterator[str]:
    if training + test > len(looked.index):
        yield (
            f"Of {training:,} training and {test:,} test pictures, {looked.training.sum():,} and "
            f"{(~looked.training).sum():,} were drawn by chance to be looked at."
        )
    if not training:
        yield "None of the pictures under --data is one that the detector was made from; all count as test pictures."
    if not test:
        yield "The detector was made from all pictures under --data, so there is no test picture to show."
    if looked.pictures.unreadable:
        yield f"Skipped {len(looked.pictures.unreadable):,} unreadable picture(s)."


def drawn(pool: Indices, count: int, seed: int, purpose: str) -> Indices:
    """`count` of `pool` by chance, or all, in their own order."""
    if len(pool) <= count:
        return pool
    return np.sort(np.random.default_rng(seed_of(seed, purpose, 0)).choice(pool, count, replace=False))

"""Which pictures lend their labels to a classifier and which test it: never one of each group in both."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anomaly_vae.data import Pictures
from anomaly_vae.errors import ConfigError, DataError

Indices = npt.NDArray[np.int64]

MOST_COUNTS = 10
_LEAST_TEST = 5
"""Test pictures of a class (or all there are) that must remain, or those the detector was made from are tested too."""


def label_counts(text: str) -> list[int]:
    """Read "10,50,200", ascending and each once; raises `ConfigError`."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not 0 < len(counts) <= MOST_COUNTS or counts[0] < 2:
        raise ConfigError(f"--labels {text!r}: give 1 to {MOST_COUNTS} numbers from 2 on, such as 10,50,200")
    return counts


@dataclass(frozen=True, eq=False)
class Draw:
    """Positions of labelled pictures, of which the first n are those of count n, and of test pictures.

    `seen`: how many of the test pictures the detector was made from.
    """

    labelled: Indices
    test: Indices
    seen: int


@dataclass(frozen=True, eq=False)
class Pool:
    """What is drawn from. Arrays have a row for each picture; `labels` are positions in `classes`.

    `source`: positions that labelled pictures come from; `tested`: those that test pictures come from, overlapping
    unless there is an official test part. `unit`: pictures of one group, and copies, are never parted.
    """

    classes: tuple[str, ...]
    labels: Indices
    unit: Indices
    known: npt.NDArray[np.bool_]
    source: Indices
    tested: Indices

    @classmethod
    def of(cls, pictures: Pictures, seen: npt.NDArray[np.uint64]) -> "Pool":
        """All labels count, whatever is normal. A copy of a picture is no second one."""
        names, labels = np.unique([item.label for item in pictures.items], return_inverse=True)
        first = np.sort(np.unique(pictures.fingerprints, return_index=True)[1])
        official = np.array([item.split == "test" for item in pictures.items])[first]
        inside, outside = first[official], first[~official]
        # Where the training part lacks classes (normals alone, say), the official parts cannot be kept.
        if not len(inside) or not len(names) == len(np.unique(labels[outside])) == len(np.unique(labels[inside])):
            inside = outside = first
        known = np.isin(pictures.fingerprints, seen)
        return cls(tuple(map(str, names)), labels, pictures.units, known, outside, inside)

    def draws(self, counts: Sequence[int], seeds: Sequence[int], root: str) -> list[Draw]:
        """One draw a seed; raises `DataError` where there are too few classes or pictures for `counts`."""
        if len(self.classes) < 2:
            raise DataError(f"{root} holds one class, {self.classes[0]!r}; give two or more, a folder each")
        if counts[0] < len(self.classes):
            raise DataError(
                f"{counts[0]} labels are too few for {len(self.classes)} classes; give --labels {len(self.classes)} "
                "or more, one for each"
            )
        orders = [self.order(np.random.default_rng(seed)) for seed in seeds]
        largest = min(self._largest(order) for order in orders)
        if largest < len(self.classes):
            rare = self.classes[int(np.bincount(self.labels[self.tested]).argmin())]
            raise DataError(
                f"{root} has too few pictures: each class needs one to label and another to test, which does not "
                f"share its group; the rarest is {rare!r}; add pictures or leave it out"
            )
        if counts[-1] > largest:
            raise DataError(
                f"{root} has too few pictures for {counts[-1]} labels and a test picture of each class; "
                f"--labels {largest} is the largest that works"
            )
        return [self._draw(order[: counts[-1]]) for order in orders]

    def order(self, generator: np.random.Generator) -> Indices:
        """`source` by chance, so that the first n are one of each class and then the classes in proportion.

        The proportion is Webster's, the only usual one by which a larger n never takes a picture back.
        """
        pool = generator.permutation(self.source)
        own = self.labels[pool]
        sizes = np.bincount(own, minlength=len(self.classes))
        by_class = np.argsort(own, kind="stable")
        rank = np.empty(len(pool), np.int64)
        rank[by_class] = np.arange(len(pool)) - (np.cumsum(sizes) - sizes)[own[by_class]]
        turn = np.where(rank == 0, -1.0, (2 * rank + 1) / sizes[own])
        return np.asarray(pool[np.argsort(turn, kind="stable")], np.int64)

    def _largest(self, order: Indices) -> int:
        """How many labels leave a test picture of each class: the more labels, the fewer."""
        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            enough = len(np.unique(self.labels[self._rest(order[:middle])])) == len(self.classes)
            low, high = (middle, high) if enough else (low, middle - 1)
        return low

    def _rest(self, labelled: Indices) -> Indices:
        return self.tested[~np.isin(self.unit[self.tested], self.unit[labelled])]

    def _draw(self, labelled: Indices) -> Draw:
        rest = self._rest(labelled)
        unseen = rest[~np.isin(self.unit[rest], self.unit[self.known])]
        enough, left = (np.bincount(self.labels[some], minlength=len(self.classes)) for some in (rest, unseen))
        test = unseen if (left >= np.minimum(enough, _LEAST_TEST)).all() else rest
        return Draw(labelled, test, int(self.known[test].sum()))

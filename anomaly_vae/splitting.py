"""Seeded division of pictures into train, fit, calibrate and test, by group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from anomaly_vae.errors import DataError
from anomaly_vae.layouts import Item

Indices: TypeAlias = npt.NDArray[np.int64]

MINIMUM_NORMALS = 16


class Listed(Protocol):
    """What a split looks at: the items and the hashes of their contents."""

    @property
    def items(self) -> tuple[Item, ...]: ...

    @property
    def fingerprints(self) -> npt.NDArray[np.uint64]: ...


@dataclass(frozen=True, eq=False)
class Split:
    """Ascending indices of the parts; disjoint, and but for official test parts no unit straddles two of them."""

    train: Indices
    fit: Indices
    calibrate: Indices
    test_normal: Indices
    test_abnormal: Indices

    @property
    def pool(self) -> Indices:
        """All normals outside the test: train, fit and calibrate together."""
        return np.sort(np.concatenate([self.train, self.fit, self.calibrate]))


def split(
    pictures: Listed,
    *,
    seed: int,
    test_fraction: float = 0.2,
    fit_fraction: float = 0.15,
    calibrate_fraction: float = 0.25,
    redraw: int = 0,
) -> Split:
    """Divide `pictures`; fit and calibrate are fractions of the normals outside the test.

    Official test pictures (`Item.split`) are the test as they are; else `test_fraction` of the normals is held out,
    and abnormal pictures that share a group with a training picture are left out. The test depends on `seed` alone;
    another `redraw` divides the rest anew. Raises `DataError` below 16 normals or with too few groups.
    """
    normal = np.array([item.normal for item in pictures.items], bool)
    parts = np.array([item.split or "" for item in pictures.items])
    unit = units(pictures.items, pictures.fingerprints)
    official = np.flatnonzero(normal & (parts == "test"))
    pool = np.flatnonzero(normal & (parts != "test"))
    _require(len(pool))
    if not len(official) and test_fraction > 0:
        official, pool = _allot(pool, unit[pool], (test_fraction, 1 - test_fraction), (seed, 0))
    shares = (1 - fit_fraction - calibrate_fraction, fit_fraction, calibrate_fraction)
    train, fit, calibrate = _allot(pool, unit[pool], shares, (seed, 1, redraw))
    seen = np.isin(unit, unit[pool]) & (parts != "test")
    abnormal = np.flatnonzero(~normal & (parts != "train") & ~seen)
    return Split(train, fit, calibrate, official, abnormal)


def folds(indices: npt.ArrayLike, groups: Sequence[object] | Indices | None, k: int, seed: int) -> list[Indices]:
    """Divide `indices` into k parts of about equal size; `groups`, one an index (None stands alone), never straddle."""
    chosen = np.asarray(indices, np.int64)
    if groups is None:
        unit = np.arange(len(chosen))
    else:
        names: dict[object, int] = {}
        each = (("alone", i) if group is None else group for i, group in enumerate(groups))
        unit = np.array([names.setdefault(name, len(names)) for name in each], np.int64)
    if len(unit) != len(chosen):
        raise ValueError(f"{len(unit)} groups for {len(chosen)} indices; give one group an index")
    return _allot(chosen, unit, (1 / k,) * k, (seed, 2))


def units(items: Sequence[Item], fingerprints: npt.NDArray[np.uint64]) -> Indices:
    """The number of each item's unit: items linked by a common group or by identical content, chains included."""
    names: dict[str, int] = {}
    content = np.unique(fingerprints, return_inverse=True)[1].reshape(-1)
    grouped = [i for i, item in enumerate(items) if item.group is not None]
    group = [names.setdefault(items[i].group or "", len(names)) for i in grouped]
    n, contents = len(items), int(content.max(initial=-1)) + 1
    ends = np.concatenate([n + content, n + contents + np.array(group, np.int64)])
    starts = np.concatenate([np.arange(n), np.array(grouped, np.int64)])
    size = n + contents + len(names)
    graph = coo_array((np.ones(len(starts), np.int8), (starts, ends)), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1][:n], np.int64)


def _require(normals: int) -> None:
    if normals < MINIMUM_NORMALS:
        raise DataError(
            f"{normals} normal pictures are too few to train and calibrate on; it takes at least {MINIMUM_NORMALS} "
            f"outside the official test part: add {MINIMUM_NORMALS - normals} or more"
        )


def _allot(indices: Indices, unit: Indices, shares: Sequence[float], seed: tuple[int, ...]) -> list[Indices]:
    """Deal whole units, shuffled, to the part that is furthest behind its share; every part gets at least one."""
    names, member, sizes = np.unique(unit, return_inverse=True, return_counts=True)
    if len(names) < len(shares):
        raise DataError(
            f"the normal pictures fall into {len(names)} groups and identical pictures; dividing them takes at least "
            f"{len(shares)}: add pictures of other groups, or make data.group finer"
        )
    filled = [0.0] * len(shares)
    part = np.zeros(len(names), np.int64)
    preference = sorted(range(len(shares)), key=lambda p: -shares[p])
    for name in np.random.default_rng(seed).permutation(len(names)):
        part[name] = behind = min(preference, key=filled.__getitem__)
        filled[behind] += sizes[name] / shares[behind]
    belongs = part[member.reshape(-1)]
    return [np.sort(indices[belongs == p]) for p in range(len(shares))]

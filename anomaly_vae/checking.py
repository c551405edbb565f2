"""The verb `check`: what is wrong with a folder of pictures, before any training."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from anomaly_vae.calibration import Calibration, Mode, normals_needed
from anomaly_vae.data import Pictures, open_listing
from anomaly_vae.dividing import blank_calibration, divide, group_count, made_from
from anomaly_vae.errors import CalibrationError, DataError
from anomaly_vae.images import ImageInfo, ImageSpec
from anomaly_vae.layouts import DataSpec, Item, shown
from anomaly_vae.listing import list_pictures
from anomaly_vae.recipe import DetectorSpec
from anomaly_vae.similarity import UNUSUAL, near_pairs, unusual
from anomaly_vae.surveying import headers, spread

SEARCH_LIMIT = 100_000
"""Near-duplicates and suspects are looked for among at most so many pictures, evenly spaced."""

_THUMBNAIL = ImageSpec(height=32, width=32, channels=3, fit="stretch")
_SHOWN = 5
_Edge: TypeAlias = tuple[int, int, float]


@dataclass(frozen=True)
class Label:
    """How many readable pictures bear a label."""

    name: str
    normal: bool
    pictures: int


@dataclass(frozen=True)
class Pair:
    """Two nearly equal pictures; `similarity` 1 is the same picture."""

    first: str
    second: str
    similarity: float


@dataclass(frozen=True)
class Leak:
    """Two equal (`similarity` 1) or nearly equal pictures on two sides that must have nothing in common."""

    between: str
    first: str
    second: str
    similarity: float


@dataclass(frozen=True)
class Suspect:
    """A picture called normal that is unlike the other normals, by so many robust standard deviations."""

    key: str
    deviation: float


@dataclass(frozen=True)
class Outlook:
    """What training on these pictures could promise: calibration images and the smallest alpha of both modes.

    `folds`: number of models where normals are few. `bound`: what the rate at alpha `average` is proven not to exceed.
    None for an alpha that cannot be had; `problem` says why nothing can.
    """

    normals: int
    test_normals: int
    calibration: int
    folds: int | None
    average: float | None
    bound: float | None
    guaranteed: float | None
    problem: str | None = None


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. Lists of pairs are cut at 10,000; `near_total` counts all nearly equal pairs."""

    root: str
    labels: tuple[Label, ...]
    grouped: bool
    unreadable: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    sizes: dict[str, int]
    formats: dict[str, int]
    modes: dict[str, int]
    tell_tales: tuple[str, ...]
    duplicates: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[Pair, ...]
    near_total: int
    near_searched: int
    leaks: tuple[Leak, ...]
    suspects: tuple[Suspect, ...]
    outlook: Outlook

    @property
    def pictures(self) -> int:
        """Number of readable pictures."""
        return sum(label.pictures for label in self.labels)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {"pictures": self.pictures, **asdict(self)}

    def lines(self) -> list[str]:
        """The report for people, most important findings last."""
        return list(_lines(self))


def check(root: Path | str, data: DataSpec, progress: Callable[[int, int], None] | None = None) -> CheckReport:
    """Read every picture once and report; raises `DataError` where there is nothing to report on."""
    listing = list_pictures(root, data)
    pictures = open_listing(listing, data.model_copy(update={"cache_mib": 2**31}), _THUMBNAIL, progress)
    infos = dict(zip((i.key for i in listing.items), headers(listing, range(len(listing.items))), strict=True))
    searched = np.array(spread(range(len(pictures)), SEARCH_LIMIT), np.int64)
    near, total = _near(pictures, searched)
    same = _identical(pictures)
    keys = [item.key for item in pictures.items]
    return CheckReport(
        root=shown(str(root)),
        labels=_labels(pictures.items),
        grouped=pictures.groups is not None,
        unreadable=pictures.unreadable,
        notes=pictures.notes,
        sizes=_count(infos, pictures.items, _size),
        formats=_count(infos, pictures.items, _format),
        modes=_count(infos, pictures.items, _mode),
        tell_tales=tuple(_tell_tales(infos, pictures.items)),
        duplicates=tuple(tuple(keys[i] for i in group) for group in same),
        near_duplicates=tuple(Pair(keys[a], keys[b], value) for a, b, value in near),
        near_total=total,
        near_searched=len(searched),
        leaks=tuple(_leaks(pictures.items, [*_edges(same), *near])),
        suspects=tuple(_suspects(pictures)),
        outlook=_outlook(pictures, data),
    )


def _labels(items: Sequence[Item]) -> tuple[Label, ...]:
    counts = Counter((not item.normal, item.label) for item in items)
    return tuple(Label(name, not abnormal, count) for (abnormal, name), count in sorted(counts.items()))


def _size(info: ImageInfo) -> str:
    return f"{info.width}x{info.height}"


def _format(info: ImageInfo) -> str:
    return info.format


def _mode(info: ImageInfo) -> str:
    return f"{info.mode} {info.bit_depth}-bit"


def _count(infos: dict[str, ImageInfo | None], items: Sequence[Item], of: Callable[[ImageInfo], str]) -> dict[str, int]:
    found = (infos[item.key] for item in items)
    return dict(Counter(of(info) for info in found if info).most_common())


def _tell_tales(infos: dict[str, ImageInfo | None], items: Sequence[Item]) -> Iterator[str]:
    """Formats, modes or sizes that give the answer away: none of the normals' occurs among the abnormal."""
    normal = [item for item in items if item.normal]
    abnormal = [item for item in items if not item.normal]
    for what, of in (("sizes", _size), ("formats", _format), ("modes", _mode)):
        one, other = _count(infos, normal, of), _count(infos, abnormal, of)
        if one and other and not set(one) & set(other):
            yield f"normal and abnormal pictures have different {what}: {_few(one)} against {_few(other)}"


def _identical(pictures: Pictures) -> list[npt.NDArray[np.int64]]:
    """Indices of pictures with the same content, a group each."""
    order = np.argsort(pictures.fingerprints, kind="stable")
    cuts = np.flatnonzero(np.diff(pictures.fingerprints[order])) + 1
    return sorted((group for group in np.split(order, cuts) if len(group) > 1), key=lambda group: int(group[0]))


def _edges(same: Sequence[npt.NDArray[np.int64]]) -> Iterator[_Edge]:
    """Each copy against the next: if a group lies on two sides, some neighbours do."""
    for group in same:
        yield from ((int(a), int(b), 1.0) for a, b in pairwise(group))


def _near(pictures: Pictures, searched: npt.NDArray[np.int64]) -> tuple[list[_Edge], int]:
    """Nearly equal pictures that are not identical files."""
    found = near_pairs(pictures.images(searched).numpy())
    first, second = searched[found.first], searched[found.second]
    other = pictures.fingerprints[first] != pictures.fingerprints[second]
    rows = zip(first[other].tolist(), second[other].tolist(), found.similarity[other].tolist(), strict=True)
    return [(a, b, round(min(value, 1.0), 4)) for a, b, value in rows], found.total - int((~other).sum())


def _leaks(items: Sequence[Item], edges: Sequence[_Edge]) -> Iterator[Leak]:
    for a, b, similarity in edges:
        one, other = items[a], items[b]
        if one.normal != other.normal:
            yield Leak("normal and abnormal", one.key, other.key, similarity)
        if one.split and other.split and one.split != other.split:
            yield Leak("train and test", one.key, other.key, similarity)
        if one.group is not None and other.group is not None and one.group != other.group:
            yield Leak("two groups", one.key, other.key, similarity)


def _suspects(pictures: Pictures) -> Iterator[Suspect]:
    normal = np.array(spread([i for i, item in enumerate(pictures.items) if item.normal], SEARCH_LIMIT), np.int64)
    deviation = unusual(pictures.images(normal).numpy())
    for i in np.argsort(-deviation, kind="stable"):
        if deviation[i] <= UNUSUAL:
            return
        yield Suspect(pictures.items[normal[i]].key, round(float(deviation[i]), 1))


def _outlook(pictures: Pictures, data: DataSpec) -> Outlook:
    """The division that `train` would make with its default fractions, and what its calibration images support."""
    normals = sum(item.normal for item in pictures.items)
    try:
        parts, crossed = divide(DetectorSpec(data=data), pictures)
    except DataError as error:
        return Outlook(normals, 0, 0, None, None, None, None, str(error))
    calibration = blank_calibration(parts, group_count(pictures, parts))
    average = _smallest(calibration, "average")
    return Outlook(
        normals,
        normals - len(made_from(parts)),
        calibration.n,
        len(parts) if crossed else None,
        average,
        None if average is None else calibration.promise(average).bound,
        _smallest(calibration, "guaranteed"),
    )


def _smallest(calibration: Calibration, mode: Mode) -> float | None:
    try:
        alpha = calibration.smallest_alpha(mode)
        calibration.rank(alpha, mode)
    except CalibrationError:
        return None
    return alpha


def _lines(report: CheckReport) -> Iterator[str]:
    yield f"{report.root}: {report.pictures:,} readable pictures"
    for label in report.labels:
        yield f"  {label.name}: {label.pictures:,} {'normal' if label.normal else 'abnormal'}"
    for what, found in (("size", report.sizes), ("format", report.formats), ("mode", report.modes)):
        yield f"{what}: {_few(found)}" if len(found) == 1 else f"mixed {what}s: {_few(found)}"
    yield from (f"note: {note}" for note in report.notes)
    yield from _listed("unreadable, skipped", [f"{key}: {reason}" for key, reason in report.unreadable])
    yield from _listed("groups of identical files", [" = ".join(group[:6]) for group in report.duplicates])
    yield from _near_lines(report)
    yield from _listed(
        f"suspect normals, unlike the others by more than {UNUSUAL:g} robust standard deviations (look at them)",
        [f"{suspect.key} ({suspect.deviation:.1f})" for suspect in report.suspects],
    )
    yield from (f"giveaway: {tell}; a detector may learn just that" for tell in report.tell_tales)
    yield from _leak_lines(report)
    yield from _outlook_lines(report.outlook, report.grouped)


def _near_lines(report: CheckReport) -> Iterator[str]:
    rows = [f"{pair.first} ~ {pair.second} ({pair.similarity:.3f})" for pair in report.near_duplicates]
    yield from _listed("pairs of nearly equal pictures (similarity, 1 is the same)", rows, report.near_total)
    if rows and not report.grouped:
        yield "  pictures of one thing belong in one part: name their group by data.group or a manifest"
    if report.near_searched < report.pictures:
        yield f"nearly equal pictures and suspects were looked for among {report.near_searched:,}, evenly spaced"


def _leak_lines(report: CheckReport) -> Iterator[str]:
    remedy = {
        "normal and abnormal": "one of the two is in the wrong folder, or the defect is too small to see at 32 pixels",
        "train and test": "a test on pictures seen in training proves nothing; remove them from one side",
        "two groups": "they are likely of one thing; give them one group",
    }
    for between, advice in remedy.items():
        leaks = [leak for leak in report.leaks if leak.between == between]
        rows = [f"{leak.first} {'=' if leak.similarity == 1 else '~'} {leak.second}" for leak in leaks]
        yield from _listed(f"leaks between {between} ({advice})", rows)


def _outlook_lines(outlook: Outlook, grouped: bool) -> Iterator[str]:
    if outlook.problem:
        yield f"not enough to train on: {outlook.problem}"
        return
    if outlook.folds:
        how = f"{outlook.calibration:,} by {outlook.folds}-fold cross-calibration, since they are few"
    else:
        how = f"{outlook.calibration:,} are kept from training for it"
    yield f"calibration: of {outlook.normals:,} normals {how}; {outlook.test_normals:,} are left for testing"
    if outlook.average is None:
        yield f"  too few to keep any false-alarm rate up to 10%; it takes {normals_needed(0.1)}"
    else:
        proven = f" (proven: at most {outlook.bound:.2g})" if outlook.folds and outlook.bound is not None else ""
        yield f"  smallest false-alarm rate alpha, mode average: {outlook.average:g}{proven}"
    if outlook.guaranteed is not None:
        yield f"  smallest false-alarm rate alpha, mode guaranteed: {outlook.guaranteed:g}"
    elif outlook.folds or grouped:
        yield f"  mode guaranteed: not with {'cross-calibration' if outlook.folds else 'grouped pictures'}"
    else:
        yield f"  mode guaranteed: too few; alpha 0.1 takes {normals_needed(0.1, 'guaranteed')} calibration pictures"


def _listed(title: str, rows: Sequence[str], total: int | None = None) -> Iterator[str]:
    count = len(rows) if total is None else total
    if not count:
        return
    yield f"{title}: {count:,}"
    yield from (f"  {row}" for row in rows[:_SHOWN])
    if count > _SHOWN:
        yield f"  and {count - _SHOWN:,} more; --json lists them"


def _few(counts: dict[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    listed = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:_SHOWN])
    return listed + (f" and {len(counts) - _SHOWN:,} others" if len(counts) > _SHOWN else "")

"""The verb `evaluate`: how well a detector tells abnormal from normal pictures, and whether its promise holds."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anomaly_vae.data import Pictures, open_pictures
from anomaly_vae.engine import Engine
from anomaly_vae.errors import DataError
from anomaly_vae.judgement import Judgement, Policy
from anomaly_vae.layouts import KNOWN_ANOMALIES, DataSpec
from anomaly_vae.metrics import Detection, Localisation, detection, localisation

Indices = npt.NDArray[np.int64]
Heat = npt.NDArray[np.float16]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Kind:
    """One kind of abnormal pictures: how many, how many were flagged, and the AUROC against all test normals.

    `known`: whether anomalies of this kind took part in training; None where some did and nobody knows of what kind.
    """

    kind: str
    n: int
    flagged: int
    auroc: float | None
    known: bool | None = False


@dataclass(frozen=True)
class Unseen:
    """The abnormal pictures of all kinds that took no part in training: how many were flagged, and their AUROC."""

    n: int
    flagged: int
    auroc: float | None

    @property
    def detection_rate(self) -> float:
        """Share of them flagged."""
        return self.flagged / self.n


@dataclass(frozen=True, eq=False)
class Cases:
    """The test pictures one by one: `pictures.items` has their keys and labels, each array one row a picture."""

    pictures: Pictures
    abnormal: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float64]
    p_values: npt.NDArray[np.float64]
    flagged: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Evaluation:
    """Figures on pictures the detector has not seen. None where there is nothing to measure it on.

    `false_alarms`: flagged normals, with the central 90% interval that calibration predicts.
    `detection_rate`: share of the abnormal flagged. `excluded`: left out, since known to the detector or a copy;
    `classless`: left out, since the detector must be told a class and theirs is none of its own.
    `known_kinds`: kinds of anomalies that took part in training; `unseen`: the figures of all others, None where there
    are no known kinds, no others, or known anomalies of unknown kind. `parts`: AUROC of each score by itself. `cases`:
    what the figures were counted from; `to_dict` leaves it out.
    """

    n_normal: int
    n_abnormal: int
    excluded: int
    classless: int
    unreadable: int
    policy: Policy
    false_alarms: int
    false_alarm_interval: tuple[int, int] | None
    detected: int
    quality: Detection | None
    parts: dict[str, float]
    kinds: list[Kind]
    known_kinds: tuple[str, ...]
    unseen: Unseen | None
    pixels: Localisation | None
    images_per_second: float
    cases: Cases = field(repr=False, compare=False)

    @property
    def false_alarm_rate(self) -> float | None:
        """Share of normal test pictures flagged."""
        return self.false_alarms / self.n_normal if self.n_normal else None

    @property
    def detection_rate(self) -> float | None:
        """Share of abnormal test pictures flagged."""
        return self.detected / self.n_abnormal if self.n_abnormal else None

    @property
    def alarms_as_promised(self) -> bool | None:
        """Whether the false alarms lie inside their interval; None where none can be claimed."""
        if self.false_alarm_interval is None:
            return None
        low, high = self.false_alarm_interval
        return low <= self.false_alarms <= high

    def to_dict(self) -> dict[str, Any]:
        """One flat object for machines."""
        return {
            "auroc": self.quality and self.quality.auroc,
            "auroc_interval": self.quality and self.quality.auroc_interval,
            "average_precision": self.quality and self.quality.average_precision,
            "tpr_at_1_fpr": self.quality and self.quality.tpr_at_1_fpr,
            "alpha": self.policy.alpha,
            "mode": self.policy.mode,
            "false_alarms": self.false_alarms,
            "false_alarm_rate": self.false_alarm_rate,
            "false_alarm_interval": self.false_alarm_interval,
            "alarms_as_promised": self.alarms_as_promised,
            "detection_rate": self.detection_rate,
            "n_normal": self.n_normal,
            "n_abnormal": self.n_abnormal,
            "excluded": self.excluded,
            "classless": self.classless,
            "unreadable": self.unreadable,
            "parts": self.parts,
            "kinds": [asdict(kind) for kind in self.kinds],
            "known_kinds": list(self.known_kinds),
            "unseen": self.unseen and asdict(self.unseen) | {"detection_rate": self.unseen.detection_rate},
            "pixels": self.pixels and asdict(self.pixels),
            "images_per_second": self.images_per_second,
        }


def evaluate(engine: Engine, root: Path | str, data: DataSpec | None = None) -> Evaluation:
    """Judge the test pictures under `root`, read by the bundle's own data spec unless another is given.

    Pictures that took part in training, fitting or calibration are left out, wherever they lie and whatever their name;
    so are, where groups are given, those of their groups.
    """
    detector = engine.detector
    pictures = open_pictures(root, data or detector.spec.data, detector.image)
    known = _known(pictures, detector.seen)
    first = np.zeros(len(pictures), bool)
    first[np.unique(pictures.fingerprints, return_index=True)[1]] = True
    # A copy of a test picture is no second test.
    known |= ~first
    candidates = ~known & _in_test(pictures)
    asked = int(candidates.sum())
    if detector.wants_classes:
        # Of what class a picture from any other folder is, nobody can tell.
        assert detector.spec.model.condition is not None
        candidates &= np.isin([item.label for item in pictures.items], detector.spec.model.condition.classes)
    test = np.nonzero(candidates)[0]
    if not len(test):
        raise DataError(f"{root} holds no picture that this detector was not made from; give it held-out pictures")
    started = time.monotonic()
    maps: list[tuple[Heat, Mask]] = []
    judged = list(_judge(engine, pictures, test, maps))
    seconds = time.monotonic() - started
    pixels = localisation(*zip(*maps, strict=True)) if maps else None
    left_out = (int(known.sum()), asked - len(test))
    return _summarise(engine, pictures, test, judged, left_out, seconds, pixels)


def _summarise(
    engine: Engine,
    pictures: Pictures,
    test: Indices,
    judged: list[Judgement],
    left_out: tuple[int, int],
    seconds: float,
    pixels: Localisation | None,
) -> Evaluation:
    labels = np.array([pictures.items[i].label for i in test])
    abnormal = np.array([not pictures.items[i].normal for i in test])
    scores = np.array([score for one in judged for score in one.score])
    p_values = np.array([p for one in judged for p in one.p_value])
    flagged = np.array([outlier for one in judged for outlier in one.outlier])
    parts = {name: [value for one in judged for value in one.parts[name]] for name in judged[0].parts}
    policy, calibration = engine.detector.policy, engine.detector.calibration
    n = int((~abnormal).sum())
    claimed = policy.band is not None and n > 0
    interval = calibration.false_alarms_interval(n, policy.alpha, policy.mode) if claimed else None
    both = 0 < n < len(test)
    known = engine.detector.known_kinds
    unseen = abnormal & np.array([_is_known(str(label), known) is False for label in labels])
    return Evaluation(
        n_normal=n,
        n_abnormal=len(test) - n,
        excluded=left_out[0],
        classless=left_out[1],
        unreadable=len(pictures.unreadable),
        policy=policy,
        false_alarms=int((flagged & ~abnormal).sum()),
        false_alarm_interval=interval,
        detected=int((flagged & abnormal).sum()),
        quality=detection(scores[~abnormal], scores[abnormal]) if both else None,
        parts={name: _auroc(np.array(column), abnormal) for name, column in parts.items()} if both else {},
        kinds=_kinds(labels, abnormal, scores, flagged, known),
        known_kinds=known,
        unseen=_unseen(unseen, abnormal, scores, flagged) if known and unseen.any() else None,
        pixels=pixels,
        images_per_second=len(test) / max(seconds, 1e-9),
        cases=Cases(pictures.select(test), abnormal, scores, p_values, flagged),
    )


def _kinds(
    labels: npt.NDArray[np.str_],
    abnormal: npt.NDArray[np.bool_],
    scores: npt.NDArray[np.float64],
    flagged: npt.NDArray[np.bool_],
    known: tuple[str, ...],
) -> list[Kind]:
    kinds = []
    for kind in np.unique(labels[abnormal]):
        own = abnormal & (labels == kind)
        auroc = _auroc_of(own, abnormal, scores)
        kinds.append(Kind(str(kind), int(own.sum()), int((flagged & own).sum()), auroc, _is_known(str(kind), known)))
    return kinds


def _unseen(
    own: npt.NDArray[np.bool_],
    abnormal: npt.NDArray[np.bool_],
    scores: npt.NDArray[np.float64],
    flagged: npt.NDArray[np.bool_],
) -> Unseen:
    return Unseen(int(own.sum()), int((flagged & own).sum()), _auroc_of(own, abnormal, scores))


def _is_known(kind: str, known: tuple[str, ...]) -> bool | None:
    """Whether anomalies of this kind took part in training; None where it may be that of some without a kind."""
    if kind.casefold() in {name.casefold() for name in known}:
        return True
    return None if KNOWN_ANOMALIES in known else False


def _auroc_of(
    own: npt.NDArray[np.bool_], abnormal: npt.NDArray[np.bool_], scores: npt.NDArray[np.float64]
) -> float | None:
    """AUROC of some abnormal pictures against all normals."""
    keep = own | ~abnormal
    return _auroc(scores[keep], abnormal[keep]) if (~abnormal).any() else None


def _judge(engine: Engine, pictures: Pictures, test: Indices, maps: list[tuple[Heat, Mask]]) -> Iterator[Judgement]:
    """Judge the test pictures; heat maps of those whose pixels are known go into `maps`, in half precision."""
    localise = any(item.mask is not None for item in pictures.items)
    for indices, images in pictures.batches(engine.max_batch, test):
        classes = [pictures.items[i].label for i in indices] if engine.detector.wants_classes else None
        judged = engine.judge(images, localise, classes)
        if judged.heat is not None:
            # A normal picture's mask is empty; an abnormal one without a mask says nothing about its pixels.
            known = [(i, pictures.mask(int(index))) for i, index in enumerate(indices)]
            maps += [(judged.heat[i].astype(np.float16), mask) for i, mask in known if mask is not None]
        yield replace(judged, heat=None)


def _auroc(scores: npt.NDArray[np.float64], abnormal: npt.NDArray[np.bool_]) -> float:
    return detection(scores[~abnormal], scores[abnormal]).auroc


def _known(pictures: Pictures, seen: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Pictures that the detector was made from; outside an official test part, their whole groups."""
    known = np.isin(pictures.fingerprints, seen)
    if pictures.groups is None:
        return known
    official = np.array([item.split == "test" for item in pictures.items], bool)
    return np.asarray(known | (np.isin(pictures.groups, pictures.groups[known]) & ~official), np.bool_)


def _in_test(pictures: Pictures) -> npt.NDArray[np.bool_]:
    """All pictures, or those of the official test part where there is one."""
    parts = np.array([item.split or "" for item in pictures.items])
    return parts == "test" if (parts == "test").any() else np.ones(len(parts), bool)

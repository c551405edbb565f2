"""Who trains, who fits references, who calibrates: the division of the normals that a detector is made from."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anomaly_vae.calibration import Calibration
from anomaly_vae.data import Pictures, folds, split
from anomaly_vae.recipe import DetectorSpec
from anomaly_vae.seeds import seed_of
from anomaly_vae.surveying import spread

Indices = npt.NDArray[np.int64]

_LEAST_FIT = 10
"""Below some ten pictures the scores' spread, on which the fusion rests, is anybody's guess."""


@dataclass(frozen=True)
class Part:
    """What one member is made from: indices of the pictures it trains on, fits references on, and calibrates."""

    train: Indices
    fit: Indices
    calibrate: Indices


def divide(spec: DetectorSpec, pictures: Pictures) -> tuple[list[Part], bool]:
    """One part for split calibration, or K for cross-conformal calibration of few normals (True)."""
    whole = split(
        pictures,
        seed=spec.seed,
        test_fraction=spec.data.test_fraction,
        fit_fraction=spec.split.fit,
        calibrate_fraction=spec.split.calibrate,
    )
    usable = whole.pool
    if len(usable) >= spec.calibration.few_normals:
        return [Part(whole.train, whole.fit, _distinct(pictures, whole.calibrate))], False
    return _folded(spec, pictures, usable), True


def _folded(spec: DetectorSpec, pictures: Pictures, usable: Indices) -> list[Part]:
    unit = pictures.units
    count = min(spec.calibration.folds, len(np.unique(unit[usable])))
    parts = []
    for k, held in enumerate(folds(usable, unit[usable], count, spec.seed)):
        rest = np.setdiff1d(usable, held)
        fit = _fit_share(spec, rest, unit[rest], seed_of(spec.seed, "fit", k) % 2**32)
        parts.append(Part(np.setdiff1d(rest, fit), fit, _distinct(pictures, held)))
    return parts


def _distinct(pictures: Pictures, calibrate: Indices) -> Indices:
    """One of each content: copies of a picture tell nothing new and would count as evidence."""
    return np.sort(calibrate[np.unique(pictures.fingerprints[calibrate], return_index=True)[1]])


def _fit_share(spec: DetectorSpec, rest: Indices, unit: Indices, seed: int) -> Indices:
    """The pictures of `rest` that a member fits its references on instead of training."""
    shares = round((1 - spec.split.calibrate) / spec.split.fit)
    shares = max(2, min(shares, len(rest) // _LEAST_FIT))
    # Calibration needs whole groups; references do not, and one group may be half of what there is to train on.
    whole = len(np.unique(unit)) >= 2 * shares
    return folds(rest, unit if whole else None, shares, seed)[0]


def references_of(part: Part, pictures: Pictures, most: int) -> Indices:
    """Training pictures that may serve as references beside those for fitting, at most so many, evenly spaced.

    None of a group of which there are pictures for fitting: what these are like would be told by their own siblings.
    """
    apart = part.train[~np.isin(pictures.units[part.train], pictures.units[part.fit])]
    return np.array(spread(apart.tolist(), most), np.int64)


def made_from(parts: list[Part]) -> Indices:
    """Ascending indices of all pictures that take part in training, fitting or calibration."""
    return np.unique(np.concatenate([np.concatenate([part.train, part.fit, part.calibrate]) for part in parts]))


def copies(parts: list[Part]) -> int:
    """How many pictures were left out of calibration, as copies of others."""
    return len(made_from(parts)) - sum(len(part.calibrate) for part in parts) if len(parts) > 1 else 0


def group_count(pictures: Pictures, parts: list[Part]) -> int | None:
    """Number of groups the calibration pictures come in; None where they stand alone."""
    if pictures.groups is None:
        return None
    calibrate = np.concatenate([part.calibrate for part in parts])
    count = len(np.unique(pictures.groups[calibrate]))
    # Groups of one picture each leave the pictures exchangeable.
    return count if count < len(calibrate) else None


def blank_calibration(parts: list[Part], groups: int | None) -> Calibration:
    """A calibration of these sizes before there are scores, to ask what it could promise."""
    return Calibration.of([np.zeros(len(part.calibrate)) for part in parts], groups)


def described(parts: list[Part], crossed: bool, pictures: Pictures) -> str:
    """The division in one line."""
    usable = len(made_from(parts))
    held = sum(item.normal for item in pictures.items) - usable
    if crossed:
        how = f"{len(parts)}-fold cross-calibration, {len(parts)} models, since they are few"
        again = copies(parts)
        how += f"; {again} copies do not calibrate" if again else ""
    else:
        part = parts[0]
        how = f"{len(part.train)} train, {len(part.fit)} fit, {len(part.calibrate)} calibrate"
    return f"normals: {usable} used ({how}), {held} left for testing"

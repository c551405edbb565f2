"""The known anomalies of a training: opened apart from all other pictures, and drawn from step by step."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anomaly_vae.data import Pictures, open_listing
from anomaly_vae.errors import ConfigError
from anomaly_vae.layouts import KNOWN_ANOMALIES, Listing, counted
from anomaly_vae.listing import list_pictures
from anomaly_vae.recipe import DetectorSpec


@dataclass(frozen=True, eq=False)
class Known:
    """Pictures known to be abnormal. `seen`: hashes (uint64) of all that an evaluation must leave out for them."""

    pictures: Pictures
    seen: npt.NDArray[np.uint64]

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each kind; those without one are called `known_anomalies`."""
        return dict(sorted(Counter(item.label for item in self.pictures.items).items()))

    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """uint8 (count, C, H, W); one picture may come twice."""
        return self.pictures.images(torch.randint(len(self.pictures), (count,), generator=generator).numpy())


def open_known(
    spec: DetectorSpec, root: Path | str, pictures: Pictures, used: npt.ArrayLike, say: Callable[[str], None]
) -> Known | None:
    """The known anomalies below `root`; None where there are none, or nobody wants them.

    A copy of one of the normals `used` is none. Raises `ConfigError` for models that cannot learn from them.
    """
    listing = Listing(list_pictures(root, spec.data).known)
    exposed = [expert for expert in spec.experts.values() if expert.objective.exposure is not None]
    if not listing.items or not exposed:
        return None
    _check(spec)
    opened = open_listing(listing, spec.data, pictures.image)
    if opened.unreadable:
        key, reason = opened.unreadable[0]
        say(f"skipped {len(opened.unreadable)} unreadable picture(s) of {KNOWN_ANOMALIES}/, such as {key}: {reason}")
    normal = np.isin(opened.fingerprints, pictures.fingerprints[np.asarray(used, np.int64)])
    if normal.any():
        say(f"skipped {normal.sum():,} of {KNOWN_ANOMALIES}/ that lie among the normal pictures as well")
    opened = opened.select(np.flatnonzero(~normal))
    if not len(opened):
        return None
    known = Known(opened, np.union1d(opened.fingerprints, _group_mates(opened, pictures)))
    many = f"{len(opened):,} known anomalies" if len(opened) > 1 else "1 known anomaly"
    kinds = counted(len(known.counts), "kind")
    say(f"{many} of {kinds} {'are' if len(opened) > 1 else 'is'} used (outlier exposure)")
    return known


def _check(spec: DetectorSpec) -> None:
    """Refuse what known anomalies cannot take part in."""
    remedy = f"set objective.exposure to null, or take {KNOWN_ANOMALIES}/ out of the folder"
    if spec.tiles is not None:
        raise ConfigError(f"a tile of a known anomaly may show nothing of it; leave out tiles, or {remedy}")
    for expert in spec.experts.values():
        if expert.objective.exposure is None:
            continue
        if expert.model.condition is not None:
            raise ConfigError(f"a known anomaly is of none of the classes; leave out model.condition, or {remedy}")
        if expert.objective.course.kind != "joint":
            raise ConfigError(f"known anomalies suit only objective.course.kind=joint; {remedy}")


def _group_mates(known: Pictures, pictures: Pictures) -> npt.NDArray[np.uint64]:
    """Hashes of the pictures that share a group with a known anomaly, those of an official test part apart."""
    groups = {item.group for item in known.items if item.group is not None}
    mates = [item.group in groups and item.split != "test" for item in pictures.items]
    return np.asarray(pictures.fingerprints[np.array(mates, bool)])

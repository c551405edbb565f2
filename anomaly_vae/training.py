"""The verb `train`: a folder of pictures becomes a calibrated detector in a bundle."""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric

from anomaly_vae.bundle import check_place
from anomaly_vae.calibration import Calibration
from anomaly_vae.checkpointing import close_work, identity, open_work
from anomaly_vae.data import Pictures, open_pictures, suggest_image_spec, survey
from anomaly_vae.detector import Detector
from anomaly_vae.dividing import (
    Indices,
    Part,
    blank_calibration,
    described,
    divide,
    group_count,
    made_from,
    references_of,
)
from anomaly_vae.errors import ConfigError
from anomaly_vae.fabric import make_fabric
from anomaly_vae.fitting import Fitted, Fitting, Progress
from anomaly_vae.images import ImageSpec
from anomaly_vae.judgement import policy_of
from anomaly_vae.known import Known, open_known
from anomaly_vae.member import Batch, Batches, Member, member_opinions
from anomaly_vae.model import AutoEncoder
from anomaly_vae.normals import MOST, Normals
from anomaly_vae.objectives import Objective
from anomaly_vae.recipe import DetectorSpec
from anomaly_vae.seeds import generator_of, seed_of

_SCORING_BATCH = 64
_PROBE_PIXELS = 2**21
"""Of all probes with tiles: large ones would outweigh the rest of a bundle, and be long judged whenever it loads."""
_REFERENCES = 32_768
"""So many training pictures or tiles at most are shown to scores that owe nothing to the model."""


@dataclass(frozen=True)
class Trained:
    """What `train` leaves: the detector as saved, and what is worth telling about it."""

    detector: Detector
    path: Path
    seconds: float
    metrics: dict[str, Any]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The facts for machines."""
        policy = self.detector.policy
        return {
            "bundle": str(self.path),
            "version": self.detector.version,
            "seconds": self.seconds,
            "alpha": policy.alpha,
            "mode": policy.mode,
            "expected_false_alarm_rate": policy.expected_false_alarm_rate,
            "calibration_images": self.detector.calibration.n,
            "notes": self.notes,
        }


Say = Callable[[str], None]
ReportMember = Callable[[int, int, Progress], None]
Tell = Callable[["_Place", Progress], None]


def train(
    spec: DetectorSpec,
    root: Path | str,
    out: Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    say: Say = lambda line: None,
    report: ReportMember = lambda member, members, progress: None,
    tensorboard: Path | None = None,
) -> Trained | None:
    """Train, calibrate and save; returns None on all but the first of several processes.

    An interrupted run goes on by itself when the same command is given again; `restart` begins anew. `say` receives
    lines for people, `report(member, members, progress)` each epoch.
    """
    started = time.monotonic()
    check_place(out, overwrite)
    spec, pictures = load_pictures(spec, root, say)
    parts, crossed = divide(spec, pictures)
    say(described(parts, crossed, pictures))
    known = open_known(spec, root, pictures, made_from(parts), say)
    # An alpha that these pictures cannot support is refused now, not after an hour of training.
    groups = group_count(pictures, parts)
    policy_of(blank_calibration(parts, groups), spec.calibration.alpha, spec.calibration.mode)
    courses = any(expert.objective.has_parts(expert.model) for expert in spec.experts.values())
    fabric = make_fabric(device, spec.training.precision, tensorboard, courses)
    work = out.absolute().with_name(f".{out.name}.training")
    open_work(work, identity(spec, pictures, parts, fabric, known), restart, fabric, say)
    members, fitted = [], []
    places = [place for i in range(len(parts)) for place in _places(spec, i)]

    def tell(place: _Place, progress: Progress) -> None:
        report(places.index(place), len(places), progress)

    for i, part in enumerate(parts):
        member, of_member = _make_member(spec, pictures, part, known, fabric, i, len(parts), work, tell)
        members.append(member)
        fitted += of_member
    if not fabric.is_global_zero:
        return None
    detector = _calibrated(spec, pictures, parts, members, groups, known)
    detector.calibrated_at = time.time()
    metrics = _metrics(spec, parts, places, fitted, started) | {"latent_cost": members[0].model.law.cost_name}
    metrics |= {"known_anomalies": known.counts} if known else {}
    notes = [*pictures.notes, *_collapse_notes(spec, len(parts), fitted)]
    saved = detector.save(out, _probes(spec, pictures, parts), metrics, replace=overwrite)
    close_work(work)
    return Trained(saved, out, metrics["seconds"], metrics, notes)


def load_pictures(spec: DetectorSpec, root: Path | str, say: Say) -> tuple[DetectorSpec, Pictures]:
    """Open the pictures and, where the spec leaves it open, choose the image size from them."""
    spec, image = _with_image(spec, root, say)
    pictures = open_pictures(root, spec.data, image, _reading(say))
    spec = _with_classes(spec, pictures)
    if pictures.unreadable:
        key, reason = pictures.unreadable[0]
        say(f"skipped {len(pictures.unreadable)} unreadable picture(s), such as {key}: {reason}")
    return spec, pictures


def _with_image(spec: DetectorSpec, root: Path | str, say: Say) -> tuple[DetectorSpec, ImageSpec]:
    """Size and channels, and what of the picture counts as pixels of that size, so that a bundle needs no file."""
    image = spec.image
    if image is None:
        image = suggest_image_spec(survey(root, spec.data), spec.tiles.side if spec.tiles else None)
        kind = "colour" if image.channels == 3 else "grey"
        say(f"image: {image.width}x{image.height} px, {kind} (from the pictures)")
    image = spec.region.within(image) if spec.region else image
    spec = spec.with_overrides([f"image={image.model_dump_json()}", "region=null"])
    if spec.tiling is not None:
        say(f"tiles: {spec.tiling.count} of {spec.tiling.side} px a picture")
    if spec.beside and min(spec.shape[1:]) < spec.beside_from:
        say(f"left out {', '.join(spec.beside)}: for pictures from {spec.beside_from} px on (beside_from)")
        spec = spec.with_overrides(["beside={}"])
    return spec, image


def _with_classes(spec: DetectorSpec, pictures: Pictures) -> DetectorSpec:
    """A conditional model's classes are those of the normal pictures, unless they are listed."""
    condition = spec.model.condition
    if condition is None:
        return spec
    found = sorted({item.label for item in pictures.items if item.normal})
    if condition.classes:
        strange = [name for name in found if name not in condition.classes]
        if strange:
            raise ConfigError(f"model.condition.classes lacks {', '.join(strange)}, of which there are normal pictures")
        return spec
    if len(found) < 2:
        raise ConfigError(
            f"a conditional model wants normal pictures of several classes, not only {found[0]!r}; "
            "name their folders, such as -o data.normal=[a,b], or leave out model.condition"
        )
    return spec.with_overrides([f"model.condition.classes={json.dumps(found)}"])


def _reading(say: Say) -> Callable[[int, int], None]:
    """A line every ten seconds while many pictures are read."""
    said = time.monotonic()

    def progress(done: int, of: int) -> None:
        nonlocal said
        if time.monotonic() - said > 10:
            said = time.monotonic()
            say(f"read {done:,} of {of:,} pictures")

    return progress


def _make_member(
    spec: DetectorSpec,
    pictures: Pictures,
    part: Part,
    known: Known | None,
    fabric: Fabric,
    i: int,
    count: int,
    work: Path,
    tell: Tell,
) -> tuple[Member, list[Fitted]]:
    """Train all models of one member; `count` members share the budget of each kind."""
    models: dict[str, list[AutoEncoder]] = {}
    fitted = []
    for place in _places(spec, i):
        model, one = _make_model(spec, place, pictures, part, known, fabric, 1 / count, work, tell)
        models.setdefault(place.kind, []).append(model)
        fitted.append(one)
    # Whoever trims training does not take all of it for normal.
    trims = any(expert.training.trim is not None for expert in spec.experts.values())
    most = max(1, _REFERENCES // (spec.tiling.count if spec.tiling else 1))
    trained = None if trims else _batches(spec, pictures, references_of(part, pictures, most))
    return Member.fit(spec, models, _batches(spec, pictures, part.fit), trained), fitted


class _Place(NamedTuple):
    """Which model it is: of member `member` the one of this kind with this number in its ensemble."""

    member: int
    kind: str
    number: int

    @property
    def name(self) -> str:
        """Its name in files and logs."""
        return "-".join([f"member{self.member}", *([self.kind] if self.kind else []), *self._numbered()])

    def _numbered(self) -> list[str]:
        return [str(self.number)] if self.number else []

    def seed_of(self, seed: int, purpose: str) -> int:
        """A seed of its own; that of the first model of the first kind does not depend on what stands beside it."""
        return seed_of(seed, "-".join([purpose, *([self.kind] if self.kind else []), *self._numbered()]), self.member)


def _places(spec: DetectorSpec, i: int) -> list[_Place]:
    return [_Place(i, kind, number) for kind, expert in spec.experts.items() for number in range(expert.ensemble)]


def _make_model(
    spec: DetectorSpec,
    place: _Place,
    pictures: Pictures,
    part: Part,
    known: Known | None,
    fabric: Fabric,
    share: float,
    work: Path,
    tell: Tell,
) -> tuple[AutoEncoder, Fitted]:
    expert = spec.experts[place.kind]
    objective = Objective(expert.objective, expert.model.build(spec.shape, place.seed_of(spec.seed, "weights")))
    seed, labels, tiling = place.seed_of(spec.seed, "member"), _labels(spec, pictures), spec.tiling
    settings = f"beside.{place.kind}." if place.kind else ""
    fitting = Fitting(
        fabric, objective, expert.training, pictures, part.train, part.fit, seed, share, labels, tiling, known, settings
    )

    def report(progress: Progress) -> None:
        losses = {"loss": progress.loss, "reconstruction": progress.reconstruction, "latent": progress.latent}
        fabric.log_dict({f"{place.name}/{name}": value for name, value in losses.items()}, progress.epoch)
        if fabric.is_global_zero:
            tell(place, progress)

    fitted = fitting.run(work / f"{place.name}.safetensors", report)
    return objective.model, fitted


def _labels(spec: DetectorSpec, pictures: Pictures) -> Indices | None:
    """The class of each picture as the model's number, -1 for others; None for models without classes."""
    if spec.model.condition is None:
        return None
    numbers = {name: i for i, name in enumerate(spec.model.condition.classes)}
    return np.array([numbers.get(item.label, -1) for item in pictures.items], np.int64)


def _given(spec: DetectorSpec, pictures: Pictures) -> Indices | None:
    """The classes of pictures as they will be judged: known only where they will be given."""
    condition = spec.model.condition
    return _labels(spec, pictures) if condition is not None and condition.scoring == "given" else None


def _calibrated(
    spec: DetectorSpec,
    pictures: Pictures,
    parts: list[Part],
    members: list[Member],
    groups: int | None,
    known: Known | None,
) -> Detector:
    opinions = [
        member_opinions(spec, member, _batches(spec, pictures, part.calibrate)())
        for member, part in zip(members, parts, strict=True)
    ]
    scores = [score for score, _ in opinions]
    seen = np.unique(pictures.fingerprints[made_from(parts)])
    seen = np.union1d(seen, known.seen) if known else seen
    kinds = tuple(known.counts) if known else ()
    detector = Detector(spec, members, Calibration.of(scores, groups), seen=seen, known_kinds=kinds)
    calibrate = np.concatenate([part.calibrate for part in parts])
    named = calibrate[np.linspace(0, len(calibrate) - 1, min(MOST, len(calibrate))).astype(int)]
    detector.normals = Normals.of(
        spec,
        members[0],
        np.concatenate([columns for _, columns in opinions]),
        _batches(spec, pictures, named)(),
        [pictures.items[i].key for i in named],
    )
    return detector


def _batches(spec: DetectorSpec, pictures: Pictures, indices: Indices) -> Batches:
    given = _given(spec, pictures)

    def batches() -> Iterator[Batch]:
        for chosen, images in pictures.batches(_SCORING_BATCH, indices):
            yield Batch(images, None if given is None else torch.from_numpy(given[chosen]))

    return batches


def _probes(spec: DetectorSpec, pictures: Pictures, parts: list[Part]) -> Batch | None:
    if not spec.probes:
        return None
    pool = parts[0].train
    order = torch.randperm(len(pool), generator=generator_of(spec.seed, "probes", 0)).numpy()
    most = max(1, _PROBE_PIXELS // (pictures.image.height * pictures.image.width)) if spec.tiles else len(pool)
    chosen = np.sort(pool[order[: min(spec.probes, most)]])
    given = _given(spec, pictures)
    return Batch(pictures.images(chosen), None if given is None else torch.from_numpy(given[chosen]))


def _metrics(
    spec: DetectorSpec, parts: list[Part], places: list["_Place"], fitted: list[Fitted], started: float
) -> dict[str, Any]:
    return {
        "seconds": round(time.monotonic() - started, 2),
        "machine": platform.machine(),
        "pictures": {name: [len(getattr(part, name)) for part in parts] for name in ("train", "fit", "calibrate")},
        "latents": spec.model.latent.size,
        "members": [
            {
                "name": place.name,
                "kind": place.kind,
                "epoch": one.epoch,
                "epochs": one.epochs,
                "held_out_loss": one.held_out,
                "active_units": one.active_units,
                "history": [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in one.history],
            }
            for place, one in zip(places, fitted, strict=True)
        ],
    }


def _collapse_notes(spec: DetectorSpec, members: int, fitted: list[Fitted]) -> list[str]:
    # Skips need no code: where the decoder sees the picture, an empty one is no collapse.
    seeing = [one for i in range(members) for one in _places(spec, i)]
    collapsed = [
        place.name
        for place, one in zip(seeing, fitted, strict=True)
        if one.active_units == 0 and not spec.experts[place.kind].model.network.sees_input
    ]
    if not collapsed:
        return []
    remedy = "-o model.latent.beta=0.1" if spec.model.latent.has_kl else "-o model.latent.weight=0.1"
    remedy += " or -o model.latent.free_bits=0.1" if spec.model.latent.kind == "gaussian" else ""
    if spec.model.latent.kind == "point":
        remedy = f"-o training.learning_rate={spec.training.learning_rate / 4:g}"
    return [f"collapse in {', '.join(collapsed)}: no latent carries information; try {remedy}"]

"""`Detector`: trained members, what their scores learned from normals, and the calibration. Never uncalibrated."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from anomaly_vae.bundle import MANIFEST, Bundle, read_bundle, write_bundle
from anomaly_vae.calibration import UNKNOWN_GROUPS, Calibration, Mode, rank_allowed
from anomaly_vae.drift import SCORE, Reference, latent_name
from anomaly_vae.errors import BundleError, ConfigError
from anomaly_vae.expert import Batch
from anomaly_vae.images import ImageSpec, decode, inside, masked
from anomaly_vae.judgement import HEAT_FULL, Judgement, Policy, policy_of
from anomaly_vae.member import Member
from anomaly_vae.normals import Normals
from anomaly_vae.packing import packed_members, unpacked_member
from anomaly_vae.recipe import DetectorSpec
from anomaly_vae.seeds import content_hash
from anomaly_vae.spec import Spec

Floats = npt.NDArray[np.float64]

_NOTHING = safetensors.numpy.save({})

PROBE_TOLERANCE = 1e-3
"""How far a probe image's score may move on another device, as a share of the calibration scores' quartile range."""


class Detector:
    """Judges images; see `judge`. Built by `training`, saved and loaded by `save` and `load`.

    `version`: the first 12 hex digits of its content hash. `seen`: hashes (uint64) of all pictures that took part in
    training, fitting or calibration, so that an evaluation can leave them out. `known_kinds`: the kinds of anomalies
    that it was shown in training. `probes`: the images that its bundle keeps beside their scores.
    `normals`: what explanations compare with, where the bundle has it. `calibrated_at`: when the normals that rank
    verdicts were scored, in seconds since 1970, or None where that is not known.
    """

    def __init__(
        self,
        spec: DetectorSpec,
        members: Sequence[Member],
        calibration: Calibration,
        policy: Policy | None = None,
        version: str = "unsaved",
        seen: npt.NDArray[np.uint64] | None = None,
        known_kinds: Sequence[str] = (),
    ) -> None:
        if len(calibration.scores) not in (1, len(members)):
            raise ValueError(f"{len(members)} members but calibration scores of {len(calibration.scores)}")
        if spec.image is None:
            raise ValueError("a detector needs a resolved image spec")
        self.spec, self.members, self.calibration = spec, tuple(members), calibration
        self.image: ImageSpec = spec.image
        self.policy = policy or policy_of(calibration, spec.calibration.alpha, spec.calibration.mode)
        self.version = version
        self.seen = seen if seen is not None else np.zeros(0, np.uint64)
        self.known_kinds = tuple(known_kinds)
        self.probes: Batch | None = None
        self._probes_gave: Floats | None = None
        self.normals: Normals | None = None
        self.calibrated_at: float | None = None
        self.ranked_anew = False

    @property
    def device(self) -> torch.device:
        """Where the models lie."""
        return self.members[0].model.device

    def to(self, device: torch.device) -> "Detector":
        """The same detector on another device."""
        self.members = tuple(member.on(device) for member in self.members)
        return self

    def with_policy(self, alpha: float | None = None, mode: Mode | None = None) -> "Detector":
        """The same detector under another alpha or mode; raises `CalibrationError` when n does not support it."""
        policy = policy_of(self.calibration, self.policy.alpha if alpha is None else alpha, mode or self.policy.mode)
        return self._as(policy, self.version)

    def recalibrated(
        self,
        scores: npt.ArrayLike,
        seen: npt.ArrayLike = (),
        independent: bool | None = None,
        at: float | None = None,
    ) -> "Detector":
        """The same detector ranked among the `scores` that it gave to normal pictures which no part of it has seen.

        `seen`: hashes of these pictures, which from then on count among those it was made from. `independent`: no two
        of them belong together; else no band is claimed, and mode `average` stands in for `guaranteed`. None: as it
        was of the pictures that calibrated before.

        All members see such a picture alike, so that even with K-fold its score, their mean, is ranked as one. Its
        alpha is the old one where so many scores support it, else the smallest that they do; raises `CalibrationError`
        where they support none. Its version tells the old one and the scores. `at`: as `calibrated_at`.
        """
        independent = self.calibration.groups is None if independent is None else independent
        calibration = Calibration.of([scores], None if independent else UNKNOWN_GROUPS)
        alpha, mode = self.policy.alpha, self.policy.mode if independent else "average"
        policy = policy_of(calibration, alpha if rank_allowed(calibration.n, alpha, mode) else None, mode)
        content = hashlib.sha256(self.version.encode() + calibration.scores[0].astype("<f8").tobytes())
        version = content.hexdigest()[:12]
        other = self._as(policy, version)
        other.calibration, other.calibrated_at, other.ranked_anew = calibration, at, True
        other.seen = np.union1d(self.seen, np.asarray(seen, np.uint64))
        return other

    def _as(self, policy: Policy, version: str) -> "Detector":
        other = copy.copy(self)
        other.policy, other.version = policy, version
        return other

    def scored_by(self, members: Sequence[Member], tie: float | None = None) -> "Detector":
        """The same detector with members that score in another way, and the `tie` that suits it; see `Calibration`."""
        other = copy.copy(self)
        other.members = tuple(members)
        if tie is not None:
            other.calibration = replace(self.calibration, tie=tie)
            other.policy = policy_of(other.calibration, self.policy.alpha, self.policy.mode)
        return other

    def prepare(self, data: bytes) -> Tensor:
        """A picture's bytes as the uint8 (C, H, W) that `judge` takes; raises `BadImage`. Safe in many threads."""
        return decode(data, self.image)

    def judge(self, images: Tensor, heat: bool = False, classes: Sequence[str] | None = None) -> Judgement:
        """Judge uint8 images (B, C, H, W): normalise, model, scores, fusion, p-value, verdict.

        What lies outside of the region changes nothing, and has heat 0.

        `classes`: for a conditional detector calibrated with given classes, that of every image; else None.
        """
        with torch.inference_mode():
            return self._judge(Batch(images, self.numbers_of(classes)), heat)

    def has_seen(self, data: bytes) -> bool:
        """Whether a file of these very bytes took part in training, fitting or calibration."""
        return bool((self.seen == np.uint64(content_hash(data))).any())

    def explain(self, images: Tensor, parts: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
        """Why images (B, C, H, W) got the `parts` that `judge` gave them, see `Normals.explanation`.

        Raises `BundleError` where the bundle is too old to tell.
        """
        if self.normals is None:
            raise BundleError("this bundle keeps nothing to explain by; train it again with this version")
        return self.normals.explanations(self.members[0], masked(images, self.image), parts)

    def reconstruct(self, images: Tensor, classes: Sequence[str] | None = None) -> Tensor | None:
        """What the first model of pixels makes of uint8 images (B, C, H, W): uint8, in the size that it sees them in.

        None where all models are of features. `classes` as for `judge`.
        """
        with torch.inference_mode():
            batch = Batch(masked(images, self.image), self.numbers_of(classes))
            made = self.members[0].reconstruct(self.spec, batch)
            return None if made is None else (made * 255).round().to(torch.uint8).cpu()

    @property
    def watched(self) -> tuple[int, ...]:
        """The latents of the first model that `Judgement.latents` tells, for a watch over drift."""
        return () if self.normals is None else self.normals.widest

    def reference(self, latents: bool = True) -> Reference:
        """What calibration pictures' score, parts and, if wanted, watched latents were, for a `ShiftAlarm`.

        The score alone where the bundle keeps no more, and after `recalibrated`: of the new normals nothing else is
        known.
        """
        values: dict[str, npt.ArrayLike] = {SCORE: np.concatenate(self.calibration.scores)}
        if self.normals is not None and not self.ranked_anew:
            values |= zip(self.spec.parts, self.normals.parts.T, strict=True)
            values |= {latent_name(i): self.normals.codes[:, i] for i in self.watched if latents}
        return Reference(values)

    @property
    def wants_classes(self) -> bool:
        """Whether `judge` must be told the class of every image."""
        condition = self.spec.model.condition
        return condition is not None and condition.scoring == "given"

    def numbers_of(self, classes: Sequence[str] | None) -> Tensor | None:
        """Class names as the model's numbers; raises `ConfigError` where none, or unknown ones, are given."""
        if not self.wants_classes:
            if classes is not None:
                raise ConfigError("this detector was calibrated without given classes; judge pictures without them")
            return None
        condition = self.spec.model.condition
        assert condition is not None
        known = ", ".join(condition.classes)
        if classes is None:
            raise ConfigError(
                f"this detector must be told the class of every picture ({known}); where nobody knows it, train with "
                "-o model.condition.scoring=marginalised"
            )
        unknown = next((name for name in classes if name not in condition.classes), None)
        if unknown is not None:
            raise ConfigError(f"the class {unknown!r} is not among those it was trained on: {known}; give one of them")
        return torch.tensor([condition.classes.index(name) for name in classes])

    def _judge(self, batch: Batch, heat: bool) -> Judgement:
        batch = batch._replace(images=masked(batch.images, self.image))
        watched = [self.watched, *[()] * (len(self.members) - 1)]
        opinions = [
            member.judge(self.spec, batch, heat, latents) for member, latents in zip(self.members, watched, strict=True)
        ]
        verdicts = [one.score for one in opinions]
        heats = [one.heat for one in opinions if one.heat is not None]
        ranked = np.stack(verdicts, 1) if self.calibration.crossed else np.mean(verdicts, 0)
        p_values = self.calibration.p_values(ranked)
        mean = np.mean([one.columns for one in opinions], 0)
        return Judgement(
            score=np.mean(verdicts, 0).tolist(),
            p_value=p_values.tolist(),
            outlier=self.calibration.outliers(p_values, self.policy.alpha, self.policy.mode).tolist(),
            parts={kind: mean[:, i].tolist() for i, kind in enumerate(self.spec.parts)},
            heat=self._counting(torch.stack(heats).mean(0).float().cpu()).numpy() if heat else None,
            heat_scale=HEAT_FULL,
            policy=self.policy,
            version=self.version,
            latents=opinions[0].code,
        )

    def _counting(self, heat: Tensor) -> Tensor:
        """Heat (B, H, W) of what counts, 0 elsewhere."""
        counts = inside(self.image)
        return heat if counts is None else torch.where(counts, heat, 0.0)

    def save(
        self, path: Path, probes: Batch | None = None, metrics: dict[str, Any] | None = None, replace: bool = False
    ) -> "Detector":
        """Write the bundle `path` and return this detector with its version.

        `probes`: images kept beside their scores, by which `load` checks the device it loads on.
        """
        told = dict(metrics or {})
        if self.calibrated_at is not None:
            told["calibrated_at"] = datetime.fromtimestamp(self.calibrated_at, UTC).isoformat(timespec="seconds")
        bundle = Bundle(self._description(), self._files(probes), told)
        write_bundle(path, bundle, replace)
        version = bundle.content_hash[:12]
        return self._as(self.policy, version)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu", checked: bool = True) -> Self:
        """Read a bundle and score its probes on `device`; raises `BundleError` where it is not as it was saved.

        `checked` False: the probes are left to `check_probes`, so that nothing is computed here.
        """
        bundle = read_bundle(path)
        try:
            description = Description.parse(bundle.description, str(path / MANIFEST))
            detector = cls._unpack(bundle, description, torch.device(device))
            normals = safetensors.numpy.load(bundle.files.get("normals.safetensors", _NOTHING))
            detector.normals = Normals.unpacked(normals) if normals else None
            detector.calibrated_at = _calibrated_at(bundle, path)
            probes = safetensors.numpy.load(bundle.files.get("probes.safetensors", _NOTHING))
            if len(probes):
                label = torch.from_numpy(probes["label"]) if "label" in probes else None
                detector.probes = Batch(torch.from_numpy(probes["images"]), label)
                detector._probes_gave = probes["scores"]
            if checked:
                detector.check_probes(path)
        except (ConfigError, SafetensorError, KeyError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise BundleError(f"{path} is damaged ({reason}); restore the bundle from a copy") from None
        return detector

    @classmethod
    def _unpack(cls, bundle: Bundle, description: "Description", device: torch.device) -> Self:
        spec, count = description.spec, description.members
        numbers = safetensors.numpy.load(bundle.files["reference.safetensors"])
        weights = safetensors.torch.load(bundle.files["weights.safetensors"])
        members = [unpacked_member(spec, i, weights, numbers).on(device) for i in range(count)]
        sets = sum(name.startswith("calibration.") for name in numbers)
        calibration = Calibration.of([numbers[f"calibration.{i}"] for i in range(sets)], description.groups)
        policy = policy_of(calibration, description.alpha, description.mode)
        version, kinds = bundle.content_hash[:12], description.known_kinds
        return cls(spec, members, calibration, policy, version, numbers["seen"], kinds)

    def _description(self) -> dict[str, Any]:
        description = Description(
            spec=self.spec,
            members=len(self.members),
            alpha=self.policy.alpha,
            mode=self.policy.mode,
            groups=self.calibration.groups,
            calibration_images=self.calibration.n,
            seen_images=len(self.seen),
            known_kinds=self.known_kinds,
            data_fingerprint=fingerprint_of(self.seen),
            torch=str(torch.__version__),
        )
        return dict(description.model_dump(mode="json"))

    def _files(self, probes: Batch | None) -> dict[str, bytes]:
        weights, numbers = packed_members(self.members)
        numbers["seen"] = self.seen
        numbers |= {f"calibration.{i}": scores for i, scores in enumerate(self.calibration.scores)}
        files = {
            "weights.safetensors": safetensors.torch.save(weights),
            "reference.safetensors": safetensors.numpy.save(numbers),
        }
        if self.normals is not None:
            files["normals.safetensors"] = safetensors.numpy.save(self.normals.packed())
        if probes is not None and len(probes.images):
            kept = {"images": probes.images.numpy(), "scores": self._probe_scores(probes)}
            kept |= {} if probes.label is None else {"label": probes.label.numpy()}
            files["probes.safetensors"] = safetensors.numpy.save(kept)
        return files

    def _probe_scores(self, probes: Batch) -> Floats:
        pieces = torch.split(probes.images, 32)
        labels = torch.split(probes.label, 32) if probes.label is not None else repeat(None)
        with torch.inference_mode():
            judged = [self._judge(Batch(*batch), False) for batch in zip(pieces, labels, strict=False)]
        return np.array([score for one in judged for score in one.score])

    def check_probes(self, path: Path) -> None:
        """Score the probes that came with the bundle `path`; raises `BundleError` where they get other scores here."""
        if self.probes is None or self._probes_gave is None:
            return
        again, scores = self._probe_scores(self.probes), self._probes_gave
        moved = float(np.abs(again - scores).max()) / self.calibration.unit
        if not moved <= PROBE_TOLERANCE:
            raise BundleError(
                f"{path} scores its own probe images differently on {self.device} (by {moved:.2g} quartile ranges, "
                f"{PROBE_TOLERANCE:g} allowed); use the device and versions it was made with, or train again here"
            )


class Description(Spec):
    """What `bundle.yaml` says of a detector."""

    spec: DetectorSpec
    members: int = Field(ge=1, le=20)
    alpha: float = Field(gt=0, lt=1)
    mode: Mode
    groups: int | None = Field(ge=0)
    calibration_images: int
    seen_images: int
    known_kinds: tuple[str, ...] = ()
    data_fingerprint: str
    torch: str


def fingerprint_of(seen: npt.NDArray[np.uint64]) -> str:
    """16 hex digits that stand for a set of picture hashes, in whatever order they came."""
    return hashlib.sha256(np.sort(seen).tobytes()).hexdigest()[:16]


def _calibrated_at(bundle: Bundle, path: Path) -> float:
    """Seconds since 1970. Older bundles do not tell; what they say is when they came onto this disk, at the latest."""
    try:
        return datetime.fromisoformat(str(bundle.metrics["calibrated_at"])).timestamp()
    except (KeyError, ValueError):
        return (path / MANIFEST).stat().st_mtime

"""The verb `explore`: what a trained model's latent space looks like, as PNGs and one page that opens offline."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from anomaly_vae import explore_page, latent_space
from anomaly_vae import explore_sections as sections_of
from anomaly_vae.bundle import MANIFEST, read_bundle, write_durably
from anomaly_vae.data import DataSpec, open_pictures
from anomaly_vae.detector import Detector
from anomaly_vae.engine import Engine
from anomaly_vae.errors import ConfigError
from anomaly_vae.explore_page import Section
from anomaly_vae.explore_sections import Measured
from anomaly_vae.latent_space import Usage
from anomaly_vae.looking import Looked, look_at

MOST_ALPHAS = 10
PAGE = "index.html"
_HEAD = 64 * 1024
"""So much of a page tells which files belong to it."""


@dataclass(frozen=True)
class Explored:
    """What `explore` wrote, and its figures; None where there was no picture to measure them on.

    `kl`: mean KL in nats of each latent, None also where the law has no KL that falls apart into latents. `usage`: what
    each latent tells of pictures, in terms of `quantity`: "KL", or "variance of the code".
    """

    out: Path
    files: list[str]
    kl: list[float] | None
    quantity: str | None
    usage: list[float] | None
    active_units: int | None
    training_pictures: int
    test_pictures: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for machines."""
        return vars(self) | {"out": str(self.out)}

    def lines(self) -> list[str]:
        """What a person wants to know of it."""
        looked = f"looked at {self.training_pictures:,} training and {self.test_pictures:,} test pictures"
        units = f"active latent units: {self.active_units} of {len(self.usage)}" if self.usage is not None else ""
        done = f"written to {self.out}: {len(self.files) - 1} PNGs and {PAGE}, which opens in any browser, offline"
        return [line for line in (looked if self.training_pictures + self.test_pictures else "", units, done) if line]


def explore(
    engine: Engine,
    bundle: Path,
    out: Path,
    root: Path | str | None = None,
    data: DataSpec | None = None,
    sums: Sequence[str] = (),
    alphas: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    seed: int = 0,
) -> Explored:
    """Write PNGs and `index.html` into `out`; the same seed on the same machine writes the same bytes.

    `sums`: names such as "smiling-neutral": the difference of the two labels' mean codes is added to pictures of the
    second, `alphas` times. PNGs that an earlier `explore` wrote into `out` and this one does not are removed. Raises
    `ConfigError` for an unknown label or a model without sums, `DataError` where there are too few pictures.
    """
    _check_place(out)
    detector = engine.detector
    if detector.spec.tiles is not None:
        raise ConfigError("this model knows tiles, not whole pictures; give a bundle trained without tiles")
    _check_sums(detector, sums, root)
    looked, pairs, notes = None, [], list(_notes(detector))
    if root is not None:
        pictures = open_pictures(root, data or detector.spec.data, detector.image)
        pairs = [sections_of.labels_of(text, {item.label for item in pictures.items}) for text in sums]
        looked, remarks = look_at(engine, pictures, seed)
        notes += remarks
    stored = read_bundle(bundle)
    measured = _measured(detector, looked, stored.files.get("probes.safetensors"))
    usage = Usage.of(detector.members[0].model.law, measured.codes) if measured else None
    sections = list(_sections(engine, stored.metrics, looked, measured, usage, pairs, alphas, seed))
    notes += _missing(detector, sections, looked, measured)
    name = bundle.resolve().name
    facts = f"bundle {name}, version {detector.version}, preset {detector.spec.preset}, seed {seed}"
    html = explore_page.page(f"Latent space of {name}", facts, notes, sections, looked.sheet if looked else None)
    in_kl = usage is not None and usage.quantity == "KL"
    return Explored(
        out=out,
        files=_write(out, sections, html),
        kl=usage.values.tolist() if usage is not None and in_kl else None,
        quantity=usage.quantity if usage else None,
        usage=usage.values.tolist() if usage else None,
        active_units=int(usage.active.sum()) if usage else None,
        training_pictures=int(looked.training.sum()) if looked else 0,
        test_pictures=int((~looked.training).sum()) if looked else 0,
        notes=notes,
    )


def _sections(
    engine: Engine,
    metrics: dict[str, Any],
    looked: Looked | None,
    measured: Measured | None,
    usage: Usage | None,
    pairs: Sequence[tuple[str, str]],
    alphas: Sequence[float],
    seed: int,
) -> Iterator[Section]:
    """All that can be shown, in order."""
    detector, model = engine.detector, engine.detector.members[0].model
    decodes = model.spec.decodes
    maybe = [sections_of.samples(model, measured, seed)] if decodes else []
    if looked is not None:
        maybe += sections_of.of_pictures(engine, looked, seed)
        maybe += sections_of.arithmetic(detector, looked.pictures, pairs, alphas, seed)
    if decodes:
        maybe.append(sections_of.traversals(model, usage, looked, measured, seed))
    if not model.spec.network.sees_input:
        maybe += sections_of.usage_bars(usage, measured.source if measured else "")
    maybe += sections_of.curves(detector.spec, metrics)
    yield from (section for section in maybe if section is not None)


def alphas_of(text: str) -> list[float]:
    """Read "0.5,1,2"; raises `ConfigError`."""
    try:
        alphas = [float(part) for part in text.split(",")]
    except ValueError:
        alphas = []
    if not 0 < len(alphas) <= MOST_ALPHAS or not np.isfinite(alphas).all():
        raise ConfigError(f"--alpha {text!r}: give 1 to {MOST_ALPHAS} numbers with commas between, such as 0.5,1,2")
    return alphas


def _check_sums(detector: Detector, sums: Sequence[str], root: Path | str | None) -> None:
    if sums and root is None:
        raise ConfigError("--add needs pictures; give their folder by --data")
    if sums and detector.spec.model.backbone is not None:
        raise ConfigError(
            "--add decodes codes, and with model.backbone they give features, no pictures; leave out --add"
        )
    if sums and detector.spec.model.network.sees_input:
        raise ConfigError(
            "--add moves codes, but with skips the decoder needs the picture itself beside its code; leave out --add, "
            "or train with -o model.network.skips=false"
        )


def _notes(detector: Detector) -> Iterator[str]:
    """What holds for all sections."""
    spec = detector.spec.model
    if len(detector.members) > 1:
        yield (
            f"The detector holds {len(detector.members)} models; latents and pictures are those of the first. "
            "Some of its training pictures were trained on by the others only. Verdicts are those of all together."
        )
    if spec.condition is not None:
        whose = "its own class" if detector.wants_classes else "the class that the model finds most probable for it"
        walks = "" if not spec.decodes else ", and walks keep the class of the picture that they start from"
        yield f"The model knows {len(spec.condition.classes)} classes: a picture is decoded as {whose}{walks}."
    if spec.latent.kind == "von_mises_fisher":
        yield "Codes lie on the unit sphere; draws, sums and walks that leave it are brought to its nearest point."
    if spec.backbone is not None:
        yield (
            "The model sees features of a backbone, and decodes codes to features, which are no pictures. "
            "Reconstructions, samples, traversals, interpolation and sums are left out."
        )
    if spec.network.sees_input:
        yield (
            "The network has skips: its decoder sees the picture beside z, so that no z makes a picture by itself. "
            "Samples, traversals, interpolation, sums and the use of each latent are left out."
        )


def _missing(
    detector: Detector, sections: Sequence[Section], looked: Looked | None, measured: Measured | None
) -> Iterator[str]:
    """What could not be made for want of pictures."""
    if looked is None:
        made = ", ".join(section.title.lower() for section in sections) or "nothing"
        codes = f"; codes are those of {measured.source}" if measured else ", since the bundle keeps no probe pictures"
        yield f"Without --data only this is made: {made}{codes}."
    if detector.spec.model.decodes and not any(section.name == "samples" for section in sections):
        yield "This law of z has no prior, so samples need the codes of at least two pictures; give some by --data."


def _check_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose another --out")
    if (out / MANIFEST).exists() or (out.is_dir() and any(out.iterdir()) and not (out / PAGE).is_file()):
        raise ConfigError(f"{out} holds other things; choose another --out, one that does not exist yet")


def _write(out: Path, sections: Sequence[Section], html: str) -> list[str]:
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        stale = set(_written_before(out))
        for section in sections:
            if section.png is not None and section.file is not None:
                files.append(section.file)
                write_durably(out / section.file, section.png)
        # The old page goes last: until then it still tells what is left of it.
        for name in sorted(stale - set(files)):
            (out / name).unlink(missing_ok=True)
        write_durably(out / PAGE, html.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    return [*files, PAGE]


def _written_before(out: Path) -> list[str]:
    """PNGs of an earlier `explore` here."""
    if not (out / PAGE).is_file():
        return []
    with (out / PAGE).open("rb") as page:
        return explore_page.files_of(page.read(_HEAD).decode(errors="replace"))


def _measured(detector: Detector, looked: Looked | None, probes: bytes | None) -> Measured | None:
    """Codes of the training pictures looked at, or where there are none of test pictures, or else of the probes."""
    if looked is not None:
        rows = looked.training if looked.training.any() else ~looked.training
        kind = "training" if looked.training.any() else "test"
        return Measured(looked.codes.at(rows), f"{int(rows.sum()):,} {kind} pictures")
    kept = safetensors.numpy.load(probes) if probes is not None else {}
    if "images" not in kept:
        return None
    label = torch.from_numpy(kept["label"]) if "label" in kept else None
    found = latent_space.codes(detector.members[0].model, torch.from_numpy(kept["images"]), label)
    return Measured(found, f"the bundle's {len(found.mu)} probe pictures")

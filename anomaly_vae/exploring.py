"""The verb `explore`: what a trained model's latent space looks like, as PNGs and one page that opens offline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from anomaly_vae import explore_page, latent_space
from anomaly_vae import explore_sections as sections_of
from anomaly_vae.bundle import MANIFEST, read_bundle, write_durably
from anomaly_vae.data import DataSpec, open_pictures
from anomaly_vae.detector import Detector
from anomaly_vae.engine import Engine
from anomaly_vae.errors import ConfigError
from anomaly_vae.explore_page import Section
from anomaly_vae.fitting import ACTIVE_NATS
from anomaly_vae.looking import Looked, look_at
from anomaly_vae.model import AutoEncoder

MOST_ALPHAS = 10
PAGE = "index.html"


@dataclass(frozen=True)
class Explored:
    """What `explore` wrote, and its figures: mean KL in nats of each latent (None where there was no picture)."""

    out: Path
    files: list[str]
    kl: list[float] | None
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
        units = f"active latent units: {self.active_units} of {len(self.kl)}" if self.kl is not None else ""
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
    second, `alphas` times. Raises `ConfigError` for an unknown label, `DataError` where there are too few pictures.
    """
    _check_place(out)
    if sums and root is None:
        raise ConfigError("--add needs pictures; give their folder by --data")
    detector, model = engine.detector, engine.detector.members[0].model
    looked, pairs, notes = None, [], _notes(detector)
    if root is not None:
        pictures = open_pictures(root, data or detector.spec.data, detector.image)
        pairs = [sections_of.labels_of(text, {item.label for item in pictures.items}) for text in sums]
        looked, remarks = look_at(engine, pictures, seed)
        notes += remarks
    stored = read_bundle(bundle)
    kl, source = _mean_kl(model, looked, stored.files.get("probes.safetensors"))
    if looked is None:
        notes.append(f"Without --data only this is made: samples, traversals from the prior's mean, curves, {source}.")
    sections = [sections_of.samples(model, looked, seed)]
    if looked is not None:
        sections += sections_of.of_pictures(engine, looked, seed)
        sections += sections_of.arithmetic(model, looked.pictures, pairs, alphas, seed)
    sections.append(sections_of.traversals(model, kl, looked))
    sections += [*sections_of.kl_bars(kl, source), *sections_of.curves(stored.metrics)]
    name = bundle.resolve().name
    facts = f"bundle {name}, version {detector.version}, preset {detector.spec.preset}, seed {seed}"
    html = explore_page.page(f"Latent space of {name}", facts, notes, sections, looked.sheet if looked else None)
    return Explored(
        out=out,
        files=_write(out, sections, html),
        kl=None if kl is None else kl.tolist(),
        active_units=None if kl is None else int((kl > ACTIVE_NATS).sum()),
        training_pictures=int(looked.training.sum()) if looked else 0,
        test_pictures=int((~looked.training).sum()) if looked else 0,
        notes=notes,
    )


def alphas_of(text: str) -> list[float]:
    """Read "0.5,1,2"; raises `ConfigError`."""
    try:
        alphas = [float(part) for part in text.split(",")]
    except ValueError:
        alphas = []
    if not 0 < len(alphas) <= MOST_ALPHAS or not np.isfinite(alphas).all():
        raise ConfigError(f"--alpha {text!r}: give 1 to {MOST_ALPHAS} numbers with commas between, such as 0.5,1,2")
    return alphas


def _notes(detector: Detector) -> list[str]:
    if len(detector.members) == 1:
        return []
    return [
        f"The detector holds {len(detector.members)} models; latents and pictures are those of the first. "
        "Some of its training pictures were trained on by the others only. Verdicts are those of all together."
    ]


def _check_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose another --out")
    if (out / MANIFEST).exists() or (out.is_dir() and any(out.iterdir()) and not (out / PAGE).is_file()):
        raise ConfigError(f"{out} holds other things; choose another --out, one that does not exist yet")


def _write(out: Path, sections: Sequence[Section], html: str) -> list[str]:
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for section in sections:
            if section.png is not None:
                files.append(f"{section.name}.png")
                write_durably(out / files[-1], section.png)
        write_durably(out / PAGE, html.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    return [*files, PAGE]


def _mean_kl(model: AutoEncoder, looked: Looked | None, probes: bytes | None) -> tuple[Tensor | None, str]:
    """Mean KL (D,) in nats, and in words what it was measured on."""
    if looked is not None:
        rows = looked.training if looked.training.any() else ~looked.training
        kind = "training" if looked.training.any() else "test"
        return looked.kl[torch.from_numpy(rows)].mean(0), f"the KL of {int(rows.sum()):,} {kind} pictures"
    images = safetensors.numpy.load(probes).get("images") if probes is not None else None
    if images is None:
        return None, "and no KL, since the bundle keeps no probe pictures"
    kl = latent_space.codes(model, torch.from_numpy(images))[1].mean(0)
    return kl, f"the KL of the bundle's {len(images)} probe pictures"

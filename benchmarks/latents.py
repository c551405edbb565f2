"""Latent spaces shown on real pictures: faces that smile by arithmetic, digits in 2 and in 28 latents.

    python benchmarks/latents.py --faces DIR --mnist DIR --out build/latents

Faces (neutral/ and smiling/, one file a person in each): preset `dfc-vae` with 200 latents learns both pictures of the
first 70 people; all figures and pictures are of the other 32. All faces are brought to one height first, since the
smiling ones stand lower. The smile is the difference of the training people's mean codes. Two judges that never see a
code: a classifier of smiles fitted on the training people's pictures, and the nearest neighbour among the held-out
people's neutral pictures.

Digits (MNIST, its training part only): preset `lecture-mlp` with 2 and 28 latents.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faces_framing
import numpy as np
import numpy.typing as npt
import torch
from charts import PALETTE, Panel, Series, chart_png
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from anomaly_vae import latent_space
from anomaly_vae.data import Pictures, open_pictures
from anomaly_vae.errors import AnomalyVaeError
from anomaly_vae.fabric import make_fabric
from anomaly_vae.fitting import Fitting
from anomaly_vae.grids import Row, arrays, grid_png
from anomaly_vae.model import AutoEncoder
from anomaly_vae.objectives import Objective
from anomaly_vae.presets import read_preset
from anomaly_vae.recipe import DetectorSpec

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ALPHAS = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
ENOUGH = 0.9
"""The alpha reported is the smallest at which so many of the *training* people's shifted faces are called smiling."""
_SHOWN = 8


def main() -> int:
    """Run, print the figures, write the pictures."""
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "torch": str(torch.__version__)}
    try:
        if options.faces is not None:
            found["faces"] = smiles(options)
        if options.mnist is not None:
            found["digits"] = handwriting(options)
    except AnomalyVaeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    (options.out / "latents.json").write_text(json.dumps(found, indent=2))
    print(json.dumps({key: value for key, value in found.items() if key != "digits"}, indent=2))
    print(f"written to {options.out}")
    return 0


def parsed() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description="Latent spaces shown on real pictures.")
    parser.add_argument("--faces", type=Path, help="folder with neutral/ and smiling/")
    parser.add_argument("--mnist", type=Path, help="folder with the MNIST files")
    parser.add_argument("--out", type=Path, default=Path("build/latents"))
    parser.add_argument("--people", type=int, default=70, help="people to learn from, by name")
    parser.add_argument("--side", type=int, default=64, help="pixels of a face's side")
    parser.add_argument("--epochs", type=int, default=320, help="epochs of the faces")
    parser.add_argument("--steps", type=int, default=4000, help="steps of the digits")
    parser.add_argument("--held", type=int, default=2000, help="digits that are not trained on")
    parser.add_argument("--as-they-are", action="store_true", help="do not bring the faces to one height")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--override", action="append", default=[], help="KEY.SUB=VALUE for the faces' recipe")
    options = parser.parse_args()
    for name in ("faces", "mnist"):
        place = getattr(options, name)
        if place is not None and not place.is_dir():
            print(f"not measured here: there is no folder {place}; give another --{name}", file=sys.stderr)
            setattr(options, name, None)
    return options


@dataclass(frozen=True)
class Faces:
    """Rows of pictures by expression and by whether the person is learnt from, people in one order."""

    pictures: Pictures
    neutral: Indices
    smiling: Indices
    held_neutral: Indices
    held_smiling: Indices


def divided(spec: DetectorSpec, root: Path, people: int) -> Faces:
    """The faces under `root`, the first `people` by name to learn from."""
    assert spec.image is not None
    pictures = open_pictures(root, spec.data, spec.image)
    rows: dict[str, dict[str, int]] = {"neutral": {}, "smiling": {}}
    for i, item in enumerate(pictures.items):
        if item.path is not None and item.label in rows:
            rows[item.label][item.path.name] = i
    of = {kind: np.array([found[name] for name in sorted(found)], np.int64) for kind, found in rows.items()}
    parts = [of[kind][part] for part in (slice(people), slice(people, None)) for kind in ("neutral", "smiling")]
    return Faces(pictures, *parts)


def aligned(options: argparse.Namespace) -> tuple[Path, int]:
    """The faces at one height, and by how many rows of 128 the smiling ones stood lower.

    Otherwise a smile is first of all a face that stands lower, for the model as well as for the judges. The number is
    that of the training people.
    """
    found = faces_framing.open_faces(options.faces, argparse.Namespace(first=options.people, people=options.people))
    shift = int(np.median(faces_framing.shifts(found, options.people)))
    if options.as_they_are:
        return options.faces, shift
    return faces_framing.write_aligned(found, shift, options.out / "aligned"), shift


def learn(
    spec: DetectorSpec, pictures: Pictures, train: Indices, held: Indices, seed: int
) -> tuple[AutoEncoder, dict[str, Any]]:
    """The model after the last epoch, and what is worth telling of it."""
    assert spec.image is not None
    shape = (spec.image.channels, spec.image.height, spec.image.width)
    objective = Objective(spec.objective, spec.model.build(shape, seed))
    started = time.monotonic()

    def tell(progress: Any) -> None:
        if progress.epoch % max(1, progress.epochs // 10) == 0:
            print(f"  epoch {progress.epoch}/{progress.epochs}  loss {progress.loss:.1f}", flush=True)

    fitted = Fitting(make_fabric("cpu", "32-true", None), objective, spec.training, pictures, train, held, seed).run(
        None, tell
    )
    return objective.model, {
        "preset": spec.preset,
        "latents": spec.model.latent.size,
        "parameters": sum(weight.numel() for weight in objective.model.parameters()),
        "epochs": fitted.epochs,
        "seconds": round(time.monotonic() - started, 1),
        "active_units": fitted.active_units,
        "held_out_nats": fitted.history[-1]["held_out"],
    }


def smiles(options: argparse.Namespace) -> dict[str, Any]:
    """Neutral faces of people never seen, made to smile, and judged."""
    spec = read_preset(
        "dfc-vae",
        [
            f"image={{height: {options.side}, width: {options.side}, channels: 3}}",
            "data.normal=[neutral,smiling]",
            f"training.epochs={options.epochs}",
            "training.batch_size=28",
            "training.select=last",
            # A mirrored or slightly moved face is a face too: with 140 pictures to learn from that matters most.
            "objective.augmentation={flip: true, shift: 0.02, zoom: 0.02, brightness: 0.08}",
            "model.network.dropout=0",
            *options.override,
        ],
    )
    root, shift = aligned(options)
    faces = divided(spec, root, options.people)
    train = np.concatenate([faces.neutral, faces.smiling])
    held = np.concatenate([faces.held_neutral, faces.held_smiling])
    model, told = learn(spec, faces.pictures, train, held, options.seed)
    images = faces.pictures.images(np.arange(len(faces.pictures)))
    codes = latent_space.codes(model, images).mu
    direction = latent_space.difference(codes[faces.smiling], codes[faces.neutral])
    judge = smile_classifier(images, faces)
    recognise = Recogniser(images[train], images[faces.held_neutral])
    rows = []
    for alpha in ALPHAS:
        shifted = [
            latent_space.decode(model, codes[some] + alpha * direction) for some in (faces.neutral, faces.held_neutral)
        ]
        rows.append(
            {
                "alpha": alpha,
                "training_called_smiling": float(judge.predict(flat(shifted[0])).mean()),
                "held_out_called_smiling": float(judge.predict(flat(shifted[1])).mean()),
                "held_out_recognised": recognise(shifted[1]),
            }
        )
    chosen = next((row for row in rows if row["training_called_smiling"] >= ENOUGH), rows[-1])
    called = judge.predict(flat(images[held]))
    truth = np.repeat([0, 1], len(faces.held_neutral))
    write_faces(options.out, model, images, codes, direction, faces, chosen["alpha"])
    return told | {
        "people": [len(faces.neutral), len(faces.held_neutral)],
        "smiling_stood_lower_by_rows_of_128": shift,
        "squared_error_training": squared_error(model, images[train], codes[train]),
        "squared_error_held_out": squared_error(model, images[held], codes[held]),
        "classifier_accuracy_on_held_out_pictures": float((called == truth).mean()),
        "recognised_in_their_real_smiling_picture": recognise(images[faces.held_smiling]),
        "by_alpha": rows,
        "chosen_alpha": chosen,
    }


def smile_classifier(images: Tensor, faces: Faces) -> Pipeline:
    """Smiling or not by the pixels of the training people's pictures: 40 principal components, logistic regression."""
    rows = np.concatenate([faces.neutral, faces.smiling])
    truth = np.repeat([0, 1], len(faces.neutral))
    judge = make_pipeline(PCA(min(40, len(rows) - 1)), StandardScaler(), LogisticRegression(C=0.1, max_iter=5000))
    judge.fit(flat(images[rows]), truth)
    return judge


class Recogniser:
    """Who is it: the nearest neutral picture by cosine between whitened principal components of the pixels.

    The "MahCosine" distance of face recognition (Beveridge et al. 2005), fitted on the training people's pictures.
    """

    def __init__(self, learnt: Tensor, gallery: Tensor) -> None:
        self.pca = PCA(min(60, len(learnt) - 1), whiten=True).fit(flat(learnt))
        self.gallery = self._directions(gallery)

    def __call__(self, pictures: Tensor) -> float:
        """Share of `pictures`, in the gallery's order, whose nearest one is their own."""
        nearest = (self._directions(pictures) @ self.gallery.T).argmax(1)
        return float((nearest == np.arange(len(pictures))).mean())

    def _directions(self, pictures: Tensor) -> Floats:
        found = self.pca.transform(flat(pictures))
        return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float64)


def squared_error(model: AutoEncoder, images: Tensor, codes: Tensor) -> float:
    """Mean over pictures, pixels and channels, of values in [0, 1]."""
    rebuilt = latent_space.decode(model, codes)
    return float(((rebuilt.double() - images.double()) / 255).square().mean())


def flat(images: Tensor) -> Floats:
    """uint8 (n, C, H, W) as rows in [0, 1]."""
    return np.asarray(images.flatten(1).double().numpy() / 255, np.float64)


def write_faces(
    out: Path, model: AutoEncoder, images: Tensor, codes: Tensor, direction: Tensor, faces: Faces, alpha: float
) -> None:
    """Grids of rebuilt and of smiling faces, and the codes in the plane."""
    some, learnt = faces.held_neutral[:_SHOWN], faces.neutral[:_SHOWN]
    rebuilt = [
        Row("learnt from", arrays(images[learnt])),
        Row("rebuilt", arrays(latent_space.decode(model, codes[learnt]))),
        Row("never seen", arrays(images[some])),
        Row("rebuilt", arrays(latent_space.decode(model, codes[some]))),
    ]
    (out / "faces-rebuilt.png").write_bytes(grid_png(rebuilt))
    moved = [
        Row(
            f"{step:+.2g} smile" if step else "rebuilt",
            arrays(latent_space.decode(model, codes[some] + step * direction)),
        )
        for step in (-alpha, 0.0, alpha, 1.5 * alpha)
    ]
    rows = [
        Row("neutral", arrays(images[some])),
        *moved,
        Row("truly smiling", arrays(images[faces.held_smiling[:_SHOWN]])),
    ]
    (out / "faces-smile.png").write_bytes(grid_png(rows))
    groups = {
        "neutral, learnt from": faces.neutral,
        "smiling, learnt from": faces.smiling,
        "neutral, never seen": faces.held_neutral,
        "smiling, never seen": faces.held_smiling,
    }
    (out / "faces-map.png").write_bytes(chart_png(map_panels(codes, groups)))


def map_panels(codes: Tensor, groups: dict[str, Indices]) -> list[Panel]:
    """t-SNE and PCA of the codes of these rows, coloured by group."""
    rows = np.concatenate(list(groups.values()))
    plane, (first, second) = latent_space.pca_plane(codes[rows])
    panels: list[Panel] = []
    for title, points in (
        ("t-SNE", latent_space.tsne_plane(codes[rows], 0)),
        (f"PCA ({first:.0%} and {second:.0%} of the variance)", plane),
    ):
        series, before = [], 0
        for (name, own), colour in zip(groups.items(), PALETTE, strict=False):
            part = points[before : before + len(own)]
            before += len(own)
            series.append(Series(name if not panels else "", part[:, 0], part[:, 1], colour, dots=True))
        panels.append(Panel(title, "", "", series, bare=True))
    return panels


def handwriting(options: argparse.Namespace) -> list[dict[str, Any]]:
    """VAEs of handwriting with 2 and with 28 latents, of the same pictures."""
    given = [f"training.steps={options.steps}", "training.select=last", "data.part=train"]
    given.append(f"data.normal={json.dumps([str(i) for i in range(10)])}")
    specs = [read_preset("lecture-mlp", [*given, f"model.latent.size={latents}"]) for latents in (2, 28)]
    assert specs[0].image is not None
    pictures = open_pictures(f"mnist:{options.mnist}", specs[0].data, specs[0].image)
    return [digits(options, spec, pictures) for spec in specs]


def digits(options: argparse.Namespace, spec: DetectorSpec, pictures: Pictures) -> dict[str, Any]:
    """One of them: rebuilt, drawn from the prior, and where its classes lie."""
    latents = spec.model.latent.size
    order = np.random.default_rng(options.seed).permutation(len(pictures))
    train, held = order[: -options.held], order[-options.held :]
    model, told = learn(spec, pictures, train, held[: options.held // 2], options.seed)
    images = pictures.images(held)
    codes = latent_space.codes(model, images).mu
    labels = np.array([pictures.items[i].label for i in held])
    shown = [int(np.flatnonzero(labels == str(digit))[k]) for digit in range(10) for k in range(2)]
    rebuilt = latent_space.decode(model, codes[shown])
    grid = [Row("never seen", arrays(images[shown])), Row("rebuilt", arrays(rebuilt))]
    (options.out / f"digits-{latents}-rebuilt.png").write_bytes(grid_png(grid))
    drawn = manifold() if latents == 2 else latent_space.draw_prior(model, 200, options.seed)
    rows = [Row("", arrays(part)) for part in torch.split(latent_space.decode(model, drawn), 20)]
    (options.out / f"digits-{latents}-drawn.png").write_bytes(grid_png(rows))
    groups = {str(digit): np.flatnonzero(labels == str(digit)) for digit in range(10)}
    (options.out / f"digits-{latents}-map.png").write_bytes(chart_png(digit_panels(codes, groups)))
    return told | {"squared_error_held_out": squared_error(model, images, codes)}


def manifold() -> Tensor:
    """A 20 x 20 grid over the plane, evenly spread under the prior: quantiles of N(0, 1) each way."""
    stops = torch.special.ndtri(torch.linspace(0.025, 0.975, 20))
    return torch.stack([torch.stack([x, y]) for y in stops.flip(0) for x in stops])


def digit_panels(codes: Tensor, groups: dict[str, Indices]) -> Sequence[Panel]:
    """The plane itself for 2 latents, else t-SNE and PCA."""
    if codes.shape[1] > 2:
        return map_panels(codes, groups)
    points = codes.numpy()
    series = [
        Series(name, points[rows, 0], points[rows, 1], colour, dots=True)
        for (name, rows), colour in zip(groups.items(), PALETTE, strict=True)
    ]
    return [Panel("codes", "latent 0", "latent 1", series)]


if __name__ == "__main__":
    sys.exit(main())

"""The lecture's exercise on faces: a convolutional VAE that knows neutral faces is shown smiling ones.

    python benchmarks/faces.py FACES

FACES holds neutral/ and smiling/, one picture of each person in both, under the same file name. Learning: 16 neutral
faces, 1,200 epochs, looked at after each third. By person: a calibrated detector from 70 people's neutral faces, tested
on all others; and once more with faces that stand at one height. Writes `faces.json` (figures), `faces.npz` (what the
pictures show), PNGs and `faces.md` into --out.
`python benchmarks/faces_page.py OUT` draws again without training.
"""

import argparse
import csv
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import faces_page
import numpy as np
import numpy.typing as npt
import torch
from faces_framing import Faces, open_faces, plain_scores, separation, shifts, write_aligned
from torch import Tensor

from anomaly_vae import AnomalyVaeError, DetectorSpec, Engine
from anomaly_vae import latent_space as space
from anomaly_vae.data import Pictures
from anomaly_vae.errors import ConfigError
from anomaly_vae.evaluation import evaluate
from anomaly_vae.fabric import make_fabric
from anomaly_vae.fitting import Fitting, Progress
from anomaly_vae.grids import arrays
from anomaly_vae.likelihoods import Gaussian
from anomaly_vae.metrics import detection
from anomaly_vae.model import AutoEncoder
from anomaly_vae.objectives import Objective
from anomaly_vae.observations import Observation
from anomaly_vae.presets import read_preset
from anomaly_vae.scores import KullbackLeibler, Mahalanobis, NegativeElbo, SquaredError
from anomaly_vae.seeds import seed_of
from anomaly_vae.training import train

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Columns = dict[str, Floats]

SCORES = ("squared_error", "negative_elbo", "mahalanobis")
LECTURE_SIGMA = math.sqrt(0.5)
"""The sigma under which -log p(x given z) is the sum of squares plus a constant."""
_SHOWN = 16


class Run(NamedTuple):
    """A model to train: how many latents, and its likelihood's sigma, as the lecture's or `optimal`."""

    latents: int
    optimal: bool = False

    @property
    def name(self) -> str:
        return f"{self.latents}-optimal" if self.optimal else str(self.latents)

    def spec(self, options: argparse.Namespace, epochs: int, batch: int, more: Sequence[str] = ()) -> DetectorSpec:
        """The preset `lecture-conv` with this run's settings, the sum of squares + KL as its loss."""
        how = ["model.likelihood.sigma=optimal"] if self.optimal else ["objective.loss.kind=mse"]
        own = [f"model.latent.size={self.latents}", f"training.epochs={epochs}", f"training.batch_size={batch}"]
        return read_preset("lecture-conv", [*how, *own, f"seed={options.seed}", *more])


def main() -> int:
    options, started = parsed(), time.monotonic()
    runs = [*(Run(latents) for latents in options.latents), Run(options.optimal, True)]
    faces = open_faces(options.faces, options)
    open_out(options.out)
    learning, shown = learn(faces, runs, options)
    tested = list(by_person(faces, runs, options, options.out))
    control = framing(faces, runs, options)
    minutes = (time.monotonic() - started) / 60
    found = {"facts": facts(faces, options, minutes), "learning": learning, "by_person": tested, "framing": control}
    (options.out / "faces.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    np.savez_compressed(options.out / "faces.npz", **shown)  # type: ignore[arg-type]
    files = faces_page.write_page(options.out)
    print(f"written to {options.out} in {minutes:.1f} minutes: faces.json, faces.npz, {', '.join(files)}")
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("faces", type=Path, help="folder that holds neutral/ and smiling/")
    parser.add_argument("--out", type=Path, default=Path("build/faces"))
    parser.add_argument("--latents", type=int, nargs="+", default=[20, 30, 32, 50])
    parser.add_argument("--optimal", type=int, default=32, help="latents of the model trained with the optimal sigma")
    parser.add_argument("--first", type=int, default=16, help="people whose neutral faces are learnt")
    parser.add_argument("--epochs", type=int, default=1200, help="of learning; looked at after each third")
    parser.add_argument("--people", type=int, default=70, help="people a detector is made from; the rest is its test")
    parser.add_argument("--split-epochs", type=int, default=200, help="of the detectors' training")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="a minute: few epochs, two sizes; the figures mean nothing"
    )
    options = parser.parse_args()
    if options.quick:
        options.latents, options.epochs, options.split_epochs = [20, 32], 15, 5
    if options.epochs < 3 or options.first < 2:
        parser.error("learning takes at least 3 epochs and 2 people")
    return options


def open_out(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; choose another --out") from None


def learn(
    faces: Faces, runs: Sequence[Run], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, npt.NDArray[Any]]]:
    """The lecture's part: figures of every run at every stage, and the pictures and maps to show."""
    k = options.first
    groups = {
        "learnt": faces.neutral[:k],
        "unseen": faces.neutral[k:],
        "learnt_smiling": faces.smiling[:k],
        "unseen_smiling": faces.smiling[k:],
    }
    shown = {f"faces.{name}": faces.pictures.images(rows[:_SHOWN]).numpy() for name, rows in groups.items()}
    found = []
    for run in runs:
        started = time.monotonic()
        stages, history = trained_stages(faces, run, options)
        rows = []
        for epoch, model in stages.items():
            seen = {name: look(model, faces.pictures, some, groups["learnt"]) for name, some in groups.items()}
            rows.append(stage_figures(epoch, model, seen))
            for name, chosen in groups.items():
                images = faces.pictures.images(chosen[:_SHOWN])
                rebuilt = space.reconstruct(model, images, space.codes(model, images))
                shown[f"rebuilt.{run.name}.{epoch}.{name}"] = np.stack(arrays(rebuilt))
        shown |= maps(run, model, faces.pictures, groups, options.seed)
        found.append({"run": run.name, "latents": run.latents, "optimal": run.optimal, "stages": rows})
        found[-1] |= {"history": history, "minutes": (time.monotonic() - started) / 60}
        print(f"learnt with {run.name}: {found[-1]['minutes']:.1f} minutes", flush=True)
    return found, shown


def trained_stages(
    faces: Faces, run: Run, options: argparse.Namespace
) -> tuple[dict[int, AutoEncoder], list[dict[str, float]]]:
    """One training; the model as it was after each third of it, and a row of losses an epoch.

    `history`: `squares` (sum over a face's pixels) and `kl` as trained on, `held_out` the loss of the unseen neutral
    faces, which is only looked at: nothing stops early or is chosen by it.
    """
    spec, k = run.spec(options, options.epochs, options.first), options.first
    shape = faces.pictures.image.channels, faces.pictures.image.height, faces.pictures.image.width
    objective = Objective(spec.objective, spec.model.build(shape, seed_of(spec.seed, "weights", 0)))
    fabric = make_fabric(options.device, spec.training.precision, None)
    fitting = Fitting(fabric, objective, spec.training, faces.pictures, faces.neutral[:k], faces.neutral[k:], spec.seed)
    due = {max(1, options.epochs * third // 3) for third in (1, 2, 3)}
    stages: dict[int, AutoEncoder] = {}

    def keep(progress: Progress) -> None:
        if progress.epoch in due:
            stages[progress.epoch] = deepcopy(objective.model).eval()

    history = fitting.run(None, keep).history
    rows, before = [], math.nan
    for row in history:
        rows.append({"epoch": row["epoch"], "loss": row["loss"], "kl": row["latent"]})
        # Between two measurements the last one is repeated.
        rows[-1] |= (
            {"held_out": row["held_out"]} if math.isfinite(row["held_out"]) and row["held_out"] != before else {}
        )
        before = row["held_out"]
    return stages, rows


def look(model: AutoEncoder, pictures: Pictures, rows: Indices, learnt: Indices) -> Columns:
    """Scores of the pictures at `rows`, and `kl` in nats; Mahalanobis by the codes of the faces `learnt`."""
    codes = space.codes(model, pictures.images(learnt)).mu
    references = {name: torch.from_numpy(value) for name, value in Mahalanobis().fit(codes.double().numpy()).items()}
    references = {name: value.to(model.device) for name, value in references.items()}
    scores = (SquaredError(), NegativeElbo(), Mahalanobis(), KullbackLeibler())
    found: dict[str, list[Tensor]] = {score.kind: [] for score in scores}
    with torch.inference_mode():
        for _, images in pictures.batches(32, rows):
            seen = Observation(model, model.view(images))
            for score in scores:
                found[score.kind].append(score(seen, references).cpu())
    return {kind: torch.cat(values).double().numpy() for kind, values in found.items()}


def stage_figures(epoch: int, model: AutoEncoder, seen: dict[str, Columns]) -> dict[str, Any]:
    """What one model makes of the faces: error by group, separation by score, and its losses in nats."""
    auroc = {}
    for kind in SCORES:
        of = {name: columns[kind] for name, columns in seen.items()}
        auroc[kind] = separation(of["unseen"], of["unseen_smiling"]) | {
            "known_people_smile": detection(of["unseen"], of["learnt_smiling"]).auroc,
            "learnt_as_normal": detection(of["learnt"], of["unseen_smiling"]).auroc,
        }
    error = {name: float(columns["squared_error"].mean()) for name, columns in seen.items()}
    return {"epoch": epoch, "squared_error": error, "auroc": auroc, "elbo": elbo_figures(model, seen)}


def elbo_figures(model: AutoEncoder, seen: dict[str, Columns]) -> dict[str, Any]:
    """The lecture's loss beside the negative ELBO in nats, means over faces in eval mode, learnt and unseen.

    `squares`: E_q of the sum of squared errors. `sigma`: the best one for the learnt faces, sqrt(mean of squares / D).
    `fixed`, `optimal`: -ELBO under sigma = sqrt(1/2), under that one; `bits`: the same in bits for each 8-bit number.
    """
    size, likelihood = math.prod(model.shape), model.likelihood
    assert isinstance(likelihood, Gaussian)
    own = math.exp(float(likelihood.log_scale))
    parts = {}
    for name in ("learnt", "unseen"):
        kl = float(seen[name]["kl"].mean())
        nll = float(seen[name]["negative_elbo"].mean()) - kl
        parts[name] = ((nll - gaussian_nats(0.0, own, size)) * 2 * own**2, kl)
    best = math.sqrt(parts["learnt"][0] / size)
    found: dict[str, Any] = {"sigma": best, "own_sigma": own}
    for name, (squares, kl) in parts.items():
        nats = {how: gaussian_nats(squares, s, size) + kl for how, s in (("fixed", LECTURE_SIGMA), ("optimal", best))}
        bits = {how: 8 + value / size / math.log(2) for how, value in nats.items()}
        found[name] = {"squares": squares, "kl": kl, "lecture_loss": squares + kl, **nats, "bits": bits}
    return found


def gaussian_nats(squares: float, sigma: float, size: int) -> float:
    """-log N(x; mean, sigma^2 I) for `size` numbers whose squared errors sum to `squares`."""
    return 0.5 * size * math.log(2 * math.pi * sigma**2) + squares / (2 * sigma**2)


def maps(
    run: Run, model: AutoEncoder, pictures: Pictures, groups: dict[str, Indices], seed: int
) -> dict[str, npt.NDArray[Any]]:
    """Codes of all faces, brought to the plane by PCA and t-SNE together; and how many each group has."""
    codes = torch.cat([space.codes(model, pictures.images(rows)).mu for rows in groups.values()])
    plane, shares = space.pca_plane(codes)
    maps_of = {"pca": plane, "tsne": space.tsne_plane(codes, seed), "shares": np.array(shares)}
    counts = np.array([len(rows) for rows in groups.values()])
    return {f"{kind}.{run.name}": values for kind, values in maps_of.items()} | {"counts": counts}


def by_person(faces: Faces, runs: Sequence[Run], options: argparse.Namespace, out: Path) -> Iterator[dict[str, Any]]:
    """The honest split: detectors from the first people's neutral faces, figures on everybody else's two pictures."""
    manifest = write_split(faces, options, out)
    k = options.people
    for run in runs:
        more = ["data.normal=[neutral]", "calibration.few_normals=0"]
        spec = run.spec(options, options.split_epochs, 21, more)
        place = out / "bundles" / f"latents-{run.name}"
        made = train(spec, manifest, place, device=options.device, overwrite=True, restart=True)
        assert made is not None
        engine = Engine(made.detector, options.device)
        found = evaluate(engine, manifest)
        normal, abnormal = (engine.judge(faces.pictures.images(rows[k:])) for rows in (faces.neutral, faces.smiling))
        columns = {"fused": (normal.score, abnormal.score)}
        columns |= {kind: (normal.parts[kind], abnormal.parts[kind]) for kind in SCORES}
        print(f"detector with {run.name}: {made.seconds / 60:.1f} minutes", flush=True)
        yield {
            "run": run.name,
            "auroc": {kind: separation(np.array(a), np.array(b)) for kind, (a, b) in columns.items()},
            "alpha": found.policy.alpha,
            "expected_false_alarm_rate": found.policy.expected_false_alarm_rate,
            "normal": found.n_normal,
            "abnormal": found.n_abnormal,
            "false_alarms": found.false_alarms,
            "false_alarm_interval": found.false_alarm_interval,
            "detected": found.detected,
            "squared_error": {
                "unseen": float(np.mean(normal.parts["squared_error"])),
                "unseen_smiling": float(np.mean(abnormal.parts["squared_error"])),
            },
            "pictures": made.metrics["pictures"],
            "minutes": made.seconds / 60,
        }


def framing(faces: Faces, runs: Sequence[Run], options: argparse.Namespace) -> dict[str, Any]:
    """The control: what pictures give away without a network, and detectors of faces that stand at one height.

    The height is that of the people that detectors are made from; nobody of the test takes part in choosing it.
    """
    lower = shifts(faces, options.people)
    place = write_aligned(faces, round(float(np.median(lower))), options.out / "aligned")
    aligned = open_faces(place, options)
    chosen = [run for run in runs if run.latents == options.optimal]
    tenths = {f"{share:g}": float(np.quantile(lower, share)) for share in (0.1, 0.5, 0.9)}
    return {
        "rows": {"quantiles": tenths, "people": options.people, "height": faces.pictures.image.height},
        "plain": {
            "learnt": plain_scores(faces, options.first),
            "by_person": plain_scores(faces, options.people),
            "aligned": plain_scores(aligned, options.people),
        },
        "by_person": list(by_person(aligned, chosen, options, place)),
    }


def write_split(faces: Faces, options: argparse.Namespace, out: Path) -> Path:
    """A manifest: the first people's neutral faces to train and calibrate on, both pictures of the others as test."""
    manifest = out / "split.csv"
    k = options.people
    parts = ((faces.neutral[:k], "train"), (faces.neutral[k:], "test"), (faces.smiling[k:], "test"))
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for rows, part in parts:
            for item in (faces.pictures.items[row] for row in rows):
                assert item.path is not None
                writer.writerow([os.path.relpath(item.path.resolve(), manifest.parent.resolve()), item.label, part])
    return manifest


def facts(faces: Faces, options: argparse.Namespace, minutes: float) -> dict[str, Any]:
    """What was run on what, by what."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scikit-learn")}
    return {
        "people": len(faces.names),
        "learnt": options.first,
        "in_detector": options.people,
        "epochs": options.epochs,
        "split_epochs": options.split_epochs,
        "seed": options.seed,
        "quick": options.quick,
        "minutes": minutes,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AnomalyVaeError as error:
        sys.exit(f"error: {error}")

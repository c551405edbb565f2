"""What `explore` shows, section by section: each makes one PNG grid or one chart."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anomaly_vae import explore_page, latent_space
from anomaly_vae.data import Pictures
from anomaly_vae.engine import Engine
from anomaly_vae.errors import ConfigError, DataError
from anomaly_vae.explore_page import Section
from anomaly_vae.fitting import ACTIVE_NATS
from anomaly_vae.grids import Row, arrays, grid_png
from anomaly_vae.looking import Indices, Looked, drawn
from anomaly_vae.model import AutoEncoder
from anomaly_vae.rendering import heatmap
from anomaly_vae.seeds import seed_of

MOST_TRAVERSED = 16
MOST_OF_A_LABEL = 1000
_SHOWN, _PAIRS, _STEPS = 8, 5, 11
_SAMPLES = (5, 10)
_REACH, _STOPS = 3.0, 9


def of_pictures(engine: Engine, looked: Looked, seed: int) -> Iterator[Section]:
    model = engine.detector.members[0].model
    yield _reconstructions(model, looked, seed)
    yield from _maps(looked, seed)
    if not looked.training.all():
        yield _extremes(engine, looked)
    if len(looked.index) > 1:
        yield _interpolations(model, looked, seed)


def samples(model: AutoEncoder, looked: Looked | None, seed: int) -> Section:
    """What the prior decodes to, and how far the codes of pictures are from it."""
    rows, across = _SAMPLES
    decoded = latent_space.decode(model, latent_space.draw_prior(model, rows * across, seed))
    grid = [Row("", arrays(part)) for part in torch.split(decoded, across)]
    text = "Latents drawn from the prior N(0, I), decoded: what the model believes normal pictures to be."
    if looked is not None and len(looked.index) > 1:
        spread = float(looked.mu.std(0).median())
        text += (
            f" Codes of the pictures looked at have a standard deviation of {spread:.2g} (median over latents) where "
            "the prior has 1: the further above 1, the less samples resemble pictures."
        )
    return Section("samples", "Samples from the prior", text, grid_png(grid))


def _reconstructions(model: AutoEncoder, looked: Looked, seed: int) -> Section:
    grid = []
    for name, rows in (("training", np.nonzero(looked.training)[0]), ("test", np.nonzero(~looked.training)[0])):
        rows = drawn(rows, _SHOWN, seed, f"reconstructed {name}")
        if len(rows):
            images = looked.images(rows)
            grid.append(Row(f"{name} pictures", arrays(images), [looked.label(row) for row in rows]))
            grid.append(Row("reconstructed", arrays(latent_space.decode(model, looked.mu[rows]))))
    text = (
        "Each picture above the decoded mean of its posterior. Training pictures are all those that the detector was "
        "made from: trained on, fitted on, or calibrated with."
    )
    return Section("reconstructions", "Reconstructions", text, grid_png(grid))


def _maps(looked: Looked, seed: int) -> Iterator[Section]:
    if len(looked.index) < latent_space.LEAST_FOR_MAPS:
        return
    plane, (first, second) = latent_space.pca_plane(looked.mu)
    maps = [
        ("t-SNE 1", "t-SNE 2", latent_space.tsne_plane(looked.mu, seed)),
        (f"principal component 1 ({first:.0%} of the variance)", f"2 ({second:.0%})", plane),
    ]
    hover = [
        f"{looked.pictures.items[i].key} ({looked.pictures.items[i].label})"
        + (", training" if looked.training[row] else f", p {looked.p_value[row]:.3g}, score {looked.score[row]:.3g}")
        for row, i in enumerate(looked.index)
    ]
    labels = [looked.label(row) for row in range(len(looked.index))]
    text = (
        "Posterior means of the pictures looked at; left t-SNE, in which neighbours mean something and distances "
        "between groups do not, right PCA. Point at one to see the picture, click a name to hide its points."
    )
    by_class = explore_page.maps_chart(maps, explore_page.series_by_class(labels), hover)
    yield Section("by-class", "Latents by class", text, chart=by_class)
    by_verdict = explore_page.maps_chart(maps, explore_page.series_by_verdict(looked.training, looked.outlier), hover)
    text = "The same points by verdict. What the verdict goes by is the score, of which the latents are only a part."
    yield Section("by-verdict", "Latents by verdict", text, chart=by_verdict)


def _extremes(engine: Engine, looked: Looked) -> Section:
    test = np.nonzero(~looked.training)[0]
    order = test[np.argsort(looked.score[test], kind="stable")]
    grid = []
    for name, rows in (("most normal", order[:_SHOWN]), ("most abnormal", order[::-1][:_SHOWN].copy())):
        images = looked.images(rows)
        judged = engine.judge(images, heat=True)
        assert judged.heat is not None
        heats = [
            heatmap(heat, judged.heat_scale, picture) for heat, picture in zip(judged.heat, arrays(images), strict=True)
        ]
        captions = [looked.label(row) for row in rows]
        grid.append(Row(name, arrays(images), captions))
        grid.append(
            Row("reconstructed", arrays(latent_space.decode(engine.detector.members[0].model, looked.mu[rows])))
        )
        grid.append(Row("heat map", heats, [f"p {looked.p_value[row]:.3g}" for row in rows]))
    text = f"By score, among the {len(test):,} test pictures looked at, the most extreme first; p is the p-value."
    return Section("extremes", "The most normal and the most abnormal test pictures", text, grid_png(grid))


def _interpolations(model: AutoEncoder, looked: Looked, seed: int) -> Section:
    pool = np.nonzero(~looked.training)[0]
    pool = pool if len(pool) > 1 else np.arange(len(looked.index))
    chosen = np.random.default_rng(seed_of(seed, "pairs", 0)).permutation(pool)[: 2 * _PAIRS]
    grid = []
    for first, last in zip(chosen[::2], chosen[1::2], strict=False):
        walk = latent_space.decode(model, latent_space.interpolate(looked.mu[first], looked.mu[last], _STEPS))
        ends = arrays(looked.images([first, last]))
        captions = [looked.label(first), *[""] * _STEPS, looked.label(last)]
        grid.append(Row("", [ends[0], *arrays(walk), ends[1]], captions))
    columns = ["picture", *[f"{share:.0%}" for share in np.linspace(0, 1, _STEPS)], "picture"]
    text = "Decoded points on the straight line between the codes of two pictures; the ends are their reconstructions."
    return Section("interpolation", "Interpolation between two pictures", text, grid_png(grid, columns))


def arithmetic(
    model: AutoEncoder, pictures: Pictures, sums: Sequence[tuple[str, str]], alphas: Sequence[float], seed: int
) -> Iterator[Section]:
    """One section for each (wanted, other): pictures of `other` moved towards `wanted`."""
    for number, (wanted, other) in enumerate(sums, 1):
        shown, of_wanted, of_other = _divide(pictures, wanted, other, seed)
        direction = latent_space.difference(_codes_of(model, pictures, of_wanted), _codes_of(model, pictures, of_other))
        images = pictures.images(shown)
        moved = latent_space.add(latent_space.codes(model, images)[0], direction, [0.0, *alphas])
        grid = [
            Row("", arrays([picture, *latent_space.decode(model, walk)]))
            for picture, walk in zip(images, moved, strict=True)
        ]
        columns = ["picture", "alpha 0", *[f"alpha {alpha:g}" for alpha in alphas]]
        text = (
            f"Pictures of {other!r} whose codes have alpha times the difference added between the mean code of "
            f"{len(of_wanted):,} pictures of {wanted!r} and that of {len(of_other):,} of {other!r}, decoded. "
            "None of the pictures shown, nor any of their groups, is in a mean; alpha 0 is the plain reconstruction."
        )
        stem = re.sub(r"[^A-Za-z0-9]+", "-", f"{wanted}-{other}").strip("-")[:60]
        title = f"Arithmetic: {other} + alpha ({wanted} - {other})"
        yield Section(f"arithmetic-{number}-{stem}".rstrip("-"), title, text, grid_png(grid, columns))


def labels_of(text: str, labels: set[str]) -> tuple[str, str]:
    """Read "smiling-neutral" as (wanted, other); labels may hold dashes themselves. Raises `ConfigError`."""
    for dash in re.finditer("-", text):
        wanted, other = text[: dash.start()], text[dash.end() :]
        if wanted in labels and other in labels and wanted != other:
            return wanted, other
    known = ", ".join(sorted(labels)[:20]) + (", ..." if len(labels) > 20 else "")
    raise ConfigError(f"--add {text!r}: give two different labels with a dash between; known here: {known}")


def _divide(pictures: Pictures, wanted: str, other: str, seed: int) -> tuple[Indices, Indices, Indices]:
    """Pictures of `other` to show, and those of `wanted` and `other` to average: none of them, nor of their groups."""
    units = pictures.units
    of = {name: np.array([i for i, one in enumerate(pictures.items) if one.label == name]) for name in (wanted, other)}
    count = min(_SHOWN, max(1, len(np.unique(units[of[other]])) // 4))
    shown = drawn(of[other], count, seed, f"shown {wanted}-{other}")
    rest = {name: rows[~np.isin(units[rows], units[shown])] for name, rows in of.items()}
    for name, rows in rest.items():
        if not len(rows):
            raise DataError(
                f"--add {wanted}-{other}: beside the {len(shown)} shown no picture of {name!r} is left to average; "
                "add pictures or choose other labels"
            )
    means = [drawn(rest[name], MOST_OF_A_LABEL, seed, f"mean of {name}") for name in (wanted, other)]
    return shown, means[0], means[1]


def _codes_of(model: AutoEncoder, pictures: Pictures, indices: Indices) -> Tensor:
    return torch.cat([latent_space.codes(model, images)[0] for _, images in pictures.batches(32, indices)])


def traversals(model: AutoEncoder, kl: Tensor | None, looked: Looked | None) -> Section:
    """One row a latent; over the range that codes of pictures have, or without pictures over that of the prior."""
    size = model.spec.latent.size
    units = (list(range(size)) if kl is None else latent_space.by_information(kl))[:MOST_TRAVERSED]
    start, centre, spread = torch.zeros(size), torch.zeros(size), torch.ones(size)
    where, scale = "the prior's mean", "the prior"
    if looked is not None:
        row = _ordinary(looked)
        start, where = looked.mu[row], f"the code of {looked.pictures.items[looked.index[row]].key}"
        centre, spread = looked.mu.mean(0), looked.mu.std(0, correction=0)
        scale = "the codes of the pictures looked at"
    stops = torch.linspace(-_REACH, _REACH, _STOPS)
    grid = []
    for unit in units:
        walk = latent_space.decode(model, latent_space.traverse(start, unit, centre[unit] + spread[unit] * stops))
        label = f"latent {unit}" if kl is None else f"latent {unit}, {float(kl[unit]):.2f} nats"
        grid.append(Row(label, arrays(walk)))
    order = "in their own order, for want of pictures to measure their KL on" if kl is None else "largest KL first"
    text = (
        f"From {where}, one latent at a time is set to values from {-_REACH:g} to {_REACH:g} standard deviations about "
        f"the mean of {scale}, all others kept; {len(units)} of {size} latents (at most {MOST_TRAVERSED}), {order}."
    )
    return Section("traversals", "Traversals", text, grid_png(grid, [f"{stop:g} sd" for stop in stops.tolist()]))


def _ordinary(looked: Looked) -> int:
    """The row of the picture with the median score, a training picture where there is one: neither plain nor odd."""
    pool = np.nonzero(looked.training)[0] if looked.training.any() else np.arange(len(looked.index))
    return int(pool[np.argsort(looked.score[pool], kind="stable")[len(pool) // 2]])


def kl_bars(kl: Tensor | None, source: str) -> Iterator[Section]:
    if kl is not None:
        active = int((kl > ACTIVE_NATS).sum())
        text = (
            f"The mean: {source}, {float(kl.sum()):.1f} nats in all. {active} of {len(kl)} latents are active (above "
            f"{ACTIVE_NATS:g} nats); the others tell nothing of a picture."
        )
        chart = explore_page.kl_chart(kl.double().numpy(), latent_space.by_information(kl))
        yield Section("kl", "KL of each latent", text, chart=chart)


def curves(metrics: dict[str, Any]) -> Iterator[Section]:
    """Loss and KL while training; bundles that do not tell them have no such section."""
    members = metrics.get("members")
    first = members[0] if isinstance(members, list) and members else {}
    if first.get("history"):
        text = "Nats an image. The dotted line is the epoch whose weights were kept."
        chart = explore_page.curves_chart(first["history"], first.get("epoch"))
        yield Section("curves", "Loss and KL while training", text, chart=chart)

"""What `explore` shows, section by section: each makes one PNG grid or one chart."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anomaly_vae import explore_page, latent_space
from anomaly_vae.data import Pictures
from anomaly_vae.detector import Detector
from anomaly_vae.engine import Engine
from anomaly_vae.errors import ConfigError, DataError
from anomaly_vae.explore_page import Section
from anomaly_vae.grids import Row, arrays, grid_png
from anomaly_vae.latent_laws import ACTIVE_NATS, ACTIVE_SHARE
from anomaly_vae.latent_space import Codes, Usage
from anomaly_vae.looking import Indices, Looked, classes_of, codes_of, drawn
from anomaly_vae.model import AutoEncoder
from anomaly_vae.recipe import DetectorSpec
from anomaly_vae.rendering import heatmap
from anomaly_vae.seeds import seed_of

MOST_TRAVERSED = 16
MOST_OF_A_LABEL = 1000
MOST_CLASSES = 10
_SHOWN, _PAIRS, _STEPS = 8, 5, 11
_SAMPLES = (5, 10)
_REACH, _STOPS = 3.0, 9
_DRAWS = 2000


class Measured(NamedTuple):
    """The codes by which latents are measured, and in words whose they are."""

    codes: Codes
    source: str


def of_pictures(engine: Engine, looked: Looked, seed: int) -> Iterator[Section]:
    model = engine.detector.members[0].model
    if model.spec.backbone is None:
        yield _reconstructions(model, looked, seed)
    yield from _maps(looked, seed)
    if not looked.training.all():
        yield _extremes(engine, looked)
    if not model.spec.decodes:
        return
    if len(looked.index) > 1:
        yield _interpolations(model, looked, seed)
    if model.classes:
        yield _every_class(model, looked, seed)


def samples(model: AutoEncoder, measured: Measured | None, seed: int) -> Section | None:
    """What the prior decodes to; laws without one are drawn from as their codes lie. None where there are none."""
    rows, across = _SAMPLES
    prior, title = latent_space.prior_of(model), "Samples from the prior"
    count = across if model.classes else rows * across
    if prior is not None:
        z = latent_space.draw_prior(model, count, seed)
        text = f"Latents drawn from {prior}, decoded: what the model believes normal pictures to be."
        text += _spread(model, measured, seed)
    elif measured is not None and len(measured.codes.mu) > 1:
        title = "Samples from a Gaussian fitted to codes"
        z = latent_space.draw_like(measured.codes.mu, count, seed)
        text = (
            "This law of z has no prior. Latents are drawn from the Gaussian with the mean and the covariance of the "
            f"codes of {measured.source} (ex-post density estimation, Ghosh et al. 2020), and decoded."
        )
    else:
        return None
    if not model.classes:
        grid = [Row("", arrays(part)) for part in torch.split(latent_space.decode(model, z), across)]
        return Section("samples", title, text, grid_png(grid))
    text += f" A row for each class{_of_how_many(model)}, the same latents in every row."
    grid = [Row(name, arrays(_as_class(model, z, k))) for k, name in _shown_classes(model)]
    return Section("samples", title, text, grid_png(grid))


def _spread(model: AutoEncoder, measured: Measured | None, seed: int) -> str:
    """How far the codes of pictures are from the prior."""
    if measured is None or len(measured.codes.mu) < 2:
        return ""
    spread = float(measured.codes.mu.std(0).median())
    standard = latent_space.prior_of(model) == latent_space.STANDARD_NORMAL
    wanted = 1.0 if standard else float(latent_space.draw_prior(model, _DRAWS, seed).std(0).median())
    return (
        f" Codes of {measured.source} have a standard deviation of {spread:.2g} (median over latents) where the prior "
        f"has {wanted:.2g}: the further above, the less samples resemble pictures."
    )


def _shown_classes(model: AutoEncoder) -> list[tuple[int, str]]:
    return list(enumerate(model.classes))[:MOST_CLASSES]


def _of_how_many(model: AutoEncoder) -> str:
    count = len(model.classes)
    return f" (the first {MOST_CLASSES} of {count})" if count > MOST_CLASSES else ""


def _as_class(model: AutoEncoder, z: Tensor, number: int) -> Tensor:
    return latent_space.decode(model, z, torch.full((len(z),), number))


def _walked(model: AutoEncoder, z: Tensor, start: Tensor | None) -> Tensor:
    """Decoded points z (n, D) of a walk, all as the class (1,) of its start."""
    return latent_space.decode(model, z, None if start is None else start.expand(len(z)))


def _class_name(model: AutoEncoder, label: Tensor | None) -> str:
    """As which class (1,) something is decoded; empty for models without."""
    return "" if label is None else f"as {model.classes[int(label)]}"


def _kept(model: AutoEncoder) -> str:
    return " The whole walk is decoded as the class of the picture that it starts from." if model.classes else ""


def _reconstructions(model: AutoEncoder, looked: Looked, seed: int) -> Section:
    grid = []
    for name, rows in (("training", np.nonzero(looked.training)[0]), ("test", np.nonzero(~looked.training)[0])):
        rows = drawn(rows, _SHOWN, seed, f"reconstructed {name}")
        if len(rows):
            images, codes = looked.images(rows), looked.codes.at(rows)
            grid.append(Row(f"{name} pictures", arrays(images), [looked.label(row) for row in rows]))
            grid.append(Row("reconstructed", arrays(latent_space.reconstruct(model, images, codes)), _as(model, codes)))
    what = "what the decoder, which sees it too, makes of it" if model.spec.network.sees_input else "its decoded code"
    text = (
        f"Each picture above {what}, without chance. Training pictures are all those that the detector was made from: "
        "trained on, fitted on, or calibrated with."
    )
    return Section("reconstructions", "Reconstructions", text, grid_png(grid))


def _as(model: AutoEncoder, codes: Codes) -> list[str]:
    """A caption for each reconstruction of a conditional model: as which class it was decoded."""
    return [] if codes.label is None else [_class_name(model, one) for one in codes.label]


def _maps(looked: Looked, seed: int) -> Iterator[Section]:
    if len(looked.index) < latent_space.LEAST_FOR_MAPS:
        return
    plane, (first, second) = latent_space.pca_plane(looked.codes.mu)
    maps = [
        ("t-SNE 1", "t-SNE 2", latent_space.tsne_plane(looked.codes.mu, seed)),
        (f"principal component 1 ({first:.0%} of the variance)", f"2 ({second:.0%})", plane),
    ]
    hover = [
        f"{looked.pictures.items[i].key} ({looked.pictures.items[i].label})"
        + (", training" if looked.training[row] else f", p {looked.p_value[row]:.3g}, score {looked.score[row]:.3g}")
        for row, i in enumerate(looked.index)
    ]
    labels = [looked.label(row) for row in range(len(looked.index))]
    text = (
        "Codes of the pictures looked at; left t-SNE, in which neighbours mean something and distances "
        "between groups do not, right PCA. Point at one to see the picture, click a name to hide its points."
    )
    by_class = explore_page.maps_chart(maps, explore_page.series_by_class(labels), hover)
    yield Section("by-class", "Latents by class", text, chart=by_class)
    by_verdict = explore_page.maps_chart(maps, explore_page.series_by_verdict(looked.training, looked.outlier), hover)
    text = "The same points by verdict. What the verdict goes by is the score, of which the latents are only a part."
    yield Section("by-verdict", "Latents by verdict", text, chart=by_verdict)


def _extremes(engine: Engine, looked: Looked) -> Section:
    model, test = engine.detector.members[0].model, np.nonzero(~looked.training)[0]
    order = test[np.argsort(looked.score[test], kind="stable")]
    grid = []
    for name, rows in (("most normal", order[:_SHOWN]), ("most abnormal", order[::-1][:_SHOWN].copy())):
        images, codes = looked.images(rows), looked.codes.at(rows)
        judged = engine.judge(images, True, classes_of(engine.detector, looked.pictures, looked.index[rows]))
        assert judged.heat is not None
        heats = [
            heatmap(heat, judged.heat_scale, picture) for heat, picture in zip(judged.heat, arrays(images), strict=True)
        ]
        captions = [looked.label(row) for row in rows]
        grid.append(Row(name, arrays(images), captions))
        if model.spec.backbone is None:
            reconstructed = arrays(latent_space.reconstruct(model, images, codes))
            grid.append(Row("reconstructed", reconstructed, _as(model, codes)))
        grid.append(Row("heat map", heats, [f"p {looked.p_value[row]:.3g}" for row in rows]))
    text = f"By score, among the {len(test):,} test pictures looked at, the most extreme first; p is the p-value."
    return Section("extremes", "The most normal and the most abnormal test pictures", text, grid_png(grid))


def _interpolations(model: AutoEncoder, looked: Looked, seed: int) -> Section:
    pool = np.nonzero(~looked.training)[0]
    pool = pool if len(pool) > 1 else np.arange(len(looked.index))
    chosen = np.random.default_rng(seed_of(seed, "pairs", 0)).permutation(pool)[: 2 * _PAIRS]
    grid = []
    for first, last in zip(chosen[::2], chosen[1::2], strict=False):
        codes, label = looked.codes.mu, looked.codes.at([first]).label
        walk = _walked(model, latent_space.interpolate(codes[first], codes[last], _STEPS), label)
        ends = arrays(looked.images([first, last]))
        captions = [looked.label(first), *[""] * _STEPS, looked.label(last)]
        grid.append(Row(_class_name(model, label), [ends[0], *arrays(walk), ends[1]], captions))
    columns = ["picture", *[f"{share:.0%}" for share in np.linspace(0, 1, _STEPS)], "picture"]
    text = "Decoded points on the straight line between the codes of two pictures; "
    text += "the first is its reconstruction." if model.classes else "the ends are their reconstructions."
    title = "Interpolation between two pictures"
    return Section("interpolation", title, text + _kept(model), grid_png(grid, columns))


def _every_class(model: AutoEncoder, looked: Looked, seed: int) -> Section:
    """Some pictures' codes under each class: what of a picture is in the code, and what in the class."""
    rows = drawn(np.arange(len(looked.index)), _SHOWN, seed, "every class")
    codes, images = looked.codes.at(rows), arrays(looked.images(rows))
    by_class = [arrays(_as_class(model, codes.mu, k)) for k, _ in _shown_classes(model)]
    grid = [
        Row(looked.label(row), [image, *decoded]) for row, image, *decoded in zip(rows, images, *by_class, strict=True)
    ]
    columns = ["picture", *[name for _, name in _shown_classes(model)]]
    text = (
        f"A picture, and its code decoded as each class{_of_how_many(model)}: what stays the same along a row is told "
        "by the code, what changes by the class."
    )
    return Section("every-class", "The same code, every class", text, grid_png(grid, columns))


def arithmetic(
    detector: Detector, pictures: Pictures, sums: Sequence[tuple[str, str]], alphas: Sequence[float], seed: int
) -> Iterator[Section]:
    """One section for each (wanted, other): pictures of `other` moved towards `wanted`."""
    model = detector.members[0].model
    for number, (wanted, other) in enumerate(sums, 1):
        shown, of_wanted, of_other = _divide(pictures, wanted, other, seed)
        means = [_codes_of(detector, pictures, indices).mu for indices in (of_wanted, of_other)]
        direction, codes = latent_space.difference(*means), _codes_of(detector, pictures, shown)
        moved = latent_space.add(codes.mu, direction, [0.0, *alphas])
        grid = []
        for i, picture in enumerate(arrays(pictures.images(shown))):
            label = codes.at([i]).label
            grid.append(Row(_class_name(model, label), [picture, *arrays(_walked(model, moved[i], label))]))
        columns = ["picture", "alpha 0", *[f"alpha {alpha:g}" for alpha in alphas]]
        text = (
            f"Pictures of {other!r} whose codes have alpha times the difference added between the mean code of "
            f"{len(of_wanted):,} pictures of {wanted!r} and that of {len(of_other):,} of {other!r}, decoded. "
            "None of the pictures shown, nor any of their groups, is in a mean; alpha 0 is the plain reconstruction."
        )
        stem = re.sub(r"[^A-Za-z0-9]+", "-", f"{wanted}-{other}").strip("-")[:60]
        title = f"Arithmetic: {other} + alpha ({wanted} - {other})"
        name = f"arithmetic-{number}-{stem}".rstrip("-")
        yield Section(name, title, text + _kept(model), grid_png(grid, columns))


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


def _codes_of(detector: Detector, pictures: Pictures, indices: Indices) -> Codes:
    return Codes.join([codes_of(detector, pictures, some, images) for some, images in pictures.batches(32, indices)])


class _Start(NamedTuple):
    """Where walks start, z (D,) of class `label` (1,); the middle and the spread (D,) of the codes; both in words."""

    z: Tensor
    label: Tensor | None
    centre: Tensor
    spread: Tensor
    where: str
    scale: str


def traversals(
    model: AutoEncoder, usage: Usage | None, looked: Looked | None, measured: Measured | None, seed: int
) -> Section | None:
    """One row a latent over the range that codes have; None where neither codes nor a prior tell it."""
    start = _of_looked(looked) if looked is not None else _of_prior(model, seed) or _of_measured(measured)
    if start is None:
        return None
    if model.classes and start.label is None:
        start = start._replace(label=torch.zeros(1, dtype=torch.int64))
    size = model.spec.latent.size
    units = (list(range(size)) if usage is None else usage.order)[:MOST_TRAVERSED]
    stops = torch.linspace(-_REACH, _REACH, _STOPS)
    grid = []
    for unit in units:
        walk = latent_space.traverse(start.z, unit, start.centre[unit] + start.spread[unit] * stops)
        grid.append(Row(f"latent {unit}{_told(usage, unit)}", arrays(_walked(model, walk, start.label))))
    order = "in their own order, for want of pictures to measure them on"
    order = order if usage is None else f"largest {usage.quantity} first"
    decoded = f", decoded {_class_name(model, start.label)}" if model.classes else ""
    text = (
        f"From {start.where}{decoded}, one latent at a time is set to values from {-_REACH:g} to {_REACH:g} standard "
        f"deviations about the mean of {start.scale}, all others kept; {len(units)} of {size} latents (at most "
        f"{MOST_TRAVERSED}), {order}."
    )
    return Section("traversals", "Traversals", text, grid_png(grid, [f"{stop:g} sd" for stop in stops.tolist()]))


def _told(usage: Usage | None, unit: int) -> str:
    if usage is None:
        return ""
    value = float(usage.values[unit])
    return f", {value:.2f} {usage.unit}" if usage.unit else f", variance {value:.2g}"


def _of_looked(looked: Looked) -> _Start:
    row, mu = _ordinary(looked), looked.codes.mu
    where = f"the code of {looked.pictures.items[looked.index[row]].key}"
    scale = "the codes of the pictures looked at"
    return _Start(mu[row], looked.codes.at([row]).label, mu.mean(0), mu.std(0, correction=0), where, scale)


def _of_prior(model: AutoEncoder, seed: int) -> _Start | None:
    prior, size = latent_space.prior_of(model), model.spec.latent.size
    if prior is None:
        return None
    if prior == latent_space.STANDARD_NORMAL:
        return _Start(torch.zeros(size), None, torch.zeros(size), torch.ones(size), "the prior's mean", "the prior")
    # The mean of other priors may be where they never are, as the middle of a sphere is.
    z = latent_space.draw_prior(model, _DRAWS, seed)
    return _Start(z[0], None, z.mean(0), z.std(0, correction=0), "a draw from the prior", "the prior")


def _of_measured(measured: Measured | None) -> _Start | None:
    if measured is None:
        return None
    mu, source = measured.codes.mu, measured.source
    label = measured.codes.at([0]).label
    scale = f"the codes of {source}"
    return _Start(mu[0], label, mu.mean(0), mu.std(0, correction=0), f"the first code of {source}", scale)


def _ordinary(looked: Looked) -> int:
    """The row of the picture with the median score, a training picture where there is one: neither plain nor odd."""
    pool = np.nonzero(looked.training)[0] if looked.training.any() else np.arange(len(looked.index))
    return int(pool[np.argsort(looked.score[pool], kind="stable")[len(pool) // 2]])


def usage_bars(usage: Usage | None, source: str) -> Iterator[Section]:
    """What each latent tells of a picture."""
    if usage is None:
        return
    active = f"{int(usage.active.sum())} of {len(usage.values)} latents are active"
    if usage.unit:
        text = (
            f"The mean over {source}, {float(usage.values.sum()):.1f} {usage.unit} in all. {active} (above "
            f"{ACTIVE_NATS:g} nats); the others tell nothing of a picture."
        )
    else:
        text = (
            f"The {usage.quantity} over {source}. {active} (above {ACTIVE_SHARE:.0%} of the largest variance); the "
            "others hardly tell pictures apart."
        )
    title = f"{usage.quantity[0].upper()}{usage.quantity[1:]} of each latent"
    chart = explore_page.usage_chart(usage.values.double().numpy(), usage.order, usage.quantity, usage.unit)
    yield Section("latents", title, text, chart=chart)


def curves(spec: DetectorSpec, metrics: dict[str, Any]) -> Iterator[Section]:
    """Loss and the code's cost while training; bundles that do not tell them have no such section."""
    members, cost = metrics.get("members"), str(metrics.get("latent_cost", "KL"))
    first = members[0] if isinstance(members, list) and members else {}
    if first.get("history"):
        in_nats = spec.objective.loss.kind == "nll" and spec.model.latent.has_kl
        text = "Nats an image." if in_nats else (
            "Means over images: the loss as it is minimised, the reconstruction as -log p(x given z) in nats, the "
            f"{cost} before it is weighed."
        )  # fmt: skip
        text += " The dotted line is the epoch whose weights were kept."
        unit = "nats an image" if in_nats else "an image"
        chart = explore_page.curves_chart(first["history"], first.get("epoch"), cost, unit)
        yield Section("curves", f"Loss and {cost} while training", text, chart=chart)

"""The pictures and the page of the exercise on faces, from the `faces.json` and `faces.npz` that `faces.py` wrote.

python benchmarks/faces_page.py OUT
"""

import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from charts import PALETTE, Panel, Series, chart_png, fewer_colours
from PIL import Image, ImageDraw, ImageFont

from anomaly_vae.grids import Row, arrays, grid_png

Arrays = dict[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float64]

CREDIT = "Faces: Face Research Lab London Set, L. DeBruine and B. Jones (2017), CC BY 4.0."
GROUPS = {
    "learnt": "learnt",
    "unseen": "unseen, neutral",
    "learnt_smiling": "learnt person, smiling",
    "unseen_smiling": "unseen, smiling",
}
_GROUP_COLOURS = dict(zip(GROUPS, ("#333333", "#0072B2", "#CC79A7", "#D55E00"), strict=True))
_INK = "#1e1e1e"
_OVERVIEW_FACES, _OVERVIEW_SIDE = 4, 72
_MOST_POINTS = 150


def write_page(out: Path) -> list[str]:
    """Draw everything into `out`; names of the files, the page last."""
    found = json.loads((out / "faces.json").read_text())
    with np.load(out / "faces.npz") as stored:
        shown: Arrays = dict(stored)
    pictures = dict(_pictures(found, shown))
    for name, png in pictures.items():
        (out / name).write_bytes(png)
    (out / "faces.md").write_text(page(found))
    return [*pictures, "faces.md"]


def _pictures(found: dict[str, Any], shown: Arrays) -> Iterator[tuple[str, bytes]]:
    yield "overview.png", overview(found, shown)
    yield "curves.png", chart_png(curves(found))
    for one in found["learning"]:
        yield f"faces-{one['run']}.png", faces_grid(one, shown)
        yield f"map-{one['run']}.png", chart_png(map_panels(one["run"], shown))


def faces_grid(one: dict[str, Any], shown: Arrays) -> bytes:
    """Columns are faces; for every group a row of originals and a row for each stage."""
    rows = []
    for group, title in GROUPS.items():
        rows.append(Row(title, arrays(shown[f"faces.{group}"])))
        for stage in one["stages"]:
            rebuilt = shown[f"rebuilt.{one['run']}.{stage['epoch']}.{group}"]
            rows.append(Row(f"epoch {stage['epoch']:,}", arrays(rebuilt)))
    return grid_png(rows)


def overview(found: dict[str, Any], shown: Arrays) -> bytes:
    """A few faces of three groups, small, by the model that was also trained with the optimal sigma."""
    best = next(one for one in found["learning"] if one["optimal"])
    plain: Any = next((one for one in found["learning"] if one["run"] == str(best["latents"])), None)
    groups = ("learnt", "unseen", "learnt_smiling")

    def row(label: str, prefix: str) -> Row:
        chosen = [shown[f"{prefix}.{group}"][:_OVERVIEW_FACES] for group in groups]
        return Row(label, [_shrunk(face) for faces in chosen for face in faces])

    rows = [row("original", "faces")]
    stages = plain["stages"] if plain else []
    rows += [row(f"epoch {one['epoch']:,}", f"rebuilt.{plain['run']}.{one['epoch']}") for one in stages]
    last = best["stages"][-1]["epoch"]
    rows.append(row(f"epoch {last:,}, optimal sigma", f"rebuilt.{best['run']}.{last}"))
    heads = [GROUPS[group] if i == 0 else "" for group in groups for i in range(len(shown[f"faces.{group}"][:4]))]
    return fewer_colours(_with_heads(grid_png(rows), heads, rows))


def _with_heads(png: bytes, heads: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """The grid below a line of headings, each over its column and free to run on over the next."""
    grid = Image.open(io.BytesIO(png)).convert("RGB")
    high, font = 20, ImageFont.load_default(13)
    canvas = Image.new("RGB", (grid.width, grid.height + high), "white")
    canvas.paste(grid, (0, high))
    step = rows[0].pictures[0].shape[2] + 4
    left = grid.width - 8 + 4 - step * len(heads)
    for i, head in enumerate(heads):
        ImageDraw.Draw(canvas).text((left + i * step, 6), head, _INK, font)
    return canvas


def _shrunk(face: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    small = Image.fromarray(face.transpose(1, 2, 0)).resize((_OVERVIEW_SIDE,) * 2, Image.Resampling.LANCZOS)
    return np.asarray(small, np.uint8).transpose(2, 0, 1)


def curves(found: dict[str, Any]) -> list[Panel]:
    """The lecture's loss and KL by epoch, a colour for each model; dashed: the loss of unseen neutral faces."""
    loss, kl, block = [], [], max(1, len(found["learning"][0]["history"]) // _MOST_POINTS)
    for one, colour in zip(found["learning"], PALETTE, strict=False):
        history = one["history"]
        held = [row for row in history if "held_out" in row]
        epochs, losses, costs = (_means([row[key] for row in history], block) for key in ("epoch", "loss", "kl"))
        name = f"{one['latents']} latents" + (", optimal sigma" if one["optimal"] else "")
        kl.append(Series(name, epochs, costs, colour))
        if not one["optimal"]:  # its loss is on another scale
            loss.append(Series("", epochs, losses, colour))
            x, y = [row["epoch"] for row in held], [row["held_out"] for row in held]
            loss.append(Series("", x, y, colour, dashed=True))
    title = "epoch" if block == 1 else f"epoch (means of {block})"
    return [
        Panel("loss; dashed: of unseen faces", title, "sum of squares + KL", loss, log=True),
        Panel("KL of the learnt faces", title, "nats a face", kl, log=True),
    ]


def _means(values: Sequence[float], block: int) -> Floats:
    """Means of every `block` values; what is left over at the end is left out."""
    whole = len(values) - len(values) % block
    return np.asarray(np.reshape(values[:whole], (-1, block)).mean(1), np.float64)


def map_panels(run: str, shown: Arrays) -> list[Panel]:
    """All codes in the plane, coloured by group."""
    edges = np.cumsum([0, *shown["counts"]])
    first, second = shown[f"shares.{run}"]
    titles = {"pca": f"PCA ({first:.0%} and {second:.0%} of the variance)", "tsne": "t-SNE"}
    panels = []
    for kind, title in titles.items():
        points = shown[f"{kind}.{run}"]
        series = [
            Series(name if kind == "pca" else "", points[a:b, 0], points[a:b, 1], _GROUP_COLOURS[group], dots=True)
            for (group, name), (a, b) in zip(GROUPS.items(), pairwise(edges), strict=True)
        ]
        # What is few is drawn last, on top.
        panels.append(Panel(title, "", "", [series[1], series[3], series[2], series[0]], bare=True))
    return panels


def page(found: dict[str, Any]) -> str:
    """The page in Markdown: what was done, tables, pictures."""
    facts = found["facts"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [
        "# The lecture's exercise: neutral and smiling faces",
        f"{facts['people']} people, each neutral and smiling, 128x128 px in colour. {facts['minutes']:.0f} minutes, "
        f"{facts['threads']} thread(s), {facts['machine']}, {versions}, seed {facts['seed']}. {CREDIT}",
        "*Run with --quick: the figures mean nothing.*" if facts["quick"] else "",
        f"## {facts['learnt']} neutral faces learnt",
        "![originals and reconstructions](overview.png)",
        "![loss and KL by epoch](curves.png)",
        error_table(found),
        "AUROC of the neutral against the smiling faces of people the model never saw, 95% interval over people in "
        "brackets, then how often somebody's own smile scores above the same person's neutral face.",
        auroc_table(found),
        "The same scores, last epoch, with other faces in the comparison:",
        trap_table(found),
        "## The loss in nats",
        elbo_table(found),
        f"## Detectors from {facts['in_detector']} people, tested on {facts['people'] - facts['in_detector']} others",
        person_table(found["by_person"]),
        "## Is it the smile?",
        framing_text(found["framing"]),
        plain_table(found["framing"]["plain"]),
        "Detectors of the faces so cropped that all stand at one height:",
        person_table(found["framing"]["by_person"]),
        "## Pictures",
    ]
    for one in found["learning"]:
        parts += [f"![faces, {one['run']}](faces-{one['run']}.png)", f"![codes, {one['run']}](map-{one['run']}.png)"]
    return "\n\n".join(part for part in parts if part) + "\n"


def error_table(found: dict[str, Any]) -> str:
    """Root mean squared error of reconstructions in grey levels of 255."""
    head = ["latents", "epoch", *(f"error, {name}" for name in GROUPS.values())]
    rows = [
        [one["run"], f"{stage['epoch']:,}", *(_levels(stage["squared_error"][group]) for group in GROUPS)]
        for one in found["learning"]
        for stage in one["stages"]
    ]
    return "Reconstruction error, root mean square in grey levels (of 255):\n\n" + _table(head, rows)


def auroc_table(found: dict[str, Any]) -> str:
    names = ("squared_error", "negative_elbo", "mahalanobis")
    rows = [
        [one["run"], f"{stage['epoch']:,}", *(_separation(stage["auroc"][name]) for name in names)]
        for one in found["learning"]
        for stage in one["stages"]
    ]
    return _table(["latents", "epoch", "squared error", "-ELBO", "Mahalanobis"], rows)


def trap_table(found: dict[str, Any]) -> str:
    rows = []
    for one in found["learning"]:
        auroc = one["stages"][-1]["auroc"]
        for key, name in (
            ("learnt_as_normal", "learnt faces against smiles of unseen people"),
            ("known_people_smile", "unseen neutral faces against smiles of learnt people"),
        ):
            rows.append([one["run"], name, *(f"{of[key]:.2f}" for of in auroc.values())])
    return _table(["latents", "normal against abnormal", "squared error", "-ELBO", "Mahalanobis"], rows)


def elbo_table(found: dict[str, Any]) -> str:
    head = ["latents", "epoch", "faces", "sum of squares", "KL", "lecture's loss", "-ELBO, sigma = 0.707 (bits)"]
    rows = []
    for one in found["learning"]:
        for stage in one["stages"]:
            elbo = stage["elbo"]
            for group in ("learnt", "unseen"):
                of = elbo[group]
                plain = [f"{of[key]:,.1f}" for key in ("squares", "kl", "lecture_loss")]
                nats = [f"{of[how]:,.0f} ({of['bits'][how]:.2f})" for how in ("fixed", "optimal")]
                sigma = f"{elbo['sigma']:.4f}"
                rows.append([one["run"], f"{stage['epoch']:,}", group, *plain, nats[0], sigma, nats[1]])
    return _table([*head, "optimal sigma", "-ELBO, that sigma (bits)"], rows)


def framing_text(framing: dict[str, Any]) -> str:
    rows, (low, middle, high) = framing["rows"], (f"{value:.0f}" for value in framing["rows"]["quantiles"].values())
    return (
        f"Smiling faces stand {middle} rows of {rows['height']} lower in the frame than the same person's neutral face "
        f"(median of {rows['people']} people; from {low} to {high} in eight of ten). Without any network, by the "
        "squared distance from the mean of the learnt faces, or from the nearest of them:"
    )


def plain_table(plain: dict[str, Any]) -> str:
    names = {"learnt": "few learnt", "by_person": "the detectors' people learnt", "aligned": "the same, at one height"}
    rows = [
        [names[key], *(_separation(of[kind]) for kind in ("mean_face", "nearest_face"))] for key, of in plain.items()
    ]
    return _table(["faces", "mean face", "nearest face"], rows)


def person_table(tested: Sequence[dict[str, Any]]) -> str:
    head = ["latents", "fused", "squared error", "-ELBO", "Mahalanobis", "alpha", "false alarms (90% range)", "found"]
    rows = []
    for one in tested:
        low, high = one["false_alarm_interval"] or ("-", "-")
        alarms = f"{one['false_alarms']} of {one['normal']} ({low} to {high})"
        error = [_levels(one["squared_error"][group]) for group in ("unseen", "unseen_smiling")]
        scores = [_separation(of) for of in one["auroc"].values()]
        detected = f"{one['detected']} of {one['abnormal']}"
        rows.append([one["run"], *scores, f"{one['alpha']:g}", alarms, detected, *error])
    return _table([*head, "error, neutral", "error, smiling"], rows)


def _separation(of: dict[str, Any]) -> str:
    low, high = of["interval"]
    return f"{of['auroc']:.2f} ({low:.2f}-{high:.2f}), {of['pairs']:.0%}"


def _levels(squared_error: float) -> str:
    return f"{255 * math.sqrt(squared_error):.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: name the folder that faces.py wrote: python benchmarks/faces_page.py build/faces")
    write_page(Path(sys.argv[1]))

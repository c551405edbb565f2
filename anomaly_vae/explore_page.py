"""The page of `explore`: charts of a latent space as plotly's plain data, and pictures, in one file for offline use."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from anomaly_vae.grids import jpeg_of

Chart = dict[str, Any]
Points = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# Okabe and Ito's colours can be told apart by the colour-blind; beyond eight the marker's shape changes.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#8A7F00", "#333333")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star")
MOST_CLASSES = len(_COLOURS) * len(_SYMBOLS)
"""More classes than this share one colour, as "other"."""
_GREY = "#B0B0B0"


@dataclass(frozen=True)
class Section:
    """A part of the page: `name` is its anchor and its file's stem; it shows a PNG or a chart."""

    name: str
    title: str
    text: str
    png: bytes | None = None
    chart: Chart | None = None

    @property
    def file(self) -> str | None:
        """Under which name its PNG is written; None where it has none."""
        return None if self.png is None else f"{self.name}.png"

    @property
    def jpeg(self) -> str:
        """The picture in base64 as the page holds it, a tenth of the PNG's size."""
        assert self.png is not None
        return base64.b64encode(jpeg_of(self.png)).decode()


@dataclass(frozen=True)
class Sheet:
    """Thumbnails of `side` pixels, `across` in a row, shown at the points of charts whose `customdata` count them."""

    jpeg: bytes
    side: int
    across: int


@dataclass(frozen=True)
class Series:
    """Points of one colour: which (indices), how they are called, and how they look."""

    name: str
    members: Indices
    colour: str
    symbol: str


def page(title: str, facts: str, notes: Sequence[str], sections: Sequence[Section], sheet: Sheet | None) -> str:
    """The whole page as HTML; whatever names it shows are escaped, and nothing in it asks for the network."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(loader=PackageLoader("anomaly_vae"), autoescape=True, undefined=StrictUndefined)
    shown = None
    if sheet is not None:
        shown = {"jpeg": base64.b64encode(sheet.jpeg).decode(), "side": sheet.side, "across": sheet.across}
    return environment.get_template("explore.html").render(
        title=title,
        facts=facts,
        notes=notes,
        sections=sections,
        files=[section.file for section in sections if section.file],
        charts={section.name: section.chart for section in sections if section.chart is not None},
        sheet=shown,
        plotly=Markup(get_plotlyjs()),  # noqa: S704 - plotly's own JavaScript, from its package
    )


def files_of(head: str) -> list[str]:
    """Names of the PNGs that belong to a page, as its head tells them; none for a page of another hand."""
    found = re.search(r'<meta name="anomaly-vae-files" content="([^"]*)">', head)
    names = found[1].split() if found else []
    return [name for name in names if re.fullmatch(r"[A-Za-z0-9-]+\.png", name)]


def maps_chart(maps: Sequence[tuple[str, str, Points]], series: Sequence[Series], hover: Sequence[str]) -> Chart:
    """Scatter plots side by side of the same pictures: (title of x, title of y, points (n, 2)) each."""
    layout = _layout(520) | {"legend": {"orientation": "h", "y": -0.15}, "hovermode": "closest"}
    width = 1 / len(maps)
    for i, (across, up, _) in enumerate(maps):
        domain = [i * width + (0.04 if i else 0), (i + 1) * width - (0.04 if i + 1 < len(maps) else 0)]
        layout[f"xaxis{_number(i)}"] = _axis(across) | {"domain": domain, "anchor": f"y{_number(i)}"}
        layout[f"yaxis{_number(i)}"] = _axis(up) | {"anchor": f"x{_number(i)}"}
    data = [_scatter(points, one, hover, i) for i, (_, _, points) in enumerate(maps) for one in series]
    return {"data": data, "layout": layout}


def series_by_class(labels: Sequence[str]) -> list[Series]:
    """One series a label, the most frequent first."""
    names, counts = np.unique(np.array(labels), return_counts=True)
    order = [str(names[i]) for i in np.argsort(-counts, kind="stable")]
    series = [
        Series(name or "unnamed", _where(labels, {name}), _COLOURS[i % len(_COLOURS)], _SYMBOLS[i // len(_COLOURS)])
        for i, name in enumerate(order[:MOST_CLASSES])
    ]
    rest = set(order[MOST_CLASSES:])
    return series + ([Series(f"other ({len(rest)})", _where(labels, rest), _GREY, "x")] if rest else [])


def series_by_verdict(training: npt.NDArray[np.bool_], outlier: npt.NDArray[np.bool_]) -> list[Series]:
    """Training pictures, of which a verdict would mean nothing, and test pictures by verdict."""
    kinds = (
        ("the detector was made from it", training, _GREY, "circle-open"),
        ("not an outlier", ~training & ~outlier, _COLOURS[0], "circle"),
        ("outlier", ~training & outlier, _COLOURS[3], "diamond"),
    )
    return [
        Series(name, np.nonzero(chosen)[0], colour, symbol) for name, chosen, colour, symbol in kinds if chosen.any()
    ]


def usage_chart(values: Points, order: Sequence[int], quantity: str, unit: str) -> Chart:
    """Bars of what each latent tells: `values` (D,) of `quantity` in `unit` (empty: none), in the `order` given."""
    bars = {
        "type": "bar",
        "x": [str(latent) for latent in order],
        "y": [float(values[latent]) for latent in order],
        "marker": {"color": _COLOURS[0]},
        "hovertemplate": f"latent %{{x}}: %{{y:.3{'f' if unit else 'g'}}} {unit}<extra></extra>",
    }
    title = f"mean {quantity}, {unit}" if unit else quantity
    axes = {"xaxis": _axis("latent") | {"type": "category"}, "yaxis": _axis(title)}
    return {"data": [bars], "layout": _layout(320) | axes}


def curves_chart(history: Sequence[dict[str, float | None]], chosen: int | None, cost: str, unit: str) -> Chart:
    """Loss and its parts by epoch; `chosen` is the epoch whose weights stayed.

    The cost of the code, called `cost`, stands below on a scale of its own. What was never computed is left out.
    """
    kinds = (
        ("loss", "loss", 0, "y"),
        ("held_out", "loss on held-out normals", 3, "y"),
        ("reconstruction", "reconstruction", 2, "y"),
        ("latent", cost, 5, "y2"),
    )
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": html.escape(name),
            "x": [row.get("epoch") for row in history],
            "y": [row.get(key) for row in history],
            "line": {"color": _COLOURS[colour]},
            "yaxis": axis,
        }
        for key, name, colour, axis in kinds
        if any(row.get(key) is not None for row in history)
    ]
    layout = _layout(480) | {"xaxis": _axis("epoch"), "yaxis": _axis(unit), "legend": {"orientation": "h", "y": 1.12}}
    if data and data[-1]["yaxis"] == "y2":
        layout["xaxis"] |= {"anchor": "y2"}
        layout["yaxis"] |= {"domain": [0.42, 1]}
        layout["yaxis2"] = _axis(f"{html.escape(cost)}, {unit}") | {"domain": [0, 0.34]}
    if chosen is not None:
        line = {"color": "#888888", "dash": "dot", "width": 1}
        layout["shapes"] = [
            {"type": "line", "x0": chosen, "x1": chosen, "y0": 0, "y1": 1, "yref": "paper", "line": line}
        ]
    return {"data": data, "layout": layout}


def _scatter(points: Points, series: Series, hover: Sequence[str], i: int) -> Chart:
    # Plotly reads a little HTML in texts of its own; names of files and folders must not be read so.
    name = html.escape(series.name)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "legendgroup": name,
        "showlegend": i == 0,
        "x": np.round(points[series.members, 0], 4).tolist(),
        "y": np.round(points[series.members, 1], 4).tolist(),
        "text": [html.escape(hover[k]) for k in series.members],
        "hovertemplate": "%{text}<extra></extra>",
        "customdata": series.members.tolist(),
        "marker": {"color": series.colour, "symbol": series.symbol, "size": 7, "opacity": 0.8},
        "xaxis": f"x{_number(i)}",
        "yaxis": f"y{_number(i)}",
    }


def _number(i: int) -> str:
    """Plotly's first axis has no number."""
    return str(i + 1) if i else ""


def _where(labels: Sequence[str], wanted: set[str]) -> Indices:
    return np.array([i for i, label in enumerate(labels) if label in wanted], np.int64)


def _axis(title: str) -> Chart:
    return {"title": {"text": title}, "zeroline": False, "gridcolor": "#e8e8e8"}


def _layout(height: int) -> Chart:
    margin = {"l": 64, "r": 16, "t": 30, "b": 56}
    return {
        "height": height,
        "margin": margin,
        "plot_bgcolor": "white",
        "font": {"family": "system-ui, sans-serif"},
    }

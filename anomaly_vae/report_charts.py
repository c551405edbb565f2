"""Charts as plotly.js reads them: plain data, without any text that a user chose.

Colours are the names of CSS variables, such as `--normal`; the page puts in what suits its light or dark ground.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn import metrics as sk

from anomaly_vae.calibration import Calibration, Mode, rank_allowed

Chart: TypeAlias = dict[str, Any]
Floats: TypeAlias = npt.NDArray[np.float64]

_BARS = 40
_POINTS = 1000
_ALPHAS = 300
_P_BARS = 20
_NAMES = ("normal", "abnormal")


@dataclass(frozen=True)
class AlarmCurve:
    """Share of test normals flagged at each alpha, with what calibration predicts: its mean and central 90% band.

    `low` and `high` are None where no band can be claimed (K-fold, groups).
    """

    alpha: Floats
    achieved: Floats
    expected: Floats
    low: Floats | None
    high: Floats | None


def alarm_curve(calibration: Calibration, p_values: npt.ArrayLike, mode: Mode) -> AlarmCurve:
    """The curve over the alphas up to a half that the calibration supports, from the p-values of test normals."""
    p = np.sort(np.asarray(p_values, np.float64))
    n, m = calibration.n, len(p)
    steps = _thinned(np.arange(1, max(2, (n + 1) // 2 + 1)), _ALPHAS)
    alphas = steps / (n + 1)
    ranks = np.array([rank_allowed(n, float(alpha), mode) for alpha in alphas])
    alphas, ranks = alphas[ranks > 0], ranks[ranks > 0]
    flagged = np.searchsorted(p, (ranks + 1e-9) / (n + 1), side="right")
    low = high = None
    if not calibration.crossed and calibration.groups is None:
        law = stats.betabinom(m, ranks, n + 1 - ranks)
        low, high = (np.asarray(law.ppf(q), np.float64) / m for q in (0.05, 0.95))
    return AlarmCurve(alphas, flagged / m, ranks / (n + 1), low, high)


def score_histogram(
    normal: Floats, abnormal: Floats, threshold: float | None, names: tuple[str, str] = _NAMES
) -> Chart:
    """Share of each class in each range of scores. A bar lies wholly on one side of the threshold."""
    edges = _edges(np.concatenate([normal, abnormal]), threshold)
    chart = _histogram(edges, [normal, abnormal], names)
    chart["layout"]["xaxis"] |= {"title": {"text": "score (higher is more anomalous)"}}
    if threshold is not None:
        _draw_line(chart, "threshold", threshold, f"threshold {threshold:.3g}")
    return chart


def p_value_histogram(normal: Floats, abnormal: Floats, cut: float) -> Chart:
    """Share of each class in each range of p-values, with the largest p-value that is an outlier."""
    width = cut if cut >= 0.02 else 0.02
    edges = np.append(np.arange(0, 1 - 1e-9, width), 1.0)
    chart = _histogram(edges, [normal, abnormal], _NAMES)
    chart["layout"]["xaxis"] |= {"title": {"text": "p-value (smaller is more anomalous)"}, "range": [0, 1]}
    _draw_line(chart, "decision", cut, f"outlier up to p = {cut:.3g}")
    return chart


def p_value_shares(counts: Mapping[float, int], cut: float | None) -> Chart:
    """Share of a scan in each twentieth of p-values, of so many pictures each; among normal ones all are equal."""
    bars, total = np.zeros(_P_BARS), max(sum(counts.values()), 1)
    for p, count in counts.items():
        bars[min(max(math.ceil(p * _P_BARS - 1e-9) - 1, 0), _P_BARS - 1)] += count
    ends = np.arange(1, _P_BARS + 1) / _P_BARS
    found = [[int(count), f"{end - 1 / _P_BARS:.2f} to {end:.2f}"] for count, end in zip(bars, ends, strict=True)]
    hover = "%{customdata[1]}: %{customdata[0]} (%{y:.1%})<extra></extra>"
    middles = (ends - 0.5 / _P_BARS).tolist()
    trace = {"type": "bar", "name": "this scan", "x": middles, "y": (bars / total).tolist(), "customdata": found,
             "marker": {"color": "--abnormal"}, "opacity": 0.65, "hovertemplate": hover}  # fmt: skip
    level = np.array([1 / _P_BARS, 1 / _P_BARS])
    expected = _line(np.array([0.0, 1.0]), level, "all normal", "--normal", "if all were normal", "dash")
    chart = _chart([trace, expected], "p-value (smaller is more anomalous)", "share of the pictures", None)
    chart["layout"]["xaxis"] |= {"range": [0, 1]}
    chart["layout"]["xaxis"].pop("tickformat")
    if cut is not None:
        _draw_line(chart, "decision", cut, f"outlier up to p = {cut:.3g}")
    return chart


def roc_curve(scores: Floats, abnormal: npt.NDArray[np.bool_], decision: tuple[float, float]) -> Chart:
    """Found outliers against false alarms over all thresholds; `decision` is (false alarms, found) at the alpha."""
    alarms, found, _ = sk.roc_curve(abnormal, scores)
    traces = [
        _line(_thinned(alarms), _thinned(found), "ROC", "--abnormal", "false alarms %{x:.2%}<br>found %{y:.1%}"),
        _line(np.array([0, 1]), np.array([0, 1]), "chance", "--muted", "chance", dash="dot"),
        _point(decision, "at the chosen alpha", "false alarms %{x:.2%}<br>found %{y:.1%}"),
    ]
    return _chart(traces, "false alarms", "outliers found", [-0.02, 1.02])


def precision_recall_curve(
    scores: Floats, abnormal: npt.NDArray[np.bool_], decision: tuple[float, float] | None
) -> Chart:
    """Precision against recall; `decision` is (recall, precision) at the alpha, None where nothing is flagged."""
    precision, recall, _ = sk.precision_recall_curve(abnormal, scores)
    base = float(abnormal.mean())
    hover = "found %{x:.1%}<br>precision %{y:.1%}"
    traces = [
        _line(_thinned(recall[::-1]), _thinned(precision[::-1]), "precision", "--abnormal", hover),
        _line(np.array([0, 1]), np.array([base, base]), "chance", "--muted", "chance %{y:.1%}", dash="dot"),
    ]
    if decision is not None:
        traces.append(_point(decision, "at the chosen alpha", hover))
    return _chart(traces, "outliers found (recall)", "precision", [-0.02, 1.02])


def alarm_chart(curve: AlarmCurve, alpha: float) -> Chart:
    """Achieved false alarms against alpha, near the alpha that was chosen; the whole curve by zooming out."""
    traces = []
    if curve.low is not None and curve.high is not None:
        hover = {"hoverinfo": "skip", "mode": "lines", "line": {"width": 0, "shape": "hv"}}
        traces = [
            {"x": curve.alpha.tolist(), "y": curve.low.tolist(), "showlegend": False, **hover},
            {"x": curve.alpha.tolist(), "y": curve.high.tolist(), "name": "90% band", "fill": "tonexty",
             "fillcolor": "--band", **hover},
        ]  # fmt: skip
    hover_text = "alpha %{x:.2%}<br>%{fullData.name} %{y:.2%}"
    traces.append(_line(curve.alpha, curve.expected, "predicted", "--muted", hover_text, dash="dot"))
    traces.append(_line(curve.alpha, curve.achieved, "achieved", "--normal", hover_text, shape="hv"))
    chart = _chart(traces, "alpha", "false alarms", None)
    reach = min(0.5, max(0.15, 3 * alpha))
    shown = curve.alpha <= reach
    tops = [one[shown] for one in (curve.achieved, curve.expected, curve.high) if one is not None and shown.any()]
    chart["layout"]["xaxis"]["range"] = [0, reach]
    chart["layout"]["yaxis"]["range"] = [0, 1.05 * max([reach, *(float(top.max()) for top in tops)])]
    _draw_line(chart, "alpha", alpha, f"alpha {alpha:g}")
    return chart


def history_chart(
    histories: Sequence[Sequence[dict[str, Any]]], quantities: dict[str, str], kept: list[int], unit: str
) -> Chart:
    """Curves over the epochs in `unit`, a colour for each member and a dash for each of `quantities` (key: name)."""
    traces = []
    for i, history in enumerate(histories):
        for dash, (key, name) in zip(("solid", "dash"), quantities.items(), strict=False):
            rows = [row for row in history if row.get(key) is not None]
            member = f"model {i + 1}"
            who = name if len(histories) == 1 else member if len(quantities) == 1 else f"{member}, {name}"
            x, y = np.array([row["epoch"] for row in rows]), np.array([row[key] for row in rows])
            traces.append(_line(x, y, who, f"--series-{i % 5}", "epoch %{x}: %{y:.4g}", dash=dash))
    chart = _chart(traces, "epoch", unit, None)
    for axis in ("xaxis", "yaxis"):
        chart["layout"][axis].pop("tickformat")
    if len(kept) == 1:
        _draw_line(chart, "kept", kept[0], f"kept: epoch {kept[0]}")
    return chart


def _edges(scores: Floats, threshold: float | None) -> Floats:
    """Bars of equal width over all but the farthest scores; the threshold, where there is one, is an edge."""
    low, high = np.quantile(scores, [0.002, 0.998])
    anchor = float(low) if threshold is None else threshold
    low, high = min(float(low), anchor), max(float(high), anchor)
    width = max(high - low, 1e-9 * max(1.0, abs(anchor))) / _BARS
    before, after = np.ceil((anchor - low) / width - 1e-9), np.ceil((high - anchor) / width - 1e-9)
    return np.asarray(anchor + width * np.arange(-max(before, 1), max(after, 1) + 1), np.float64)


def _histogram(edges: Floats, groups: list[Floats], names: tuple[str, ...]) -> Chart:
    traces = []
    middles, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    for values, name, colour in zip(groups, names, ("--normal", "--abnormal"), strict=True):
        if not len(values):
            continue
        # Like the verdict, a bar takes in its upper edge; the outermost hold all that lies beyond them.
        places = np.searchsorted(edges, values - 1e-12, side="left").clip(1, len(middles)) - 1
        counts = np.bincount(places, minlength=len(middles))
        ranges = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)]
        traces.append(
            {
                "type": "bar",
                "name": f"{name} ({len(values)})",
                "x": middles.tolist(),
                "y": (counts / len(values)).tolist(),
                "width": widths.tolist(),
                "customdata": [[int(count), text] for count, text in zip(counts, ranges, strict=True)],
                "marker": {"color": colour},
                "opacity": 0.65,
                "hovertemplate": "%{customdata[1]}: %{customdata[0]} (%{y:.1%})<extra>%{fullData.name}</extra>",
            }
        )
    chart = _chart(traces, "", "share of the class", None)
    chart["layout"]["barmode"] = "overlay"
    chart["layout"]["xaxis"].pop("tickformat")
    return chart


def _line(
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    name: str,
    colour: str,
    hover: str,
    dash: str = "solid",
    shape: str = "linear",
) -> dict[str, Any]:
    line = {"color": colour, "width": 2, "dash": dash, "shape": shape}
    extra = {"hovertemplate": f"{hover}<extra></extra>", "name": name, "mode": "lines"}
    return {"type": "scatter", "x": x.tolist(), "y": y.tolist(), "line": line, **extra}


def _point(place: tuple[float, float], name: str, hover: str) -> dict[str, Any]:
    marker = {"color": "--ink", "size": 11, "symbol": "diamond"}
    extra = {"hovertemplate": f"{name}<br>{hover}<extra></extra>", "name": name, "mode": "markers", "marker": marker}
    return {"type": "scatter", "x": [place[0]], "y": [place[1]], **extra}


def _chart(traces: list[dict[str, Any]], x: str, y: str, span: list[float] | None) -> Chart:
    axes = {}
    for axis, title in (("xaxis", x), ("yaxis", y)):
        axes[axis] = {"title": {"text": title}, "tickformat": ",.3~%", "zeroline": False, "automargin": True}
        axes[axis] |= {"gridcolor": "--grid", "linecolor": "--grid"} | ({"range": span} if span else {})
    return {"data": traces, "layout": {**axes, "shapes": [], "annotations": []}}


def _draw_line(chart: Chart, name: str, x: float, text: str) -> None:
    """An upright line over the whole height, with its words above the plot."""
    place = {"xref": "x", "yref": "paper"}
    line = {"color": "--ink", "width": 1.5, "dash": "dash"}
    chart["layout"]["shapes"].append(
        {"type": "line", "name": name, "x0": x, "x1": x, "y0": 0, "y1": 1, "line": line, **place}
    )
    chart["layout"]["annotations"].append(
        {"name": name, "x": x, "y": 1, "text": text, "showarrow": False, "yanchor": "bottom", **place}
    )


def _thinned(values: npt.NDArray[Any], most: int = _POINTS) -> npt.NDArray[Any]:
    """At most so many values that a chart can show, evenly picked, the first and the last among them."""
    places = np.unique(np.linspace(0, len(values) - 1, min(len(values), most)).astype(int))
    return np.asarray(values[places])

"""Plots as small PNGs, drawn with Pillow: lines, points, maps; for the documents that benchmarks write."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Floats = npt.NDArray[np.float64]

# The first seven are Okabe and Ito's, which the colour-blind can tell apart.
PALETTE = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#333333", "#999933", "#882255", "#88CCEE",
)  # fmt: skip
_INK, _FAINT, _RULE = "#1e1e1e", "#5f5f5f", "#e4e4e4"
_WIDTH, _HEIGHT, _FINE = 470, 330, 2


@dataclass(frozen=True)
class Series:
    """A line (dashed or not), or points, of one colour; without a name it is not in the legend."""

    name: str
    x: npt.ArrayLike
    y: npt.ArrayLike
    colour: str
    dots: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A plot; `log`: logarithmic y; `bare`: no ticks, as on a map whose axes have no meaning."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log: bool = False
    bare: bool = False


def chart_png(panels: Sequence[Panel]) -> bytes:
    """Plots side by side with one legend below, drawn at twice the size and brought down, so that lines are smooth."""
    font = ImageFont.load_default(13 * _FINE)
    canvas = Image.new("RGB", (len(panels) * _WIDTH * _FINE, (_HEIGHT + 34) * _FINE), "white")
    draw = ImageDraw.Draw(canvas)
    for i, panel in enumerate(panels):
        _plot(draw, panel, i * _WIDTH * _FINE, font)
    x, y = 20 * _FINE, (_HEIGHT + 12) * _FINE
    for one in (one for panel in panels for one in panel.series if one.name):
        draw.ellipse((x, y - 5 * _FINE, x + 10 * _FINE, y + 5 * _FINE), one.colour)
        draw.text((x + 15 * _FINE, y), one.name, _INK, font, "lm")
        x += round(font.getlength(one.name)) + 38 * _FINE
    return fewer_colours(canvas.resize((canvas.width // _FINE, canvas.height // _FINE), Image.Resampling.LANCZOS))


def _plot(draw: ImageDraw.ImageDraw, panel: Panel, x0: int, font: Any) -> None:
    box = (x0 + (16 if panel.bare else 78) * _FINE, 34 * _FINE, x0 + (_WIDTH - 14) * _FINE, (_HEIGHT - 44) * _FINE)
    left, top, right, bottom = box
    xs = np.concatenate([np.asarray(one.x, np.float64) for one in panel.series])
    ys = np.concatenate([_y(one.y, panel.log) for one in panel.series])
    (low_x, high_x), (low_y, high_y) = _span(xs), _span(ys)

    def place(x: npt.ArrayLike, y: npt.ArrayLike) -> list[tuple[float, float]]:
        across = left + (np.asarray(x, np.float64) - low_x) / (high_x - low_x) * (right - left)
        up = bottom - (_y(y, panel.log) - low_y) / (high_y - low_y) * (bottom - top)
        return list(zip(across.tolist(), up.tolist(), strict=True))

    draw.text(((left + right) / 2, 12 * _FINE), panel.title, _INK, font, "mm")
    draw.rectangle(box, outline=_RULE, width=_FINE)
    for value in () if panel.bare else _ticks(low_y, high_y, panel.log):
        across, up = place([low_x], [value])[0]
        draw.line((left, up, right, up), _RULE, _FINE)
        draw.text((across - 6 * _FINE, up), f"{value:,.4g}", _FAINT, font, "rm")
    for value in () if panel.bare else _ticks(low_x, high_x, False):
        across = place([value], [10**low_y if panel.log else low_y])[0][0]
        draw.text((across, bottom + 12 * _FINE), f"{value:,.4g}", _FAINT, font, "mm")
    draw.text(((left + right) / 2, bottom + 30 * _FINE), panel.x, _FAINT, font, "mm")
    draw.text((x0 + 14 * _FINE, 22 * _FINE), panel.y, _FAINT, font, "lm")
    for one in panel.series:
        _draw(draw, one, place(one.x, one.y))


def _draw(draw: ImageDraw.ImageDraw, one: Series, points: list[tuple[float, float]]) -> None:
    radius = 3.5 * _FINE
    if one.dots:
        for x, y in points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), one.colour, "white")
    elif not one.dashed:
        draw.line(points, one.colour, 2 * _FINE, "curve")
    else:
        for a, b in pairwise(points):
            middle = (0.4 * a[0] + 0.6 * b[0], 0.4 * a[1] + 0.6 * b[1])
            draw.line((a, middle), one.colour, 2 * _FINE)


def _y(values: npt.ArrayLike, log: bool) -> Floats:
    y = np.asarray(values, np.float64)
    return np.log10(np.maximum(y, 1e-9)) if log else y


def _span(values: Floats) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values between the ends, which are exponents of ten where `log`."""
    if log:
        steps = (1, 2, 5) if high - low < 3 else (1,)
        every = [step * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for step in steps]
        return [value for value in every if low <= math.log10(value) <= high]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1) if k * step >= 0 or low < 0]


def fewer_colours(picture: Image.Image) -> bytes:
    """A PNG of at most 256 colours."""
    buffer = io.BytesIO()
    picture.quantize(256, Image.Quantize.MEDIANCUT).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

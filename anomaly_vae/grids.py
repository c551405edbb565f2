"""Grids of small pictures with labels, as PNGs for people."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Picture = npt.NDArray[np.uint8]

_LEAST_SIDE, _LARGEST_SIDE = 64, 160
_GAP, _MARGIN, _LINE = 4, 8, 16
_LARGEST_LABEL = 170
_TEXT, _FAINT = (30, 30, 30), (95, 95, 95)


@dataclass(frozen=True)
class Row:
    """One line of a grid: uint8 pictures (C, H, W), grey or colour, its label on the left, a caption below each."""

    label: str
    pictures: Sequence[Picture]
    captions: Sequence[str] = ()


def grid_png(rows: Sequence[Row], columns: Sequence[str] = ()) -> bytes:
    """Draw rows of pictures of one shape; `columns` are headings. Pixels stay square, small ones are enlarged.

    Those of a coarser resolution, as of a model that sees shrunken pictures, are drawn as large as the others.
    """
    if not rows or not rows[0].pictures:
        raise ValueError("a grid needs at least one picture")
    width, height = max(shown_size(picture) for row in rows for picture in row.pictures)
    font = ImageFont.load_default(12)
    left = _MARGIN + min(_LARGEST_LABEL, max(round(font.getlength(row.label)) for row in rows)) + _GAP
    left = _MARGIN if left == _MARGIN + _GAP else left + _GAP
    top = _MARGIN + (_LINE if columns else 0)
    heights = [height + _GAP + (_LINE if row.captions else 0) for row in rows]
    across = max(len(row.pictures) for row in rows)
    size = (left + across * (width + _GAP) - _GAP + _MARGIN, top + sum(heights) - _GAP + _MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for j, heading in enumerate(columns):
        _centre(draw, heading, left + j * (width + _GAP), _MARGIN, width, _TEXT)
    for row, high in zip(rows, heights, strict=True):
        draw.text((_MARGIN, top + height // 2 - 7), _fitted(row.label, _LARGEST_LABEL), _TEXT, font)
        for j, picture in enumerate(row.pictures):
            canvas.paste(_shown(picture, (width, height)), (left + j * (width + _GAP), top))
        for j, caption in enumerate(row.captions):
            _centre(draw, caption, left + j * (width + _GAP), top + height, width, _FAINT)
        top += high
    return _encoded(canvas, "PNG")


def shown_size(picture: Picture) -> tuple[int, int]:
    """(width, height) a picture (C, H, W) is drawn with: enlarged by a whole factor, or shrunk to fit."""
    _, height, width = picture.shape
    factor = max(1, min(-(-_LEAST_SIDE // min(height, width)), _LARGEST_SIDE // max(height, width)))
    shrink = min(1.0, _LARGEST_SIDE / max(height, width))
    return max(1, round(width * factor * shrink)), max(1, round(height * factor * shrink))


def thumbnail(picture: Picture, side: int) -> Image.Image:
    """A picture (C, H, W) in the middle of a white square of `side` pixels."""
    small = _image(picture)
    factor = side / max(small.size)
    size = (max(1, round(small.width * factor)), max(1, round(small.height * factor)))
    small = small.resize(size, Image.Resampling.BOX if factor < 1 else Image.Resampling.NEAREST)
    square = Image.new("RGB", (side, side), "white")
    square.paste(small, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def sheet_jpeg(thumbnails: Sequence[Image.Image], across: int) -> bytes:
    """Square thumbnails of one size, `across` in a row, as one JPEG."""
    side = thumbnails[0].width
    sheet = Image.new("RGB", (across * side, -(-len(thumbnails) // across) * side), "white")
    for i, one in enumerate(thumbnails):
        sheet.paste(one, (i % across * side, i // across * side))
    return _encoded(sheet, "JPEG")


def jpeg_of(png: bytes) -> bytes:
    """The same picture as a JPEG in which text stays sharp."""
    with Image.open(io.BytesIO(png)) as picture:
        return _encoded(picture.convert("RGB"), "JPEG")


def arrays(pictures: Iterable[npt.ArrayLike]) -> list[Picture]:
    """uint8 arrays (C, H, W) from a batch (n, C, H, W)."""
    return [np.asarray(picture, np.uint8) for picture in pictures]


def _shown(picture: Picture, size: tuple[int, int]) -> Image.Image:
    image = _image(picture)
    return image.resize(size, Image.Resampling.NEAREST if size[0] >= image.width else Image.Resampling.BOX)


def _image(picture: Picture) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(picture, (3, *picture.shape[1:])).transpose(1, 2, 0)))


def _centre(draw: ImageDraw.ImageDraw, text: str, x: int, y: int, width: int, colour: tuple[int, int, int]) -> None:
    fitted, font = _fitted(text, width), ImageFont.load_default(12)
    draw.text((x + (width - font.getlength(fitted)) / 2, y), fitted, colour, font)


def _fitted(text: str, width: int) -> str:
    """The text on one line, its end left out where it would be too wide."""
    font, text = ImageFont.load_default(12), " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 88, "subsampling": 0} if kind == "JPEG" else {}))
    return buffer.getvalue()

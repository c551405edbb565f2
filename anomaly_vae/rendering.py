"""Heat maps and strips of pictures as PNGs, drawn with one perceptually ordered colour table."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from anomaly_vae.images import encode_png

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_LONGEST = 2048  # enlarging stops here, so a long thin map does not become a huge PNG

# Nine anchors of the inferno map (S. van der Walt, N. Smith, 2015): luma rises all the way, so the order of values
# survives printing in grey and colour blindness.
_ANCHORS = [
    (0, 0, 4),
    (31, 12, 72),
    (85, 15, 109),
    (136, 34, 106),
    (188, 55, 84),
    (227, 89, 51),
    (249, 140, 10),
    (249, 201, 50),
    (252, 255, 164),
]
_TABLE: NDArray[np.float32] = np.stack(
    [np.interp(np.linspace(0, 1, 256), np.linspace(0, 1, len(_ANCHORS)), column) for column in np.transpose(_ANCHORS)],
    axis=1,
).astype(np.float32)


def heatmap(
    heat: NDArray[np.float32], scale: float, image: NDArray[np.uint8] | None = None, *, overlay: bool = True
) -> NDArray[np.uint8]:
    """Colour `heat` (H,W), higher = more anomalous, to uint8 (3,H,W): heat = 0 is darkest, heat >= `scale` brightest.

    With an `image` (C,H,W) and `overlay`, the colour covers its grey version the more the hotter the place is.
    A heat that is not a number shows as the hottest, never as normal.
    """
    level = _level(heat, scale)
    colours = coloured(level)
    if overlay and image is not None:
        if image.ndim != 3 or image.shape[0] not in (1, 3) or image.shape[1:] != heat.shape:
            raise ValueError(f"the image is {image.shape}, but a heat map of {heat.shape} lies over (1 or 3, H, W)")
        planes = image.astype(np.float32)
        grey = planes[0] if image.shape[0] == 1 else np.tensordot(_LUMA, planes, axes=1)
        cover = (0.85 * level)[..., None]
        colours = ((1 - cover) * grey[..., None] + cover * colours).astype(np.float32)
    return np.rint(colours).clip(0, 255).astype(np.uint8).transpose(2, 0, 1)


def heatmap_png(
    heat: NDArray[np.float32],
    scale: float,
    image: NDArray[np.uint8] | None = None,
    *,
    overlay: bool = True,
    min_side: int = 256,
) -> bytes:
    """`heatmap` as a PNG, enlarged by a whole factor until its shorter side has `min_side` pixels (longest: 2048)."""
    picture = heatmap(heat, scale, image, overlay=overlay)
    return encode_png(_enlarged(picture, enlargement(picture.shape[1:], min_side)))


def side_by_side_png(images: Sequence[NDArray[np.uint8]], *, gap: int = 4, min_side: int = 256) -> bytes:
    """Pictures (C,H,W) of one height in a row with white gaps, such as input | reconstruction | heat map, as a PNG."""
    if not images:
        raise ValueError("there is nothing to put side by side")
    if len({image.shape[1] for image in images}) > 1:
        raise ValueError(f"pictures side by side need one height, not {[image.shape[1] for image in images]}")
    factor = enlargement((images[0].shape[1], max(image.shape[2] for image in images)), min_side)
    panels = [_enlarged(np.broadcast_to(image, (3, *image.shape[1:])), factor) for image in images]
    between = np.full((3, panels[0].shape[1], gap), 255, dtype=np.uint8)
    row = [part for panel in panels for part in (between, panel)]
    return encode_png(np.concatenate(row[1:], axis=2))


def coloured(level: NDArray[np.float32]) -> NDArray[np.float32]:
    """Levels (...) from 0, the darkest, to 1 as colours (..., 3) from 0 to 255."""
    return _TABLE[np.rint(level * 255).astype(np.intp)]


def enlargement(size: tuple[int, ...], min_side: int) -> int:
    """The whole factor that brings the shorter side to `min_side` pixels, and the longer one to no more than 2048."""
    return max(1, min(-(-min_side // min(size)), _LONGEST // max(size)))


def _level(heat: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    if heat.ndim != 2 or not heat.size:
        raise ValueError(f"a heat map has the shape (H,W), not {heat.shape}")
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"the scale of a heat map is a positive number, not {scale}")
    ratio: NDArray[np.float32] = heat.astype(np.float32) / np.float32(scale)
    return np.nan_to_num(ratio, nan=1.0, posinf=1.0, neginf=0.0).clip(0.0, 1.0)


def _enlarged(image: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Every pixel becomes a square: nothing is invented between measured values."""
    return image.repeat(factor, axis=1).repeat(factor, axis=2)

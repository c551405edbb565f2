"""A picture in its own size and colours under the heat of its map, which covers nothing that is normal."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from anomaly_vae.images import ImageSpec, decode, encode_png, peek
from anomaly_vae.regions import EDGE, SEED, seen_at
from anomaly_vae.rendering import coloured, enlargement

Floats = NDArray[np.float32]

LONGEST = 1024
"""Larger pictures are shown at so many pixels of their longer side."""
_LEAST_SIDE, _SHORTEST = 16, 256
_COLOURS = (0.45, 0.85)
"""The part of the colour table that is neither lost on dark pictures nor on light ones."""
_MOST_COVERED = 0.75


def overlay_png(heat: Floats, scale: float, spec: ImageSpec, data: bytes) -> bytes:
    """The picture that `data` are the bytes of, as PNG, with the heat map (H, W) that a detector of `spec` has of it.

    Heat up to 1, which 99.5% of the pixels of normal pictures do not exceed, leaves it as it is; from there to `scale`
    colour covers it ever more. Where heat is above 2 a black and a white line run around it, of which one is seen on
    any ground. The colours mean the same in all pictures of a detector. At most 1024 px; small pictures are enlarged by
    a whole factor, as `heatmap_png` does it.
    """
    info = peek(data)
    size = (info.height, info.width)
    shown = tuple(max(_LEAST_SIDE, round(side * min(1.0, LONGEST / max(size)))) for side in size)
    plain = {"fit": "stretch", "channels": 3, "region": None, "height": shown[0], "width": shown[1]}
    picture = decode(data, spec.model_copy(update=plain)).numpy()
    factor = max(1, min(enlargement(shown, _SHORTEST), LONGEST // max(shown)))
    picture = picture.repeat(factor, axis=1).repeat(factor, axis=2)
    return encode_png(overlay(_placed(heat, scale, spec, size, picture.shape[1:]), scale, picture))


def overlay(heat: Floats, scale: float, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture (3, H, W) under its heat (H, W); see `overlay_png`."""
    if not scale > EDGE:
        raise ValueError(f"heat of {EDGE:g} is normal, so that the scale must be above it, not {scale}")
    level = ((heat - EDGE) / (scale - EDGE)).clip(0.0, 1.0).astype(np.float32)
    low, high = _COLOURS
    colours = coloured(np.float32(low) + np.float32(high - low) * level)
    cover = (_MOST_COVERED * np.sqrt(level))[..., None]
    ground = picture.transpose(1, 2, 0)
    found = np.rint(ground + cover * (colours - ground)).astype(np.uint8)
    thickness = max(1, round(max(heat.shape) / 512))
    core = heat > SEED
    found[ndimage.binary_dilation(core, iterations=thickness) & ~core] = 255
    found[core & ~ndimage.binary_erosion(core, iterations=thickness, border_value=1)] = 0
    return np.ascontiguousarray(found.transpose(2, 0, 1))


def _placed(heat: Floats, scale: float, spec: ImageSpec, size: tuple[int, int], shown: tuple[int, ...]) -> Floats:
    """Heat of a picture of `size` (height, width) as it is `shown`, between the network's pixels by their distance.

    What the network does not see has none.
    """
    found = np.nan_to_num(heat.astype(np.float32), nan=scale, posinf=scale, neginf=0.0).clip(0.0, scale)
    for axis, (side, count) in enumerate(zip(size, shown, strict=True)):
        middles = (np.arange(count) + 0.5) * side / count
        at = seen_at(middles, axis, spec, size) - 0.5
        inside = (at > -1) & (at < found.shape[axis])
        before = np.floor(at).astype(int)
        share = (at - before).astype(np.float32)
        last = found.shape[axis] - 1
        first, second = (np.take(found, np.clip(before + step, 0, last), axis) for step in (0, 1))
        along = (slice(None), None) if axis == 0 else (None, slice(None))
        found = np.where(inside[along], first + share[along] * (second - first), np.float32(0.0))
    return found

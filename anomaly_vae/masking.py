"""`region`: the part of every picture that counts, as a polygon or a mask. Training keeps its pixels in `ImageSpec`."""

from base64 import b64encode
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from anomaly_vae.errors import BadImage, ConfigError
from anomaly_vae.images import ImageSpec, decode, encode_png
from anomaly_vae.spec import Spec

Share = Annotated[float, Field(ge=0, le=1)]

LEAST_SHARE = 0.01
"""Of the picture: a smaller region is a mistake more often than a wish."""
_LARGEST_KEPT = 256 * 1024
"""Bytes that a region may take in a bundle's description."""


class RegionSpec(Spec):
    """Outside of it nothing counts. Either a `polygon` or a `mask`.

    `polygon`: at least three [x, y], shares of the width and height of the picture as models see it, from its upper
    left corner. `mask`: path of a picture, white where it counts, which goes the way of every picture (size and `fit`).
    """

    polygon: tuple[tuple[Share, Share], ...] | None = None
    mask: str | None = None

    @model_validator(mode="after")
    def _encloses_something(self) -> Self:
        if (self.polygon is None) == (self.mask is None):
            raise ValueError("region wants either a polygon or a mask; give one of them")
        if self.polygon is not None and len(self.polygon) < 3:
            raise ValueError(f"region.polygon has {len(self.polygon)} point(s); give at least 3 of [x, y] in 0..1")
        if self.polygon is not None and abs(_area(self.polygon)) < 1e-9:
            raise ValueError("region.polygon has no area; give corners in order, not on one line, without crossing")
        return self

    def within(self, image: ImageSpec) -> ImageSpec:
        """`image` with this region; raises `ConfigError` for a mask that cannot be read, or one too small."""
        counts = self._pixels(image)
        share = float(counts.mean())
        if share < LEAST_SHARE:
            white = " (white, 255, is what counts)" if self.mask is not None else ""
            raise ConfigError(
                f"region leaves {share:.2%} of the picture, less than {LEAST_SHARE:.0%}; draw a larger one{white}"
            )
        kept = b64encode(encode_png(counts.astype(np.uint8) * 255)).decode()
        if len(kept) > _LARGEST_KEPT:
            raise ConfigError("region.mask is too intricate to keep; smooth its outline, or give a region.polygon")
        return image.model_copy(update={"region": kept})

    def _pixels(self, image: ImageSpec) -> npt.NDArray[np.bool_]:
        """Which pixels count, (H, W)."""
        if self.polygon is not None:
            return _filled(self.polygon, image.height, image.width)
        assert self.mask is not None
        grey = image.model_copy(update={"channels": 1, "background": (0, 0, 0), "region": None})
        try:
            return np.asarray(decode(Path(self.mask).read_bytes(), grey)[0].numpy() >= 128, np.bool_)
        except (BadImage, OSError) as error:
            reason = (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)
            raise ConfigError(
                f"cannot read region.mask {self.mask}: {reason}; give the path of a PNG, white where it counts"
            ) from None


def _area(polygon: tuple[tuple[float, float], ...]) -> float:
    """Twice the signed area (Gauss)."""
    return sum(x * v - u * y for (x, y), (u, v) in pairwise([*polygon, polygon[0]]))


def _filled(polygon: tuple[tuple[float, float], ...], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Pixels (H, W) whose centre lies inside: a ray to the right crosses the outline an odd number of times."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height)[:, None] + 0.5) / height
    found = np.zeros((height, width), np.bool_)
    for (x0, y0), (x1, y1) in pairwise([*polygon, polygon[0]]):
        if y0 != y1:
            found ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
    return found

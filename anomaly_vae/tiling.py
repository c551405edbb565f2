"""`tiles`: large or wide pictures in square pieces at their own resolution, and the maps of the pieces in one again."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from pydantic import Field
from torch import Generator, Tensor

from anomaly_vae.images import ImageSpec, inside
from anomaly_vae.spec import Spec


class TilesSpec(Spec):
    """Models see squares of `side` px; `image` is the whole picture, which they cover.

    `overlap`: the least share of its side that a tile has in common with the next. A picture's scores are the maxima
    over its tiles. The heat maps' blur is a share of the tile's side.
    """

    side: int = Field(128, ge=16, le=512)
    overlap: float = Field(0.25, ge=0, lt=0.9)


@dataclass(frozen=True, eq=False)
class Tiling:
    """Where the tiles of a picture lie. `corners` (T, 2): top and left of each, of those with a pixel that counts.

    `size`: height and width of the picture. `inside` (H, W) bool: the pixels that count; None where all do.
    """

    size: tuple[int, int]
    side: int
    corners: Tensor
    inside: Tensor | None

    @property
    def count(self) -> int:
        """Tiles of a picture."""
        return len(self.corners)

    def cut(self, image: Tensor) -> Tensor:
        """Tiles (T, ..., side, side) of an image (..., H, W)."""
        return torch.stack([self._at(image, top, left) for top, left in self.corners.tolist()])

    def stitch(self, maps: Tensor) -> Tensor:
        """The map (H, W) of maps (T, side, side); 0 where no tile lies, which is where nothing counts.

        Where tiles overlap their mean is weighted by the distance from each one's border: there a network knows least
        of what is around, and without seams nothing looks like an edge of a defect.
        """
        window, weight = self.window().to(maps.device), self.weight().to(maps.device)
        total = torch.zeros(self.size, device=maps.device)
        for (top, left), one in zip(self.corners.tolist(), maps.float(), strict=True):
            self._at(total, top, left).add_(window * one)
        return torch.where(weight > 0, total / weight, total)

    def window(self) -> Tensor:
        """How much each pixel of a tile counts, (side, side)."""
        ramp = torch.arange(self.side) + 0.5
        ramp = torch.minimum(ramp, self.side - ramp) / self.side
        return ramp[:, None] * ramp

    def weight(self) -> Tensor:
        """How much all tiles count together at each pixel of the picture, (H, W)."""
        found = torch.zeros(self.size)
        for top, left in self.corners.tolist():
            self._at(found, top, left).add_(self.window())
        return found

    def drawn(self, images: Tensor, generator: Generator) -> Tensor:
        """One tile (C, side, side) by chance of each image (B, C, H, W).

        First a pixel that counts, then a tile around it, moved inside: so those at the border, which are judged in
        every picture, are seen as often as others.
        """
        height, width = self.size
        if self.inside is None:
            pixels = torch.randint(height * width, (len(images),), generator=generator)
        else:
            places = self.inside.flatten().nonzero()[:, 0]
            pixels = places[torch.randint(len(places), (len(images),), generator=generator)]
        before = torch.randint(self.side, (2, len(images)), generator=generator)
        tops = (pixels // width - before[0]).clamp(0, height - self.side)
        lefts = (pixels % width - before[1]).clamp(0, width - self.side)
        corners = zip(tops.tolist(), lefts.tolist(), strict=True)
        return torch.stack([self._at(image, *corner) for image, corner in zip(images, corners, strict=True)])

    def _at(self, image: Tensor, top: int, left: int) -> Tensor:
        return image[..., top : top + self.side, left : left + self.side]


@lru_cache(maxsize=8)
def tiling_of(image: ImageSpec, tiles: TilesSpec) -> Tiling:
    """Where the tiles of pictures of `image` lie."""
    rows, columns = (starts(length, tiles.side, tiles.overlap) for length in (image.height, image.width))
    counts = inside(image)
    size, side = (image.height, image.width), tiles.side
    corners = torch.tensor([[top, left] for top in rows for left in columns])
    if counts is not None:
        # A tile of nothing but background says nothing, and no model has seen one.
        corners = corners[[bool(counts[y : y + side, x : x + side].any()) for y, x in corners.tolist()]]
    return Tiling(size, side, corners, counts)


def starts(length: int, side: int, overlap: float) -> list[int]:
    """Where tiles of `side` px begin, evenly spaced, the first and the last flush with the ends of `length` px."""
    gaps = -(-(length - side) // max(1, int(side * (1 - overlap))))
    return [i * (length - side) // gaps for i in range(gaps + 1)] if gaps else [0]

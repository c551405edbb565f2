"""The score of a picture's shape: how far its outlines lie from those of the most similar normals.

It asks no model, so it keeps its head where a decoder rebuilds what it never saw, or where normals are of many kinds.
"""

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from anomaly_vae.observations import Observation, Seen, wide
from anomaly_vae.oriented_gradients import Grid, grid_of, oriented, windowed
from anomaly_vae.score_base import Array, Fitted, References, Score

_PIXELS = 4
"""Pixels of a cell's side; the picture is brought to that."""
_REACH = 1.9
"""Pixels: the standard deviation of a cell's window, which overlaps with the next, so that a shift changes little."""
_WEAK = 1e-3
"""So little gradient in a whole picture is none."""


class UnfamiliarShape(Score):
    """Distance from the plane through the `neighbours` most similar normals (hyperplane distance, Vincent and Bengio
    2001) in histograms of oriented gradients (Dalal and Triggs 2005), compared by Hellinger's distance.

    Gradients fall into `cells` along the shorter side and `orientations` of 360 degrees; of colours the strongest
    counts. `ridge` holds the nearest point of the plane near the neighbours' mean. Between 0 and about 1, whatever the
    picture's contrast. At most `kept` normals are kept, drawn at random, by their first `directions` principal
    components; what of a picture lies across these counts in full. The map is each cell's part in the distance.
    Cost: no pass of the model; a product with each kept normal, in float64.
    """

    kind: Literal["unfamiliar_shape"] = "unfamiliar_shape"
    of_pictures: ClassVar[bool] = True
    untaught: ClassVar[bool] = True
    cells: int = Field(7, ge=1, le=64)
    orientations: int = Field(8, ge=4, le=64)
    neighbours: int = Field(10, ge=1, le=1000)
    ridge: float = Field(1.0, gt=0, le=1000)
    directions: int = Field(96, ge=1, le=4096)
    kept: int = Field(32_768, ge=1, le=1_000_000)

    @property
    def shown(self) -> int:
        return self.kept

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return self._residual(seen, references).square().sum(1).sqrt()

    def map(self, seen: Observation, references: References) -> Tensor:
        rows, columns = grid_of(seen.x, self.cells)
        residual = self._residual(seen, references).reshape(-1, self.orientations, rows, columns)
        cells = residual.square().sum(1).sqrt()
        return F.interpolate(cells[:, None], seen.x.shape[2:], mode="bilinear", align_corners=False)[:, 0]

    def statistic(self, seen: Seen) -> Tensor:
        # The same under every class. In float32, since there may be many.
        return self._outlines(seen if isinstance(seen, Observation) else seen.of_classes[0]).float()

    def fit(self, statistics: Array) -> Fitted:
        from sklearn.decomposition import PCA

        chosen = np.random.default_rng(0).permutation(len(statistics))[: self.kept]
        rows = statistics[np.sort(chosen)]
        # The estimator wants two rows.
        rows = np.concatenate([rows, rows]) if len(rows) < 2 else rows
        found = PCA(min(self.directions, *rows.shape), random_state=0)
        with np.errstate(invalid="ignore"):
            # Normals that are all alike have no variance to explain.
            codes = found.fit_transform(rows)
        fitted = {"mean": found.mean_, "directions": found.components_, "codes": codes}
        return {name: np.ascontiguousarray(value, np.float32) for name, value in fitted.items()}

    def _residual(self, seen: Observation, references: References) -> Tensor:
        """What the plane cannot explain, (B, D)."""
        # Not kept for the next call: in fitting, the same pictures are measured against several references.
        directions, codes = wide(references["directions"]), wide(references["codes"])
        centred = self._outlines(seen) - wide(references["mean"])
        code = centred @ directions.T
        return centred - (code - from_plane(code, codes, self.neighbours, self.ridge)) @ directions

    def _outlines(self, seen: Observation) -> Tensor:
        """Roots of the histograms (B, orientations x cells), each row of length 1."""
        return seen.once(
            ("outlines", self.cells, self.orientations),
            lambda: outlines(wide(seen.x), grid_of(seen.x, self.cells), self.orientations),
        )


def outlines(x: Tensor, grid: Grid, orientations: int) -> Tensor:
    """Roots of histograms of oriented gradients of pictures (B, C, H, W), (B, orientations x rows x columns)."""
    size = (grid[0] * _PIXELS, grid[1] * _PIXELS)
    x = x if x.shape[2:] == size else F.interpolate(x, size, mode="area")
    histograms = windowed(oriented(x, orientations), grid, _REACH).flatten(1)
    return (histograms / (histograms.sum(1, keepdim=True) + _WEAK)).sqrt()


def from_plane(points: Tensor, normals: Tensor, neighbours: int, ridge: float) -> Tensor:
    """Points (B, D) less the nearest point of the plane through their nearest `normals` (N, D); shape (B, D).

    `ridge`, in units of the neighbours' mean squared distance from their mean, is the price of leaving that mean.
    """
    count = min(neighbours, len(normals))
    squares = normals.square().sum(1)
    nearest = (squares - 2 * points @ normals.T).topk(count, 1, largest=False).indices
    chosen = normals[nearest]
    mean = chosen.mean(1)
    spanned, centred = chosen - mean[:, None], points - mean
    products = spanned @ spanned.mT
    price = ridge * products.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
    weights = torch.linalg.solve(
        products + price[:, None, None] * torch.eye(count, dtype=points.dtype, device=points.device),
        (spanned @ centred[:, :, None]),
    )
    along: Tensor = (weights.mT @ spanned)[:, 0]
    return centred - along

"""The score of a picture's texture: how far its patches lie from those of normals, wherever in the picture they are.

It asks no model and learns nothing but what normal patches look like, so a few pictures are enough.
"""

from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from anomaly_vae.observations import Observation, Seen, shorter_side, wide
from anomaly_vae.oriented_gradients import grid_of, oriented, windowed
from anomaly_vae.score_base import Array, Fitted, References, Score, mean_of_largest

_REACH = 0.475
"""The standard deviation of a cell's window, in cells."""
_DARK = 1e-5
"""So little gradient is noise; the root would magnify it."""
_LEVEL = 0.05
"""Directions with less than this share of the largest deviation are not magnified to count as much as it."""
_NEIGHBOURHOOD = 3
_SHOWN = 1024
"""So many pictures or tiles have all the patches that are wanted."""
_AT_ONCE = 4096
_MEASURED = 20_000
"""So many patches tell their directions."""


class UnfamiliarTexture(Score):
    """Mean distance of the picture's least familiar patches from the `neighbours` most similar of normals (a memory of
    patches, after PatchCore, Roth et al. 2022, with oriented gradients instead of a trained network's features).

    The picture falls into `cells` along the shorter side; of each, roots of its gradients in eight directions and its
    mean colour are described together with those of its eight neighbours, in the `directions` normals vary most in,
    whitened. `kept` patches of normals are kept, drawn by `seed`. Averaged are the `share` of the cells with the
    largest distances, which are the map. Cost: no pass of the model; a product of all patches with all kept ones.
    """

    kind: Literal["unfamiliar_texture"] = "unfamiliar_texture"
    of_pictures: ClassVar[bool] = True
    untaught: ClassVar[bool] = True
    cells: int = Field(16, ge=3, le=256)
    directions: int = Field(20, ge=1, le=1000)
    neighbours: int = Field(3, ge=1, le=100)
    share: float = Field(0.1, gt=0, le=1)
    kept: int = Field(2048, ge=1, le=100_000)
    seed: int = Field(0, ge=0)

    @property
    def shown(self) -> int:
        return _SHOWN

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return mean_of_largest(self._distances(seen, references).flatten(1), self.share)

    def map(self, seen: Observation, references: References) -> Tensor:
        cells = self._distances(seen, references)[:, None]
        return F.interpolate(cells, seen.x.shape[2:], mode="bilinear", align_corners=False)[:, 0]

    def statistic(self, seen: Seen) -> Tensor:
        # The same under every class. In float32, since all cells of many pictures are held at once.
        return self._cells(seen if isinstance(seen, Observation) else seen.of_classes[0]).float()

    def fit(self, statistics: Array) -> Fitted:
        rng = np.random.default_rng(self.seed)
        count, _, rows, columns = statistics.shape
        places = rng.permutation(count * rows * columns)[: max(self.kept, _MEASURED)]
        drawn = patches_at(statistics, places).astype(np.float64)
        mean = drawn.mean(0)
        _, singular, directions = np.linalg.svd(drawn - mean, full_matrices=False)
        deviations = singular / np.sqrt(len(drawn))
        usual = deviations + _LEVEL * deviations[0]
        axes = (directions / np.maximum(usual, 1e-6)[:, None])[: self.directions].T
        # What was drawn is in random order.
        memory = (drawn[: self.kept] - mean) @ axes
        return {
            name: np.ascontiguousarray(value, np.float32)
            for name, value in {"mean": mean, "axes": axes, "memory": memory}.items()
        }

    def _distances(self, seen: Observation, references: References) -> Tensor:
        """Of each cell's patch, (B, rows, columns)."""
        cells = self._cells(seen)
        batch, _, rows, columns = cells.shape
        points = (patches(cells) - wide(references["mean"])) @ wide(references["axes"])
        return from_memory(points, wide(references["memory"]), self.neighbours).reshape(batch, rows, columns)

    def _cells(self, seen: Observation) -> Tensor:
        """Roots of the gradients and the mean colour of each cell, (B, 8 + C, rows, columns)."""
        return seen.once(("cells", self.cells), lambda: described(wide(seen.x), self.cells))


def described(x: Tensor, cells: int) -> Tensor:
    """What is told of each cell of pictures (B, C, H, W), (B, 8 + C, rows, columns)."""
    grid, sigma = grid_of(x, cells), _REACH * shorter_side(x) / cells
    return torch.cat([(windowed(oriented(x, 8), grid, sigma) + _DARK).sqrt(), windowed(x, grid, sigma)], 1)


def from_memory(points: Tensor, memory: Tensor, neighbours: int) -> Tensor:
    """Mean distance of points (N, D) from the nearest of `memory` (M, D), shape (N,)."""
    count, squares, found = min(neighbours, len(memory)), memory.square().sum(1), []
    # A graph that is exported takes a batch of any size, which no number of pieces suits.
    for some in [points] if torch.onnx.is_in_onnx_export() else torch.split(points, _AT_ONCE):
        nearest = memory[torch.topk(torch.addmm(squares, some, memory.T, alpha=-2), count, 1, largest=False).indices]
        # Anew: the difference of squares that told which they are has lost what is small.
        found.append((nearest - some[:, None]).square().sum(2).sqrt().mean(1))
    return torch.cat(found)


def patches(cells: Tensor) -> Tensor:
    """Each cell with its neighbours, (B x rows x columns, 9 (8 + C)); borders mirror."""
    padded = F.pad(cells, (1, 1, 1, 1), mode="reflect")
    return F.unfold(padded, _NEIGHBOURHOOD).transpose(1, 2).flatten(0, 1)


def patches_at(statistics: Array, places: npt.NDArray[np.int64]) -> Array:
    """Some of the patches of all pictures (n, 8 + C, rows, columns), by their numbers."""
    padded = np.pad(statistics, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    picture, cell = np.divmod(places, statistics.shape[2] * statistics.shape[3])
    row, column = np.divmod(cell, statistics.shape[3])
    around = [padded[picture, :, row + i, column + j] for i in range(3) for j in range(3)]
    return np.stack(around, 2).reshape(len(places), -1)

"""Scores of what the model fills in: a defect that it is not shown it cannot rebuild."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from anomaly_vae.observations import Observation, wide
from anomaly_vae.score_base import References, Score


class Inpainting(Score):
    """Mean squared error of pixels that were masked (RIAD, Zavrtanik et al. 2021), mean over the sizes of cells.

    For each number in `cells` the shorter side is cut into so many cells; these are dealt to `sets` masks, the same
    for all pictures, so that each is hidden once, in the picture's mean colour. The map is the error itself. Wants a
    model trained to fill in (objective.corruption masks). Cost: `sets` passes for each size, 6 unless told.
    """

    kind: Literal["inpainting"] = "inpainting"
    of_pictures: ClassVar[bool] = True
    cells: tuple[Annotated[int, Field(ge=2, le=512)], ...] = Field((4, 8), min_length=1, max_length=8)
    sets: int = Field(3, ge=2, le=16)
    seed: int = Field(0, ge=0)

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return self.map(seen, references).flatten(1).mean(1)

    def map(self, seen: Observation, references: References) -> Tensor:
        return seen.once(self, lambda: torch.stack([self._error(seen, count) for count in self.cells]).mean(0))

    def _error(self, seen: Observation, count: int) -> Tensor:
        """Squared error of each pixel while it was hidden, (B, H, W)."""
        colour = wide(seen.x).mean((2, 3), keepdim=True).to(seen.x)
        dealt = self._dealt(seen.x.shape[2], seen.x.shape[3], count).to(seen.x.device)
        error = torch.zeros_like(wide(seen.x[:, 0]))
        for number in range(self.sets):
            hidden = dealt == number
            if hidden.any():
                filled = seen.of(torch.where(hidden, colour, seen.x)).reconstruction
                error = torch.where(hidden, wide((seen.x - filled) ** 2).mean(1), error)
        return error

    def _dealt(self, height: int, width: int, count: int) -> Tensor:
        """The number of the mask that hides each pixel, int64 (H, W)."""
        side = max(1, min(height, width) // count)
        rows, columns = -(-height // side), -(-width // side)
        generator = torch.Generator().manual_seed(self.seed)
        numbers = torch.randperm(rows * columns, generator=generator).reshape(rows, columns) % self.sets
        return numbers.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width]

"""Scores of what the encoder makes of a picture and of its reconstruction x^: features tell more than pixels do.

Computed in float64, since differences of what is nearly equal, and their whitening, magnify rounding.
"""

from typing import Literal

import torch
from torch import Tensor

from anomaly_vae.observations import Observation
from anomaly_vae.score_base import References, Score
from anomaly_vae.whitened_score import WhitenedScore


class SimpleActivationPath(Score):
    """sum_l ||h_l(x) - h_l(x^)||^2 over the encoder's stages, maps by their mean over places (SAP of RaPP, Kim et al.
    2020). Cost: 1 pass and 2 encodings, in float64.

    The last stage counts by its posterior mean; the picture itself, l = 0, does not count.
    """

    kind: Literal["simple_activation_path"] = "simple_activation_path"

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return torch.stack([_mean_square(stage).sum(1) for stage in seen.exact.activation_differences]).sum(0)


class NormalisedActivationPath(WhitenedScore):
    """The same after whitening on normals (NAP of RaPP, Kim et al. 2020), shrunk after Ledoit and Wolf (2004).

    Of a map, each channel's root mean square over places is what is whitened, of other stages the differences
    themselves, so that references stay small. Cost: as `simple_activation_path`, shared with it.
    """

    kind: Literal["normalised_activation_path"] = "normalised_activation_path"

    def numbers(self, seen: Observation) -> Tensor:
        stages = seen.exact.activation_differences
        return torch.cat([_mean_square(stage).sqrt() if stage.dim() > 2 else stage for stage in stages], 1)


class EncoderDifference(WhitenedScore):
    """Mahalanobis distance of mu(x) - mu(x^) from those of normals: the last step of RaPP's path alone (Kim et al.
    2020). Cost: 1 pass and 1 encoding, in float64."""

    kind: Literal["encoder_difference"] = "encoder_difference"

    def numbers(self, seen: Observation) -> Tensor:
        return seen.exact.code_difference


def _mean_square(stage: Tensor) -> Tensor:
    """(B, C): of maps (B, C, H, W) the mean over places of the squares, of (B, C) the squares."""
    squares = stage.square()
    return squares.flatten(2).mean(2) if squares.dim() > 2 else squares

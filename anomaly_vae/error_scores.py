"""Scores of the difference between a picture and its reconstruction x^, pixel by pixel."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from anomaly_vae.model import ModelSpec
from anomaly_vae.observations import Observation, gaussian_blur, shorter_side, wide
from anomaly_vae.score_base import References, Score, mean_of_largest


class SquaredError(Score):
    """Mean over pixels and channels of (x - x^)^2. Cost: 1 pass."""

    kind: Literal["squared_error"] = "squared_error"

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return wide(seen.squared_error).flatten(1).mean(1)

    def map(self, seen: Observation, references: References) -> Tensor:
        return seen.squared_error


class AbsoluteError(Score):
    """Mean over pixels and channels of |x - x^|. Cost: 1 pass."""

    kind: Literal["absolute_error"] = "absolute_error"

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return wide((seen.x - seen.reconstruction).abs()).flatten(1).mean(1)

    def map(self, seen: Observation, references: References) -> Tensor:
        return (seen.x - seen.reconstruction).abs().mean(1)


class RelativeError(Score):
    """||x - x^||^2 / (||x - mean of x||^2 + c): an error counts less in a busy picture. Cost: 1 pass.

    The energy is taken about the picture's own mean, so that brightness does not count as content; c is one grey
    level's energy, which keeps a blank picture finite.
    """

    kind: Literal["relative_error"] = "relative_error"

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return wide(seen.squared_error).flatten(1).mean(1) / (self._energy(seen) + 255.0**-2)

    def map(self, seen: Observation, references: References) -> Tensor:
        return wide(seen.squared_error) / (self._energy(seen) + 255.0**-2)[:, None, None]

    @staticmethod
    def _energy(seen: Observation) -> Tensor:
        return wide((seen.x - seen.x.mean((2, 3), keepdim=True)) ** 2).flatten(1).mean(1)


class LocalMaximum(Score):
    """Largest blurred squared error: a small defect is not averaged away. Cost: 1 pass.

    `window` is the blur's standard deviation as a share of the shorter side.
    """

    kind: Literal["local_maximum"] = "local_maximum"
    window: float = Field(0.03, gt=0, le=0.5)

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return wide(self.map(seen, references)).flatten(1).amax(1)

    def map(self, seen: Observation, references: References) -> Tensor:
        return seen.once(self, lambda: gaussian_blur(seen.squared_error, self.window * shorter_side(seen.x)))


class TopK(Score):
    """Mean of the largest squared errors, those of the share `share` of the pixels (at least one). Cost: 1 pass.

    Between the maximum, which one noisy pixel moves, and the mean, in which a small defect drowns.
    """

    kind: Literal["top_k"] = "top_k"
    share: float = Field(0.02, gt=0, le=1)

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return mean_of_largest(wide(seen.squared_error).flatten(1), self.share)

    def map(self, seen: Observation, references: References) -> Tensor:
        return seen.squared_error


class GeneratorResidual(Score):
    """Mean squared error + `weight` times that of the critic's features (f-AnoGAN, Schlegl et al. 2019, eq. 6).

    Its map is the first part. Cost: 1 pass and two of the critic.
    """

    kind: Literal["generator_residual"] = "generator_residual"
    weight: float = Field(1.0, ge=0)

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return wide(seen.squared_error).flatten(1).mean(1) + self.weight * seen.feature_error

    def map(self, seen: Observation, references: References) -> Tensor:
        return seen.squared_error

    def refusal(self, model: ModelSpec) -> str | None:
        return None if model.critic else "it compares a critic's features; set model.critic"

"""Scores in nats that take from the likelihood what any model would give the picture: how simple it is, how grey."""

import bz2
import math
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from anomaly_vae.likelihoods import Likelihood
from anomaly_vae.model import ModelSpec
from anomaly_vae.observations import Observation, Seen, wide
from anomaly_vae.score_base import Array, Fitted, References, Score, no_bound

_GREY = 1 / 255
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""(rows up, columns left) of the values that the background predicts from: all come earlier in reading order."""


class InputComplexity(Score):
    """-ELBO - ln 2 * (bits of the picture, losslessly compressed), nats (Serra et al. 2020, eq. 2, whose S is in bits).

    Simple pictures are likely under any model; what they compress to takes that away. The codec is PNG's Paeth filter
    and bzip2. The bits of a grey level's width, the same for all pictures, are left out. Cost: the ELBO and the codec.
    """

    kind: Literal["input_complexity"] = "input_complexity"
    of_pictures: ClassVar[bool] = True
    samples: int = Field(2, ge=1, le=256)
    seed: int = 0
    log_scale: ClassVar[bool] = False
    is_log_likelihood: ClassVar[bool] = True

    def __call__(self, seen: Observation, references: References) -> Tensor:
        pictures = (seen.x * 255).round().to("cpu", torch.uint8).numpy()
        bits = torch.tensor([compressed_bits(picture) for picture in pictures], dtype=torch.float64)
        nll = seen.negative_elbo(self.samples, self.seed)
        return nll - math.log(2) * bits.to(nll)

    def refusal(self, model: ModelSpec) -> str | None:
        return no_bound(model)


class LikelihoodRatio(Score):
    """log p_background(x) - ELBO, nats (Ren et al. 2019, eq. 4, negated). Cost: as the ELBO.

    Ren's second network is here what one trained model can have beside it: every value is Gaussian about a linear
    function of its four neighbours earlier in reading order, fitted on normals and the same at all places. That is a
    density, and it knows texture and smoothness but nothing of what is shown. Noise and hard edges, which it
    finds unlikely too, are forgiven.
    """

    kind: Literal["likelihood_ratio"] = "likelihood_ratio"
    samples: int = Field(2, ge=1, le=256)
    seed: int = 0
    log_scale: ClassVar[bool] = False
    is_log_likelihood: ClassVar[bool] = True

    def __call__(self, seen: Observation, references: References) -> Tensor:
        values = wide(_with_neighbours(seen.x))
        error = values[..., -1] - values[..., :-1] @ wide(references["weights"])
        log_sigma = wide(references["log_sigma"])
        background = -0.5 * (error * (-log_sigma).exp()) ** 2 - log_sigma - 0.5 * math.log(2 * math.pi)
        return seen.negative_elbo(self.samples, self.seed) + background.sum(1)

    def statistic(self, seen: Seen) -> Tensor:
        """The mean products of a value, its neighbours and 1, one row an image."""
        values = wide(_with_neighbours(seen.x))
        return (values.mT @ values / values.shape[1]).flatten(1)

    def fit(self, statistics: Array) -> Fitted:
        size = len(_NEIGHBOURS) + 2
        products = statistics.mean(0).reshape(size, size)
        # Neighbours that say the same, as in blank pictures, leave the weights open; the ridge chooses small ones.
        weights = np.linalg.solve(products[:-1, :-1] + 1e-6 * np.eye(size - 1), products[:-1, -1])
        residual = np.append(-weights, 1.0)
        variance = max(float(residual @ products @ residual), _GREY**2)
        return {"weights": weights.astype(np.float32), "log_sigma": np.array([0.5 * math.log(variance)], np.float32)}

    def refusal(self, model: ModelSpec) -> str | None:
        if model.likelihood.kind == "bernoulli":
            return (
                "a Bernoulli's probability cannot be held against a background's density; "
                "set model.likelihood.kind=continuous_bernoulli"
            )
        return no_bound(model)


class BcLikelihood(Score):
    """sum_i max_lambda log p(x_i; lambda) - ELBO, nats, of the picture with its contrast stretched (Chauhan et al.
    2022, eq. 4, negated). Cost: as the ELBO.

    The maximum is what a perfect reconstruction would be worth; for the continuous Bernoulli it depends on the grey,
    for laws of a location and a scale it is a constant. Stretching is to normals' own range, between the percentiles
    `percentile` and 100 - `percentile`, as the model saw normals unstretched; a blank picture is left as it is.
    """

    kind: Literal["bc_likelihood"] = "bc_likelihood"
    of_pictures: ClassVar[bool] = True
    samples: int = Field(2, ge=1, le=256)
    seed: int = 0
    percentile: float = Field(5.0, ge=0, lt=50)
    log_scale: ClassVar[bool] = False
    is_log_likelihood: ClassVar[bool] = True

    def __call__(self, seen: Observation, references: References) -> Tensor:
        stretched = self._stretched(seen.x, references["range"].to(seen.x))
        levels = (stretched * 255).round().long()
        best = most_likely(seen.model.likelihood, seen.x.device)[levels].flatten(1).sum(1)
        # Stretching back to bytes makes it a picture again, of which the table knows every value.
        return best + seen.of(levels.to(seen.x) / 255).negative_elbo(self.samples, self.seed)

    def statistic(self, seen: Seen) -> Tensor:
        return self._range(seen.x)

    def fit(self, statistics: Array) -> Fitted:
        return {"range": statistics.mean(0).astype(np.float32)}

    def refusal(self, model: ModelSpec) -> str | None:
        return no_bound(model)

    def _range(self, x: Tensor) -> Tensor:
        """The low and the high percentile of each picture, (B, 2)."""
        shares = torch.tensor([self.percentile / 100, 1 - self.percentile / 100], device=x.device, dtype=x.dtype)
        ordered = x.flatten(1).sort(1).values
        return ordered[:, (shares * (ordered.shape[1] - 1)).round().long()]

    def _stretched(self, x: Tensor, usual: Tensor) -> Tensor:
        low, high = self._range(x).T[:, :, None, None, None]
        if usual[1] - usual[0] < _GREY:
            return x
        stretched = usual[0] + (x - low) * (usual[1] - usual[0]) / (high - low).clamp_min(_GREY)
        return torch.where(high - low < _GREY / 2, x, stretched.clamp(0, 1))


def compressed_bits(picture: npt.NDArray[np.uint8]) -> int:
    """Bits of a lossless code of a picture (C, H, W)."""
    values = np.pad(picture.astype(np.int16), ((0, 0), (1, 0), (1, 0)))
    left, up, corner = values[:, 1:, :-1], values[:, :-1, 1:], values[:, :-1, :-1]
    nearness = np.abs(np.stack([up - corner, left - corner, left + up - 2 * corner]))
    predicted = np.choose(nearness.argmin(0), [left, up, corner])
    # bzip2 has one implementation; those of PNG's deflate differ in what they save.
    return 8 * len(bz2.compress((picture - predicted).astype(np.uint8).tobytes()))


def most_likely(likelihood: Likelihood, device: torch.device) -> Tensor:
    """max over the law's parameters of log p(x), nats, for the 256 values x = 0, 1/255 .. 1; float64, shape (256,).

    All laws reach it where their mean is x, at the smallest scale that they can have. The mean grows with the first
    raw output, so halving an interval finds it.
    """
    x = wide(torch.arange(256, device=device))[None, None, None] / 255
    # The other output, where there is one, is the logarithm of the scale.
    rest = torch.full_like(x, -1e3).expand(1, likelihood.outputs_per_channel - 1, 1, 256)
    low, high = torch.full_like(x, -200.0), torch.full_like(x, 200.0)
    for _ in range(64):
        middle = (low + high) / 2
        below = likelihood.mean(torch.cat([middle, rest], 1)) < x
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return wide(likelihood.log_prob(torch.cat([(low + high) / 2, rest], 1), x)).flatten()


def _with_neighbours(x: Tensor) -> Tensor:
    """(B, C H W, 6): 1, the four neighbours and the value itself; outside the picture all is black."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 0))
    shifted = [padded[:, :, 1 - up : 1 - up + height, 1 - left : 1 - left + width] for up, left in _NEIGHBOURS]
    return torch.stack([torch.ones_like(x), *shifted, x], -1).flatten(1, 3)

"""p(x given z): the densities a decoder's output can be read as.

All work on images x in [0, 1] of shape (B, C, H, W) and on the decoder's raw output of shape (B, k C, H, W), k =
`outputs_per_channel`. `log_prob` is a true log-density in nats with its normalising constant, one value for each pixel
and channel. A scale estimated from errors lives in a buffer: training updates it, scoring only reads it.
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_vae.spec import Spec

Scale = Literal["optimal", "learned"] | float
MIN_LOG_SCALE = -5.0
"""Lower bound of log sigma: below 1/150 of the grey range a scale only tells about the camera's quantisation."""
MAX_LOGIT = 20.0
"""The continuous Bernoulli's steepest logit: its mean is then 1/20 from black or white."""
_MOMENTUM = 0.1


class Likelihood(nn.Module, ABC):
    """Base of the decoders' output laws."""

    outputs_per_channel = 1

    @abstractmethod
    def mean(self, output: Tensor) -> Tensor:
        """E[x given z], shape (B, C, H, W)."""

    @abstractmethod
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """log p(x given z) in nats for each pixel and channel, shape (B, C, H, W)."""

    def deviation(self, output: Tensor, x: Tensor) -> Tensor:
        """How far x lies from the mean in units of the law's own scale, >= 0, shape (B, C, H, W)."""
        return (x - self.mean(output)) ** 2

    def observe(self, output: Tensor, x: Tensor) -> None:
        """Let an estimated scale follow the errors of a training batch; does nothing where there is none."""


class _LocationScale(Likelihood):
    """A mean and a scale: the scale is a number, the batch's own error (optimal), or a second decoder output."""

    log_scale: Tensor
    observed: Tensor

    def __init__(self, scale: Scale, squash: bool) -> None:
        super().__init__()
        self.scale, self.squash = scale, squash
        self.outputs_per_channel = 2 if scale == "learned" else 1
        start = math.log(scale) if isinstance(scale, float) else -1.0
        self.register_buffer("log_scale", torch.tensor(start))
        self.register_buffer("observed", torch.tensor(0.0))

    def mean(self, output: Tensor) -> Tensor:
        location = output.chunk(2, 1)[0] if self.scale == "learned" else output
        return location.sigmoid() if self.squash else location

    def log_scale_of(self, output: Tensor) -> Tensor:
        """log of the scale, shape () or (B, C, H, W), softly bounded below."""
        if self.scale == "learned":
            return softly_above(output.chunk(2, 1)[1], MIN_LOG_SCALE)
        return self.log_scale

    def observe(self, output: Tensor, x: Tensor) -> None:
        if self.scale != "optimal":
            return
        with torch.no_grad():
            error = _of_all_processes(self._mean_error(x - self.mean(output)))
            batch = self._log_scale(error.clamp_min(1e-12)).clamp_min(MIN_LOG_SCALE)
            # The batch's own optimum is the scale of Rybkin et al.; the average of it is what scoring will use.
            self.log_scale.lerp_(batch.to(self.log_scale), 1.0 if not self.observed else _MOMENTUM)
            self.observed.fill_(1.0)

    @abstractmethod
    def _mean_error(self, error: Tensor) -> Tensor:
        """Of a batch, shape (): what its best scale is made from."""

    @abstractmethod
    def _log_scale(self, mean_error: Tensor) -> Tensor:
        """log of the scale that suits a batch's errors best, shape ()."""


def _of_all_processes(mean: Tensor) -> Tensor:
    """The mean over the whole batch, of which each process has an equal part."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        mean = mean.clone()
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
    return mean


class Gaussian(_LocationScale):
    """Normal density; `optimal` sigma^2 = mean squared error (sigma-VAE, Rybkin et al. 2021, eq. 5)."""

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        log_sigma = self.log_scale_of(output)
        return -0.5 * (x - self.mean(output)) ** 2 * (-2 * log_sigma).exp() - log_sigma - 0.5 * math.log(2 * math.pi)

    def deviation(self, output: Tensor, x: Tensor) -> Tensor:
        return (x - self.mean(output)) ** 2 * (-2 * self.log_scale_of(output)).exp()

    def _mean_error(self, error: Tensor) -> Tensor:
        return error.float().square().mean()

    def _log_scale(self, mean_error: Tensor) -> Tensor:
        return 0.5 * mean_error.log()


class Laplace(_LocationScale):
    """Laplace density; `optimal` scale = mean absolute error."""

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        log_b = self.log_scale_of(output)
        return -(x - self.mean(output)).abs() * (-log_b).exp() - log_b - math.log(2)

    def deviation(self, output: Tensor, x: Tensor) -> Tensor:
        return (x - self.mean(output)).abs() * (-self.log_scale_of(output)).exp()

    def _mean_error(self, error: Tensor) -> Tensor:
        return error.float().abs().mean()

    def _log_scale(self, mean_error: Tensor) -> Tensor:
        return mean_error.log()


class Bernoulli(Likelihood):
    """Bernoulli mass: a probability for black-and-white pixels, only a cross-entropy (no density) for greys."""

    def mean(self, output: Tensor) -> Tensor:
        return output.sigmoid()

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(output, x, reduction="none")


class ContinuousBernoulli(Likelihood):
    """Continuous Bernoulli density on [0, 1] (Loaiza-Ganem and Cunningham 2019, eq. 7); for near-binary greys.

    The logit is softly bounded: a pixel that is always black would be worth the more nats the larger its logit, without
    end, and training would chase those nats instead of strokes.
    """

    def mean(self, output: Tensor) -> Tensor:
        output = _bounded(output)
        near = output.abs() < 0.1
        safe = torch.where(near, torch.ones_like(output), output)
        # lambda / (2 lambda - 1) + 1 / (2 atanh(1 - 2 lambda)) of the paper, with lambda = sigmoid(logit).
        exact = 0.5 + 0.5 / torch.tanh(safe / 2) - 1 / safe
        # With lambda = sigmoid(logit) the mean is 1/2 + logit/12 - logit^3/720 + ... around the removable pole.
        return torch.where(near, 0.5 + output / 12 - output**3 / 720, exact)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        output = _bounded(output)
        return -F.binary_cross_entropy_with_logits(output, x, reduction="none") + self._log_constant(output)

    @staticmethod
    def _log_constant(logit: Tensor) -> Tensor:
        near = logit.abs() < 0.1
        safe = torch.where(near, torch.ones_like(logit), logit).abs()
        # log C = log(logit / tanh(logit/2)), even in the logit; written so that large logits do not overflow.
        exact = safe.log() - torch.tanh(safe / 2).log()
        return torch.where(near, math.log(2) + logit**2 / 12 - 7 * logit**4 / 1440, exact)


class GaussianSpec(Spec):
    """`sigma`: a number, `optimal` (from the training errors) or `learned` (a second decoder output for each pixel)."""

    kind: Literal["gaussian"] = "gaussian"
    sigma: Scale = "optimal"
    squash: bool = True

    @model_validator(mode="after")
    def _positive(self) -> Self:
        _check_scale(self.sigma)
        return self

    def build(self) -> Likelihood:
        """The law as a module."""
        return Gaussian(self.sigma, self.squash)


class LaplaceSpec(Spec):
    """`scale`: a number, `optimal` or `learned`, as for the Gaussian."""

    kind: Literal["laplace"] = "laplace"
    scale: Scale = "optimal"
    squash: bool = True

    @model_validator(mode="after")
    def _positive(self) -> Self:
        _check_scale(self.scale)
        return self

    def build(self) -> Likelihood:
        """The law as a module."""
        return Laplace(self.scale, self.squash)


class BernoulliSpec(Spec):
    """For black-and-white pictures."""

    kind: Literal["bernoulli"] = "bernoulli"

    def build(self) -> Likelihood:
        """The law as a module."""
        return Bernoulli()


class ContinuousBernoulliSpec(Spec):
    """For pictures whose greys are mostly near black or white."""

    kind: Literal["continuous_bernoulli"] = "continuous_bernoulli"

    def build(self) -> Likelihood:
        """The law as a module."""
        return ContinuousBernoulli()


LikelihoodSpec = Annotated[
    GaussianSpec | LaplaceSpec | BernoulliSpec | ContinuousBernoulliSpec, Field(discriminator="kind")
]


def _bounded(logit: Tensor) -> Tensor:
    return MAX_LOGIT * torch.tanh(logit / MAX_LOGIT)


def softly_above(value: Tensor, bound: float) -> Tensor:
    """`value` where it is well above `bound`, never below it, with a gradient everywhere (Rybkin et al. 2021)."""
    return bound + F.softplus(value - bound, beta=4)


def _check_scale(scale: Scale) -> None:
    if isinstance(scale, float) and not scale > 0:
        raise ValueError("a fixed scale must be above 0")

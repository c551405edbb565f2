"""The law of z: what the encoder's output means and what it costs."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from anomaly_vae.spec import Spec

_LOGVAR_RANGE = (-12.0, 8.0)


@dataclass(frozen=True)
class Posterior:
    """q(z given x) = N(mu, diag exp(logvar)); both of shape (B, D)."""

    mu: Tensor
    logvar: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """z = mu + sigma * noise: the reparameterisation of Kingma and Welling (2014); noise broadcasts to (B, D)."""
        return self.mu + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL(q(z given x) || N(0, I)) in nats for each dimension, shape (B, D)."""
        return 0.5 * (self.mu**2 + self.logvar.exp() - 1 - self.logvar)


class GaussianLatentSpec(Spec):
    """Diagonal Gaussian posterior under a standard normal prior.

    `beta` weighs the KL (beta-VAE, Higgins et al. 2017), reached linearly over the first `warmup` of training;
    `free_bits` is the KL in nats that each dimension, averaged over a batch, has for nothing (Kingma et al. 2016).
    """

    kind: Literal["gaussian"] = "gaussian"
    size: int = Field(32, ge=1, le=4096)
    beta: float = Field(1.0, ge=0)
    warmup: float = Field(0.1, ge=0, le=1)
    free_bits: float = Field(0.0, ge=0)

    @property
    def encoder_outputs(self) -> int:
        """How many numbers the encoder gives for each image."""
        return 2 * self.size

    def posterior(self, encoded: Tensor) -> Posterior:
        """Read the encoder's output of shape (B, `encoder_outputs`)."""
        mu, logvar = encoded.chunk(2, 1)
        # A variance outside this range no longer changes an image but overflows in low precision.
        return Posterior(mu, logvar.clamp(*_LOGVAR_RANGE))

    def beta_at(self, progress: float) -> float:
        """The KL's weight when the share `progress` of training is done."""
        return self.beta * min(1.0, progress / self.warmup) if self.warmup else self.beta

    def cost(self, posterior: Posterior) -> Tensor:
        """The KL term of the training loss in nats per image, free bits applied; shape ()."""
        per_dimension = posterior.kl().mean(0)
        return torch.clamp_min(per_dimension, self.free_bits).sum() if self.free_bits else per_dimension.sum()


LatentSpec = GaussianLatentSpec

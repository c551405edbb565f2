"""What an encoder says of z: q(z given x), or a single point. `mu` (B, D) is the code; it involves no chance."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from anomaly_vae import von_mises_fisher


@dataclass(frozen=True)
class Posterior(ABC):
    """Base. `random` says whether `at` depends on its noise; where it does not, one draw is as good as many."""

    mu: Tensor
    random: ClassVar[bool] = True

    @abstractmethod
    def at(self, noise: Tensor) -> Tensor:
        """The draw (B, D) that standard normal `noise` decides; noise broadcasts to (B, D)."""

    @abstractmethod
    def float(self) -> Self:
        """In float32, for what mixed precision would spoil."""


@dataclass(frozen=True)
class Point(Posterior):
    """The encoder's output itself: an autoencoder without a law of z."""

    random: ClassVar[bool] = False

    def at(self, noise: Tensor) -> Tensor:
        return self.mu

    def float(self) -> "Point":
        return Point(self.mu.float())


@dataclass(frozen=True)
class DiagonalGaussian(Posterior):
    """N(mu, diag exp(logvar)); both of shape (B, D)."""

    logvar: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """z = mu + sigma * noise: the reparameterisation of Kingma and Welling (2014)."""
        return self.mu + (0.5 * self.logvar).exp() * noise

    def float(self) -> "DiagonalGaussian":
        return DiagonalGaussian(self.mu.float(), self.logvar.float())


@dataclass(frozen=True)
class Spherical(Posterior):
    """von Mises-Fisher about the unit vector mu (B, D) with concentration kappa (B, 1); D >= 2."""

    kappa: Tensor

    def at(self, noise: Tensor) -> Tensor:
        return von_mises_fisher.sample(self.mu, self.kappa, noise.expand_as(self.mu))

    def float(self) -> "Spherical":
        return Spherical(self.mu.float(), self.kappa.float())

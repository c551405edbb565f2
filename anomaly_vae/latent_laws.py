"""The laws of z: what the encoder's output means, what it costs, and what z is like before an image is seen.

A law is a module, since some learn (a mixture's components, a critic). Laws with `has_kl` make reconstruction + KL a
bound on the log-likelihood (the ELBO); the others shape the code by a penalty, and have no ELBO.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from anomaly_vae import von_mises_fisher
from anomaly_vae.adversaries import critic_loss, frozen, generator_loss
from anomaly_vae.posteriors import DiagonalGaussian, Point, Posterior, Spherical

ACTIVE_NATS = 0.01
"""A latent is active when its mean KL over pictures exceeds this; see `LatentLaw.active` for laws without one."""
ACTIVE_SHARE = 0.01
_LOGVAR_RANGE = (-12.0, 8.0)


class Step(NamedTuple):
    """What a law may look at to say what a batch costs: its posterior, the draw z, the input and the noise."""

    posterior: Posterior
    z: Tensor
    x: Tensor
    noise: Tensor


class LatentLaw(nn.Module, ABC):
    """Base of the laws of z.

    `cost_name`: what the cost is called before people. `has_prior`: whether pictures can be drawn without codes of
    others. `wants_gradient`: the cost asks for d code / d x, so the input must allow it. `comparable`: whether costs of
    different epochs can be held against each other.
    """

    has_kl: ClassVar[bool] = False
    has_prior: bool = False
    wants_gradient: ClassVar[bool] = False
    comparable: ClassVar[bool] = True
    cost_name: ClassVar[str] = "penalty"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    @abstractmethod
    def posterior(self, encoded: Tensor) -> Posterior:
        """Read the encoder's output of shape (B, `encoder_outputs`)."""

    @abstractmethod
    def cost(self, step: Step) -> Tensor:
        """The term of the training loss, unweighted: mean over the batch, shape ()."""

    def critic_cost(self, step: Step) -> Tensor | None:
        """The loss of a critic on z, which moves nothing but the critic; None where there is none."""
        return None

    def kl(self, posterior: Posterior, z: Tensor) -> Tensor:
        """KL(q(z given x) || p(z)) in nats, (B, D) where it falls apart into latents, else (B, 1).

        Analytic laws ignore `z`; for others this is the unbiased estimate that the draw z ~ q gives.
        """
        raise ValueError(f"{type(self).__name__} has no KL")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """z from the prior, (count, D), on the generator's device."""
        if not self.has_prior:
            raise ValueError(f"{type(self).__name__} has no prior to draw from")
        return torch.randn(count, self.size, generator=generator, device=generator.device)

    def project(self, z: Tensor) -> Tensor:
        """The nearest z (B, D) that the law allows; sums and walks of codes may leave it."""
        return z

    def active(self, mu: Tensor, kl: Tensor | None) -> Tensor:
        """Which latents tell pictures apart, bool (D,): codes mu (n, D), and their KL (n, D) where there is one.

        Here: those whose code varies by more than 1% of the most varying one's variance (for codes without scale, the
        counterpart of the variance that Burda et al. 2016 look at).
        """
        variance = mu.var(0, correction=0)
        return (variance > ACTIVE_SHARE * variance.max()) & (variance > 1e-12)


class PointLaw(LatentLaw):
    """A plain autoencoder: the code is a point and costs nothing."""

    def __init__(self, size: int, prior: Literal["none", "normal"] = "none") -> None:
        super().__init__(size)
        self.has_prior = prior == "normal"

    def posterior(self, encoded: Tensor) -> Posterior:
        return Point(encoded)

    def cost(self, step: Step) -> Tensor:
        return step.z.new_zeros(())


class SparseLaw(LatentLaw):
    """Few latents at work: L1 of the code, or a mean activation near `rate` (Ng 2011, lecture notes on sparse AEs)."""

    def __init__(self, size: int, rate: float | None) -> None:
        super().__init__(size)
        self.rate = rate

    def project(self, z: Tensor) -> Tensor:
        return z if self.rate is None else z.clamp(0, 1)

    def posterior(self, encoded: Tensor) -> Posterior:
        # A rate is one of activations between 0 and 1.
        return Point(encoded if self.rate is None else encoded.sigmoid())

    def cost(self, step: Step) -> Tensor:
        """L1: sum over latents of |z|. Rate: sum over latents of KL(Bernoulli(rate) || Bernoulli(batch mean))."""
        if self.rate is None:
            return step.z.abs().sum(1).mean()
        mean = step.z.mean(0).clamp(1e-6, 1 - 1e-6)
        rate = self.rate
        return (rate * (rate / mean).log() + (1 - rate) * ((1 - rate) / (1 - mean)).log()).sum()


class ContractiveLaw(LatentLaw):
    """A code that hardly moves with the picture: ||dh/dx||_F^2 (Rifai et al. 2011, eq. 4).

    Exact by one backward pass for each latent up to `exact` of them; beyond, Hutchinson's unbiased estimate from
    `probes` random signs v, E ||v^T dh/dx||^2.
    """

    wants_gradient = True
    cost_name = "Jacobian"

    def __init__(self, size: int, exact: int, probes: int) -> None:
        super().__init__(size)
        self.exact, self.probes = exact, probes

    def posterior(self, encoded: Tensor) -> Posterior:
        return Point(encoded)

    def cost(self, step: Step) -> Tensor:
        if self.size <= self.exact:
            directions = torch.eye(self.size, device=step.z.device, dtype=step.z.dtype)[:, None]
        else:
            # The signs of the noise that the law does not need otherwise: reproducible, mean 0, variance 1.
            signs = torch.stack([step.noise.roll(i, 1) for i in range(self.probes)]).sign()
            directions = torch.where(signs == 0, 1.0, signs) / math.sqrt(self.probes)
        return torch.stack([self._squared(step, v.expand_as(step.z)) for v in directions]).sum(0).mean()

    def _squared(self, step: Step, v: Tensor) -> Tensor:
        """||v^T dh/dx||^2 of each image, (B,)."""
        (gradient,) = torch.autograd.grad(step.posterior.mu, step.x, v, create_graph=True)
        return gradient.flatten(1).square().sum(1)


class GaussianLaw(LatentLaw):
    """Diagonal Gaussian posterior under the standard normal prior (Kingma and Welling 2014)."""

    has_kl = True
    has_prior = True
    cost_name = "KL"

    def __init__(self, size: int, free_bits: float = 0.0) -> None:
        super().__init__(size)
        self.free_bits = free_bits

    def posterior(self, encoded: Tensor) -> DiagonalGaussian:
        return _diagonal(encoded)

    def kl(self, posterior: Posterior, z: Tensor) -> Tensor:
        """Analytic, (B, D)."""
        assert isinstance(posterior, DiagonalGaussian)
        return 0.5 * (posterior.mu**2 + posterior.logvar.exp() - 1 - posterior.logvar)

    def cost(self, step: Step) -> Tensor:
        per_latent = self.kl(step.posterior, step.z).mean(0)
        return torch.clamp_min(per_latent, self.free_bits).sum() if self.free_bits else per_latent.sum()

    def active(self, mu: Tensor, kl: Tensor | None) -> Tensor:
        """Those with a mean KL above `ACTIVE_NATS`."""
        assert kl is not None
        return kl.mean(0) > ACTIVE_NATS


class SphericalLaw(LatentLaw):
    """von Mises-Fisher posterior under the uniform law on the unit sphere (Davidson et al. 2018)."""

    has_kl = True
    has_prior = True
    cost_name = "KL"

    def posterior(self, encoded: Tensor) -> Spherical:
        direction, concentration = encoded[:, :-1].float(), encoded[:, -1:].float()
        # A floor keeps the mean direction defined; above some thousand the law is a point for any decoder.
        kappa = 1.0 + nn.functional.softplus(concentration + 3.0)
        return Spherical(nn.functional.normalize(direction, dim=1), kappa.clamp_max(1e4))

    def kl(self, posterior: Posterior, z: Tensor) -> Tensor:
        """Analytic, (B, 1)."""
        assert isinstance(posterior, Spherical)
        return von_mises_fisher.kl_to_uniform(posterior.kappa, self.size)

    def cost(self, step: Step) -> Tensor:
        return self.kl(step.posterior, step.z).sum(1).mean()

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return self.project(super().draw(count, generator))

    def project(self, z: Tensor) -> Tensor:
        return nn.functional.normalize(z, dim=-1)


class MixtureLaw(LatentLaw):
    """Diagonal Gaussian posterior under a learned mixture of diagonal Gaussians; the KL is estimated from the draw."""

    has_kl = True
    has_prior = True
    cost_name = "KL"

    def __init__(self, size: int, components: int) -> None:
        super().__init__(size)
        self.means = nn.Parameter(torch.randn(components, size))
        self.logvars = nn.Parameter(torch.zeros(components, size))
        self.logits = nn.Parameter(torch.zeros(components))

    def posterior(self, encoded: Tensor) -> DiagonalGaussian:
        return _diagonal(encoded)

    def joint(self, z: Tensor) -> Tensor:
        """log p(z, component) in nats, (B, K)."""
        z = z[:, None].to(self.means)
        return self.logits.log_softmax(0) + _log_normal(z, self.means, self.logvars.clamp(*_LOGVAR_RANGE)).sum(-1)

    def kl(self, posterior: Posterior, z: Tensor) -> Tensor:
        assert isinstance(posterior, DiagonalGaussian)
        log_q = _log_normal(z, posterior.mu, posterior.logvar).sum(1, keepdim=True)
        return log_q - self.joint(z).logsumexp(1, keepdim=True)

    def cost(self, step: Step) -> Tensor:
        return self.kl(step.posterior, step.z).sum(1).mean()

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        shares = self.logits.detach().softmax(0).to(generator.device)
        chosen = torch.multinomial(shares, count, replacement=True, generator=generator)
        means = self.means.detach().to(generator.device)
        logvars = self.logvars.detach().clamp(*_LOGVAR_RANGE).to(generator.device)
        return means[chosen] + (0.5 * logvars[chosen]).exp() * super().draw(count, generator)


class AdversarialLaw(LatentLaw):
    """Codes that a critic cannot tell from draws of N(0, I) (adversarial autoencoder, Makhzani et al. 2016)."""

    has_prior = True
    comparable = False  # its critic learns meanwhile
    cost_name = "critic"

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__(size)
        layers = [nn.Linear(size, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2)]
        self.critic = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def posterior(self, encoded: Tensor) -> Posterior:
        return Point(encoded)

    def cost(self, step: Step) -> Tensor:
        with frozen(self.critic):
            return generator_loss(self.critic(step.z))

    def critic_cost(self, step: Step) -> Tensor:
        # The noise that a point does not need otherwise is a draw from the prior.
        return critic_loss(self.critic, step.noise, step.z)


def _diagonal(encoded: Tensor) -> DiagonalGaussian:
    mu, logvar = encoded.chunk(2, 1)
    # A variance outside this range no longer changes an image but overflows in low precision.
    return DiagonalGaussian(mu, logvar.clamp(*_LOGVAR_RANGE))


def _log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mu, exp logvar) in nats for each dimension."""
    return -0.5 * ((z - mu) ** 2 * (-logvar).exp() + logvar + math.log(2 * math.pi))

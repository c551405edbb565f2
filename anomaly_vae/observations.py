"""What one model makes of a batch of images, computed once however many scores look at it.

The reconstruction is that of the posterior mean, so it involves no chance. Sums over pixels run in float64, so that a
score is the same number, to about 1e-7 of itself, whatever batch the image came in.
"""

import math
from collections.abc import Callable, Hashable
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_vae import von_mises_fisher
from anomaly_vae.differentiable import Differentiable
from anomaly_vae.latent_laws import GaussianLaw, LatentLaw
from anomaly_vae.model import AutoEncoder, Context, beside
from anomaly_vae.posteriors import DiagonalGaussian, Posterior, Spherical

_AT_ONCE = 4
"""More codes of a batch are decoded one by one, so that memory holds them."""


def wide(values: Tensor) -> Tensor:
    """In float64 where the device has it (Apple's GPUs have not)."""
    return values.float() if values.device.type == "mps" else values.double()


class Observation:
    """`x` is (B, C, H, W) in [0, 1]; `label` the classes (B,) of a conditional model."""

    def __init__(self, model: AutoEncoder, x: Tensor, label: Tensor | None = None) -> None:
        self.model, self.x, self.label = model, x, label
        self._draws: dict[tuple[int, int], list[Tensor]] = {}
        self._outputs: dict[tuple[int, int], list[Tensor]] = {}
        self._found: dict[Hashable, Tensor] = {}

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives, computed at the first call with `key`; a score and its map share their work by it."""
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]

    def of(self, x: Tensor) -> "Observation":
        """What the same model makes of other images under the same classes."""
        return Observation(self.model, x, self.label)

    @cached_property
    def _read(self) -> tuple[Posterior, Context]:
        posterior, context = self.model.read(self.x, self.label)
        return (posterior if posterior.mu.dtype == torch.float64 else posterior.float()), context

    @property
    def posterior(self) -> Posterior:
        """q(z given x)."""
        return self._read[0]

    @property
    def code(self) -> Tensor:
        """The posterior mean (B, D)."""
        return self.posterior.mu

    @cached_property
    def output(self) -> Tensor:
        """The likelihood's raw parameters at the posterior mean."""
        return self._decode(self.posterior.mu)

    def _decode(self, z: Tensor) -> Tensor:
        # Some laws give z in float32 whatever they are given.
        return _at_least_single(self.model.decode(z.to(self.x.dtype), self._read[1]))

    @cached_property
    def reconstruction(self) -> Tensor:
        """E[x given z = posterior mean], shape (B, C, H, W)."""
        return self.model.likelihood.mean(self.output)

    @cached_property
    def squared_error(self) -> Tensor:
        """(x - reconstruction)^2 averaged over channels, shape (B, H, W)."""
        return ((self.x - self.reconstruction) ** 2).mean(1)

    @cached_property
    def deviation(self) -> Tensor:
        """Deviation from the mean in the likelihood's own scale, averaged over channels; shape (B, H, W), >= 0."""
        return self.model.likelihood.deviation(self.output, self.x).mean(1)

    @cached_property
    def differentiable(self) -> Differentiable:
        """The same model and images, for what needs gradients."""
        return Differentiable(self.model, self.x, self.label)

    @cached_property
    def exact(self) -> "Observation":
        """The same in float64, for what magnifies the rounding that differs from batch to batch."""
        return Observation(self.differentiable.model, self.differentiable.x, self.label)

    def activations(self, images: Tensor) -> list[Tensor]:
        """What every stage of the encoder makes of images (B, C, H, W)."""
        found = self.model.encoder.activations(beside(images, self.model.embed(self.label)))
        return [_at_least_single(stage) for stage in found]

    @cached_property
    def activation_differences(self) -> list[Tensor]:
        """h_l(x) - h_l(reconstruction) of every stage l of the encoder; of the last output, the posterior mean."""
        ours, theirs = self.activations(self.x), self.activations(self.reconstruction)
        for stages in (ours, theirs):
            stages[-1] = self.model.law.posterior(stages[-1]).mu
        return [wide(one) - wide(other) for one, other in zip(ours, theirs, strict=True)]

    @cached_property
    def code_difference(self) -> Tensor:
        """Posterior mean of x less that of its reconstruction, (B, D)."""
        return wide(self.code) - wide(self.model.encode(self.reconstruction, self.label).mu)

    @cached_property
    def feature_error(self) -> Tensor:
        """Mean squared difference of the critic's features of x and its reconstruction, shape (B,)."""
        features = [self.model.features(images, self.label).float() for images in (self.x, self.reconstruction)]
        return wide((features[0] - features[1]) ** 2).flatten(1).mean(1)

    def draws(self, samples: int, seed: int) -> list[Tensor]:
        """`samples` draws z ~ q(z given x), each (B, D): the same noise for every image, in pairs of both signs.

        One fixed noise for all images is what makes a sampled score independent of batch mates; antithetic pairs
        cancel the odd part of its error. A code without chance is drawn once.
        """
        if not self.posterior.random:
            return [self.code]
        if (samples, seed) not in self._draws:
            noise = antithetic(samples, self.model.law.size, seed).to(self.x.device)
            self._draws[samples, seed] = [self.posterior.at(row) for row in noise]
        return self._draws[samples, seed]

    def _decoded(self, samples: int, seed: int) -> list[Tensor]:
        """The likelihood's raw parameters at the draws."""
        if not self.posterior.random:
            return [self.output]
        if (samples, seed) not in self._outputs:
            # The posterior mean goes along, since most models are asked for it as well.
            self.output, *self._outputs[samples, seed] = self._decode_all([self.code, *self.draws(samples, seed)])
        return self._outputs[samples, seed]

    def _decode_all(self, codes: list[Tensor]) -> list[Tensor]:
        """Raw parameters at each of the codes (B, D); at once where these are few and the decoder sees nothing else.

        A decoder prepares its weights anew at every call, which for a single picture costs more than the decoding.
        """
        context = self._read[1]
        if len(codes) > _AT_ONCE or context.embedded is not None or context.maps:
            return [self._decode(z) for z in codes]
        decoded = self._decode(torch.cat(codes))
        return list(decoded.reshape(len(codes), -1, *decoded.shape[1:]))

    def log_likelihoods(self, samples: int, seed: int) -> Tensor:
        """log p(x given z) in nats of each draw, (S, B): log-densities summed over pixels and channels."""
        log_probs = [self.model.likelihood.log_prob(output, self.x) for output in self._decoded(samples, seed)]
        return torch.stack([wide(log_prob).flatten(1).sum(1) for log_prob in log_probs])

    def expected_log_likelihood(self, samples: int, seed: int) -> Tensor:
        """E_q log p(x given z) in nats, shape (B,)."""
        return self.log_likelihoods(samples, seed).mean(0)

    def negative_elbo(self, samples: int, seed: int) -> Tensor:
        """KL - E_q log p(x given z) in nats, shape (B,)."""
        return self.kl(samples, seed) - self.expected_log_likelihood(samples, seed)

    def log_weights(self, samples: int, seed: int) -> Tensor:
        """log p(x given z) p(z) / q(z given x) in nats of each draw, (S, B)."""
        law, posterior = self.model.law, self.posterior
        surplus = [_log_posterior_to_prior(law, posterior, z) for z in self.draws(samples, seed)]
        return self.log_likelihoods(samples, seed) - torch.stack(surplus)

    def kl(self, samples: int, seed: int) -> Tensor:
        """KL(q(z given x) || p(z)) in nats, shape (B,); laws that cannot compute it estimate it from the draws."""
        law, posterior = self.model.law, self.posterior
        return torch.stack([wide(law.kl(posterior, z)).sum(1) for z in self.draws(samples, seed)]).mean(0)

    def heat(self, blur: float) -> Tensor:
        """The map shown to people: deviation in the likelihood's own scale, blurred; shape (B, H, W), >= 0.

        `blur` is the standard deviation as a share of the shorter side: single pixels are noise, defects are larger.
        """
        return gaussian_blur(self.deviation, blur * shorter_side(self.deviation))


class Marginal:
    """What a conditional model makes of images whose class nobody told: one `Observation` a class.

    `weights` (K, B): p(class given x) under equal prior shares, by the ELBO where the model has one, else by the
    likelihood. What pictures show (code, heat) is the mean under these weights.
    """

    def __init__(self, model: AutoEncoder, x: Tensor) -> None:
        self.model, self.x = model, x
        numbers = torch.arange(len(model.classes), device=x.device)
        self.of_classes = [Observation(model, x, number.expand(x.shape[0])) for number in numbers]

    @cached_property
    def weights(self) -> Tensor:
        evidence = []
        for seen in self.of_classes:
            log_likelihood = seen.expected_log_likelihood(2, 0)
            evidence.append(log_likelihood - seen.kl(2, 0) if self.model.spec.has_elbo else log_likelihood)
        return torch.stack(evidence).softmax(0)

    def mean(self, values: list[Tensor]) -> Tensor:
        """Mean over classes of one tensor (B, ...) for each."""
        stacked = torch.stack(values)
        weights = self.weights.to(stacked).reshape(*self.weights.shape, *[1] * (stacked.dim() - 2))
        return (weights * stacked).sum(0)

    @property
    def code(self) -> Tensor:
        """The posterior mean (B, D)."""
        return self.mean([seen.code for seen in self.of_classes])

    @property
    def reconstruction(self) -> Tensor:
        """E[x], shape (B, C, H, W)."""
        return self.mean([seen.reconstruction for seen in self.of_classes])

    def heat(self, blur: float) -> Tensor:
        """As that of an `Observation`."""
        return self.mean([seen.heat(blur) for seen in self.of_classes])


Seen = Observation | Marginal


def observe(model: AutoEncoder, x: Tensor, label: Tensor | None = None) -> Seen:
    """Look at images x (B, C, H, W); conditional models whose classes are not told try all of them."""
    return Marginal(model, x) if model.classes and label is None else Observation(model, x, label)


@cache
def antithetic(samples: int, size: int, seed: int) -> Tensor:
    """Standard normal noise (samples, size) in pairs of both signs, on the CPU; nobody may write on it."""
    # An ordinary tensor, wherever it is first asked for: some scores differentiate with it.
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed)
        half = torch.randn((samples + 1) // 2, size, generator=generator)
        return torch.stack([half, -half], 1).flatten(0, 1)[:samples]


def shorter_side(images: Tensor) -> int:
    """Pixels of the shorter side of images or maps (..., H, W)."""
    # While scores are recorded (`compiled`), a size is a float32 tensor in all that is reckoned of it, until made one.
    return min(int(size) for size in images.shape[-2:])


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """Blur maps (B, H, W) with a Gaussian of `sigma` pixels; borders mirror. Below 0.3 px the maps are left alone."""
    radius = min(math.ceil(3 * sigma), shorter_side(maps) - 1)
    if sigma < 0.3 or radius < 1:
        return maps
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(maps[:, None], (radius, radius, radius, radius), mode="reflect")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1))[:, 0]


def _at_least_single(values: Tensor) -> Tensor:
    """In float32 where mixed precision left less."""
    return values if values.dtype == torch.float64 else values.float()


def _log_posterior_to_prior(law: LatentLaw, posterior: Posterior, z: Tensor) -> Tensor:
    """log q(z given x) / p(z) in nats at one draw, (B,), also for laws whose KL is analytic."""
    if isinstance(posterior, Spherical):
        log_q = von_mises_fisher.log_prob(z, posterior.mu, posterior.kappa)
        return wide(log_q).sum(1) - von_mises_fisher.log_uniform(law.size)
    if isinstance(posterior, DiagonalGaussian) and isinstance(law, GaussianLaw):
        mu, logvar, z = wide(posterior.mu), wide(posterior.logvar), wide(z)
        return 0.5 * (z**2 - (z - mu) ** 2 * (-logvar).exp() - logvar).sum(1)
    return wide(law.kl(posterior, z)).sum(1)

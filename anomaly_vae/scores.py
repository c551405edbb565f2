"""Per-image scores and per-pixel maps of a trained model. Higher is more anomalous, without exception.

A score is a frozen spec that does the work. Sums over pixels run in float64, so that a score is the same number, to
about 1e-7 of itself, whatever batch the image came in. What a score must know about normals (`fit`) is measured on the
*fit* split and frozen.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from sklearn.covariance import LedoitWolf
from torch import Tensor
from torch.nn import functional as F

from anomaly_vae.latents import Posterior
from anomaly_vae.model import AutoEncoder
from anomaly_vae.spec import Spec

Array = npt.NDArray[np.float64]
References = Mapping[str, Tensor]


def wide(values: Tensor) -> Tensor:
    """In float64 where the device has it (Apple's GPUs have not)."""
    return values.float() if values.device.type == "mps" else values.double()


class Observation:
    """What one model makes of a batch of images; computed once, however many scores look at it.

    `x` is (B, C, H, W) in [0, 1]. The reconstruction is that of the posterior mean, so it involves no chance.
    """

    def __init__(self, model: AutoEncoder, x: Tensor) -> None:
        self.model, self.x = model, x
        self._draws: dict[tuple[int, int], list[Tensor]] = {}

    @cached_property
    def posterior(self) -> Posterior:
        """q(z given x)."""
        posterior = self.model.encode(self.x)
        return Posterior(posterior.mu.float(), posterior.logvar.float())

    @cached_property
    def output(self) -> Tensor:
        """The likelihood's raw parameters at the posterior mean."""
        return self.model.decode(self.posterior.mu).float()

    @cached_property
    def reconstruction(self) -> Tensor:
        """E[x given z = posterior mean], shape (B, C, H, W)."""
        return self.model.likelihood.mean(self.output)

    @cached_property
    def squared_error(self) -> Tensor:
        """(x - reconstruction)^2 averaged over channels, shape (B, H, W)."""
        return ((self.x - self.reconstruction) ** 2).mean(1)

    def draws(self, samples: int, seed: int) -> list[Tensor]:
        """`samples` decoder outputs at z ~ q(z given x): the same noise for every image, in pairs of both signs.

        One fixed noise for all images is what makes a sampled score independent of batch mates; antithetic pairs
        cancel the odd part of its error.
        """
        if (samples, seed) not in self._draws:
            generator = torch.Generator().manual_seed(seed)
            half = torch.randn((samples + 1) // 2, self.posterior.mu.shape[1], generator=generator)
            noise = torch.stack([half, -half], 1).flatten(0, 1)[:samples].to(self.x.device)
            self._draws[samples, seed] = [self.model.decode(self.posterior.at(row)).float() for row in noise]
        return self._draws[samples, seed]

    def expected_log_likelihood(self, samples: int, seed: int) -> Tensor:
        """E_q log p(x given z) in nats, shape (B,): log-densities summed over pixels and channels."""
        log_probs = [self.model.likelihood.log_prob(output, self.x) for output in self.draws(samples, seed)]
        return torch.stack([wide(log_prob).flatten(1).sum(1) for log_prob in log_probs]).mean(0)

    def heat(self, blur: float) -> Tensor:
        """The map shown to people: deviation in the likelihood's own scale, blurred; shape (B, H, W), >= 0.

        `blur` is the standard deviation as a share of the shorter side: single pixels are noise, defects are larger.
        """
        deviation = self.model.likelihood.deviation(self.output, self.x).mean(1)
        return gaussian_blur(deviation, blur * min(deviation.shape[1:]))


class Score(Spec):
    """Base: `kind` names the column; `log_scale` says that its logarithm is the natural scale for fusing."""

    log_scale: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, seen: Observation, references: References) -> Tensor:
        """The score of each image, shape (B,)."""

    def statistic(self, seen: Observation) -> Tensor | None:
        """What `fit` wants to see of the fit split, one row an image; None where nothing is fitted."""
        return None

    def fit(self, statistics: Array) -> dict[str, npt.NDArray[np.float32]]:
        """References from the statistics of all fit images."""
        return {}


class NegativeElbo(Score):
    """-ELBO = -E_q log p(x|z) + KL(q(z|x) || p(z)), nats (Kingma and Welling 2014, eq. 3). Cost: `samples` decodes."""

    kind: Literal["negative_elbo"] = "negative_elbo"
    samples: int = Field(2, ge=1, le=256)
    seed: int = 0
    log_scale: ClassVar[bool] = False

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return wide(seen.posterior.kl()).sum(1) - seen.expected_log_likelihood(self.samples, self.seed)


class Reconstruction(Score):
    """-E_q log p(x|z) in nats, the reconstruction part of the ELBO. Cost: `samples` decodes, shared with the ELBO."""

    kind: Literal["reconstruction"] = "reconstruction"
    samples: int = Field(2, ge=1, le=256)
    seed: int = 0
    log_scale: ClassVar[bool] = False

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return -seen.expected_log_likelihood(self.samples, self.seed)


class ReconstructionProbability(Score):
    """-E_q log p(x|z) from many draws (An and Cho 2015, algorithm 4, negated). Cost: `samples` decodes."""

    kind: Literal["reconstruction_probability"] = "reconstruction_probability"
    samples: int = Field(16, ge=1, le=1024)
    seed: int = 1
    log_scale: ClassVar[bool] = False

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return -seen.expected_log_likelihood(self.samples, self.seed)


class KullbackLeibler(Score):
    """KL(q(z|x) || N(0, I)) in nats, the other part of the ELBO. Cost: none beyond encoding.

    No detector by itself: what the encoder does not recognise may lie nearer to the prior than a normal picture does.
    """

    kind: Literal["kl"] = "kl"

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return wide(seen.posterior.kl()).sum(1)


class SquaredError(Score):
    """Mean over pixels and channels of (x - x^)^2. Cost: 1 pass."""

    kind: Literal["squared_error"] = "squared_error"

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return wide(seen.squared_error).flatten(1).mean(1)


class AbsoluteError(Score):
    """Mean over pixels and channels of |x - x^|. Cost: 1 pass."""

    kind: Literal["absolute_error"] = "absolute_error"

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return wide((seen.x - seen.reconstruction).abs()).flatten(1).mean(1)


class RelativeError(Score):
    """||x - x^||^2 / (||x - mean of x||^2 + c): an error counts less in a busy picture. Cost: 1 pass.

    The energy is taken about the picture's own mean, so that brightness does not count as content; c is one grey
    level's energy, which keeps a blank picture finite.
    """

    kind: Literal["relative_error"] = "relative_error"

    def __call__(self, seen: Observation, references: References) -> Tensor:
        energy = wide((seen.x - seen.x.mean((2, 3), keepdim=True)) ** 2).flatten(1).mean(1)
        return wide(seen.squared_error).flatten(1).mean(1) / (energy + 255.0**-2)


class LocalMaximum(Score):
    """Largest blurred squared error: a small defect is not averaged away. `window` is the blur's share of the side."""

    kind: Literal["local_maximum"] = "local_maximum"
    window: float = Field(0.03, gt=0, le=0.5)

    def __call__(self, seen: Observation, references: References) -> Tensor:
        error = gaussian_blur(seen.squared_error, self.window * min(seen.x.shape[2:]))
        return wide(error).flatten(1).amax(1)


class Mahalanobis(Score):
    """(mu - m)^T S^-1 (mu - m) of the posterior mean; m and S (Ledoit and Wolf 2004) from normals. Cost: encoding."""

    kind: Literal["mahalanobis"] = "mahalanobis"

    def __call__(self, seen: Observation, references: References) -> Tensor:
        centred = wide(seen.posterior.mu) - wide(references["mean"])
        return ((centred @ wide(references["whitening"])) ** 2).sum(1)

    def statistic(self, seen: Observation) -> Tensor:
        return seen.posterior.mu

    def fit(self, statistics: Array) -> dict[str, npt.NDArray[np.float32]]:
        estimate = LedoitWolf().fit(statistics)
        # A collapsed latent has no spread at all: the floor keeps its whitening finite.
        values, vectors = np.linalg.eigh(estimate.covariance_)
        whitening = vectors / np.sqrt(np.maximum(values, 1e-8))
        return {"mean": estimate.location_.astype(np.float32), "whitening": whitening.astype(np.float32)}


ScoreSpec = Annotated[
    NegativeElbo
    | Reconstruction
    | ReconstructionProbability
    | KullbackLeibler
    | SquaredError
    | AbsoluteError
    | RelativeError
    | LocalMaximum
    | Mahalanobis,
    Field(discriminator="kind"),
]


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """Blur maps (B, H, W) with a Gaussian of `sigma` pixels; borders mirror. Below 0.3 px the maps are left alone."""
    radius = min(math.ceil(3 * sigma), min(maps.shape[1:]) - 1)
    if sigma < 0.3 or radius < 1:
        return maps
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(maps[:, None], (radius, radius, radius, radius), mode="reflect")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1))[:, 0]

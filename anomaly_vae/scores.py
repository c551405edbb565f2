"""Per-image scores and per-pixel maps of a trained model. Higher is more anomalous, without exception.

A score is a frozen spec that does the work. What it must know about normals (`fit`) is measured on the *fit* split and
frozen.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from sklearn.covariance import LedoitWolf
from torch import Tensor

from anomaly_vae.model import ModelSpec
from anomaly_vae.observations import Observation, Seen, gaussian_blur, wide
from anomaly_vae.spec import Spec

Array = npt.NDArray[np.float64]
References = Mapping[str, Tensor]


class Score(Spec):
    """Base: `kind` names the column; `log_scale` says that its logarithm is the natural scale for fusing."""

    log_scale: ClassVar[bool] = True
    is_log_likelihood: ClassVar[bool] = False

    def refusal(self, model: ModelSpec) -> str | None:
        """Why the score means nothing for such a model; None where it does."""
        return None

    @abstractmethod
    def __call__(self, seen: Observation, references: References) -> Tensor:
        """The score of each image, shape (B,)."""

    def statistic(self, seen: Seen) -> Tensor | None:
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
    is_log_likelihood: ClassVar[bool] = True

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return seen.kl(self.samples, self.seed) - seen.expected_log_likelihood(self.samples, self.seed)

    def refusal(self, model: ModelSpec) -> str | None:
        return None if model.has_elbo else _no_elbo(model)


class Reconstruction(Score):
    """-E_q log p(x|z) in nats, the reconstruction part of the ELBO. Cost: `samples` decodes, shared with the ELBO."""

    kind: Literal["reconstruction"] = "reconstruction"
    samples: int = Field(2, ge=1, le=256)
    seed: int = 0
    log_scale: ClassVar[bool] = False
    is_log_likelihood: ClassVar[bool] = True

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return -seen.expected_log_likelihood(self.samples, self.seed)


class ReconstructionProbability(Score):
    """-E_q log p(x|z) from many draws (An and Cho 2015, algorithm 4, negated). Cost: `samples` decodes."""

    kind: Literal["reconstruction_probability"] = "reconstruction_probability"
    samples: int = Field(16, ge=1, le=1024)
    seed: int = 1
    log_scale: ClassVar[bool] = False
    is_log_likelihood: ClassVar[bool] = True

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return -seen.expected_log_likelihood(self.samples, self.seed)


class KullbackLeibler(Score):
    """KL(q(z|x) || p(z)) in nats, the other part of the ELBO. Cost: none beyond encoding.

    A mixture prior has no closed form: there it is the mean over `samples` draws.

    No detector by itself: what the encoder does not recognise may lie nearer to the prior than a normal picture does.
    """

    kind: Literal["kl"] = "kl"
    samples: int = Field(2, ge=1, le=256)
    seed: int = 0
    # An estimate from draws may come out below 0.
    log_scale: ClassVar[bool] = False

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return seen.kl(self.samples, self.seed)

    def refusal(self, model: ModelSpec) -> str | None:
        return None if model.latent.has_kl else f"a {model.latent.kind} latent law has no KL"


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


class GeneratorResidual(Score):
    """Mean squared error + `weight` times that of the critic's features (f-AnoGAN, Schlegl et al. 2019, eq. 6).

    Cost: 1 pass and two of the critic.
    """

    kind: Literal["generator_residual"] = "generator_residual"
    weight: float = Field(1.0, ge=0)

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return wide(seen.squared_error).flatten(1).mean(1) + self.weight * seen.feature_error

    def refusal(self, model: ModelSpec) -> str | None:
        return None if model.critic else "it compares a critic's features; set model.critic"


class Mahalanobis(Score):
    """(mu - m)^T S^-1 (mu - m) of the posterior mean; m and S (Ledoit and Wolf 2004) from normals. Cost: encoding."""

    kind: Literal["mahalanobis"] = "mahalanobis"

    def __call__(self, seen: Observation, references: References) -> Tensor:
        centred = wide(seen.code) - wide(references["mean"])
        return ((centred @ wide(references["whitening"])) ** 2).sum(1)

    def statistic(self, seen: Seen) -> Tensor:
        return seen.code

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
    | GeneratorResidual
    | Mahalanobis,
    Field(discriminator="kind"),
]


def _no_elbo(model: ModelSpec) -> str:
    if not model.latent.has_kl:
        return f"it is no bound, since a {model.latent.kind} latent law has no KL"
    return "it is no bound, since with skips the decoder sees the picture other than through z"


def measure(score: Score, seen: Seen, references: References) -> Tensor:
    """The score of each image, shape (B,), the class marginalised where it is not known.

    Log-likelihoods mix as such, -log mean exp(-score), which keeps the ELBO a bound; others by their mean under
    p(class given x).
    """
    if isinstance(seen, Observation):
        return score(seen, references)
    of_classes = [score(one, references) for one in seen.of_classes]
    if score.is_log_likelihood:
        return math.log(len(of_classes)) - (-torch.stack(of_classes)).logsumexp(0)
    return seen.mean(of_classes)

"""Scores in nats: the ELBO, its parts, tighter bounds on log p(x), and how far it lies from what is usual.

Draws are of one fixed noise for all pictures, held by `samples` and `seed`; equal ones share their decodes.
"""

import math
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from anomaly_vae.model import ModelSpec
from anomaly_vae.observations import Observation, Seen, wide
from anomaly_vae.score_base import Array, Fitted, References, Score, no_bound, of_classes


class NegativeElbo(Score):
    """-ELBO = -E_q log p(x|z) + KL(q(z|x) || p(z)), nats (Kingma and Welling 2014, eq. 3). Cost: `samples` decodes.

    The map, here and of the other likelihoods of pixels, is the deviation at the posterior mean in the likelihood's
    own scale: a log-density has no least value to count from.
    """

    kind: Literal["negative_elbo"] = "negative_elbo"
    samples: int = Field(2, ge=1, le=256)
    seed: int = 0
    log_scale: ClassVar[bool] = False
    is_log_likelihood: ClassVar[bool] = True

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return seen.negative_elbo(self.samples, self.seed)

    def map(self, seen: Observation, references: References) -> Tensor:
        return seen.deviation

    def refusal(self, model: ModelSpec) -> str | None:
        return no_bound(model)


class Reconstruction(Score):
    """-E_q log p(x|z) in nats, the reconstruction part of the ELBO. Cost: `samples` decodes, shared with the ELBO."""

    kind: Literal["reconstruction"] = "reconstruction"
    samples: int = Field(2, ge=1, le=256)
    seed: int = 0
    log_scale: ClassVar[bool] = False
    is_log_likelihood: ClassVar[bool] = True

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return -seen.expected_log_likelihood(self.samples, self.seed)

    def map(self, seen: Observation, references: References) -> Tensor:
        return seen.deviation


class ReconstructionProbability(Score):
    """-E_q log p(x|z) from many draws (An and Cho 2015, algorithm 4, negated). Cost: `samples` decodes."""

    kind: Literal["reconstruction_probability"] = "reconstruction_probability"
    samples: int = Field(16, ge=1, le=1024)
    seed: int = 1
    log_scale: ClassVar[bool] = False
    is_log_likelihood: ClassVar[bool] = True

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return -seen.expected_log_likelihood(self.samples, self.seed)

    def map(self, seen: Observation, references: References) -> Tensor:
        return seen.deviation


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
        if model.latent.has_kl:
            return None
        return f"a {model.latent.kind} latent law has no KL; set model.latent.kind=gaussian"


class ImportanceWeighted(Score):
    """-log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), K = `samples`, in nats (IWAE, Burda et al. 2016, negated).

    A tighter bound than the ELBO, from above. Cost: K decodes, shared with the reconstruction probability.
    """

    kind: Literal["importance_weighted"] = "importance_weighted"
    samples: int = Field(16, ge=1, le=1024)
    seed: int = 1
    log_scale: ClassVar[bool] = False
    is_log_likelihood: ClassVar[bool] = True

    def __call__(self, seen: Observation, references: References) -> Tensor:
        weights = seen.log_weights(self.samples, self.seed)
        return math.log(len(weights)) - weights.logsumexp(0)

    def map(self, seen: Observation, references: References) -> Tensor:
        return seen.deviation

    def refusal(self, model: ModelSpec) -> str | None:
        return no_bound(model)


class Typicality(Score):
    """|-ELBO - its mean on normals|, nats (typical sets, Nalisnick et al. 2019, with one picture). Cost: as the ELBO.

    A picture that is likelier than normals ever are counts as well, such as a blank one.
    """

    kind: Literal["typicality"] = "typicality"
    samples: int = Field(2, ge=1, le=256)
    seed: int = 0
    # A picture at the very mean has no logarithm.
    log_scale: ClassVar[bool] = False

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return (seen.negative_elbo(self.samples, self.seed) - wide(references["mean"])).abs()

    def statistic(self, seen: Seen) -> Tensor:
        return of_classes(seen, lambda one: one.negative_elbo(self.samples, self.seed))

    def fit(self, statistics: Array) -> Fitted:
        return {"mean": np.array([statistics.mean()], np.float32)}

    def refusal(self, model: ModelSpec) -> str | None:
        return no_bound(model)

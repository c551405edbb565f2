"""Scores of the code: how rare the posterior mean mu, or what belongs to it, is among those of normals.

Codes that are whitened column by column are computed in float64: where they hardly vary, it magnifies rounding.
"""

import warnings
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from anomaly_vae.likelihoods import Gaussian, Laplace
from anomaly_vae.observations import Observation, Seen, wide
from anomaly_vae.posteriors import DiagonalGaussian, Spherical
from anomaly_vae.score_base import Array, Fitted, References, Score, of_classes
from anomaly_vae.whitened_score import WhitenedScore
from anomaly_vae.whitening import fit_whitening, whitened


class Mahalanobis(Score):
    """(mu - m)^T S^-1 (mu - m) of the posterior mean; m and S (Ledoit and Wolf 2004) from normals. Cost: encoding."""

    kind: Literal["mahalanobis"] = "mahalanobis"

    def __call__(self, seen: Observation, references: References) -> Tensor:
        centred = wide(seen.code) - wide(references["mean"])
        return ((centred @ wide(references["whitening"])) ** 2).sum(1)

    def statistic(self, seen: Seen) -> Tensor:
        return seen.code

    def fit(self, statistics: Array) -> Fitted:
        from sklearn.covariance import LedoitWolf  # heavy, and only training needs it

        estimate = LedoitWolf().fit(statistics)
        # A collapsed latent has no spread at all: the floor keeps its whitening finite.
        values, vectors = np.linalg.eigh(estimate.covariance_)
        whitening = vectors / np.sqrt(np.maximum(values, 1e-8))
        return {"mean": estimate.location_.astype(np.float32), "whitening": whitening.astype(np.float32)}


class GaussianMixture(Score):
    """-log sum_c w_c N(mu; m_c, diag s_c) of the whitened posterior mean, nats (latent density). Cost: encoding in
    float64.

    At most `components`, and no more than leave each ten normals and one a latent: one, where normals are few.
    """

    kind: Literal["gaussian_mixture"] = "gaussian_mixture"
    components: int = Field(5, ge=1, le=100)
    seed: int = Field(0, ge=0)
    log_scale: ClassVar[bool] = False

    def __call__(self, seen: Observation, references: References) -> Tensor:
        code = whitened(seen.exact.code, references)[:, None]
        centres, variances = wide(references["centres"]), wide(references["variances"])
        logs = -0.5 * ((code - centres) ** 2 / variances + (2 * torch.pi * variances).log()).sum(2)
        return -(logs + wide(references["weights"]).log()).logsumexp(1)

    def statistic(self, seen: Seen) -> Tensor:
        return of_classes(seen, lambda one: one.exact.code)

    def fit(self, statistics: Array) -> Fitted:
        from sklearn.mixture import GaussianMixture as Mixture

        found = fit_whitening(statistics)
        codes = whitened(torch.from_numpy(statistics), {k: torch.from_numpy(v) for k, v in found.items()}).numpy()
        # The estimator wants two rows.
        codes = np.concatenate([codes, codes]) if len(codes) < 2 else codes
        count = max(1, min(self.components, len(codes) // max(10, codes.shape[1])))
        # A tenth of the normals' own variance keeps a component from closing in on a few of them.
        mixture = Mixture(count, covariance_type="diag", reg_covar=0.1, random_state=self.seed)
        with warnings.catch_warnings():
            # Codes that are all alike give fewer clusters than were asked for, and say so.
            warnings.simplefilter("ignore")
            mixture.fit(codes)
        fitted = {"centres": mixture.means_, "variances": mixture.covariances_, "weights": mixture.weights_}
        return found | {name: np.ascontiguousarray(value, np.float32) for name, value in fitted.items()}


class NearestNeighbours(Score):
    """Mean distance of the whitened posterior mean to those of the `neighbours` nearest normals (Angiulli and Pizzuti
    2002). Cost: encoding in float64, and a distance to each kept normal.

    At most `kept` normals are kept, evenly spaced among all; with fewer than `neighbours`, all of them count.
    """

    kind: Literal["nearest_neighbours"] = "nearest_neighbours"
    neighbours: int = Field(5, ge=1, le=1000)
    kept: int = Field(4096, ge=1, le=1_000_000)

    def __call__(self, seen: Observation, references: References) -> Tensor:
        normals = whitened(references["codes"], references)
        # Not by a matrix product, whose rounding depends on the batch.
        distances = torch.cdist(
            whitened(seen.exact.code, references), normals, compute_mode="donot_use_mm_for_euclid_dist"
        )
        return distances.topk(min(self.neighbours, len(normals)), dim=1, largest=False).values.mean(1)

    def statistic(self, seen: Seen) -> Tensor:
        return of_classes(seen, lambda one: one.exact.code)

    def fit(self, statistics: Array) -> Fitted:
        every = -(-len(statistics) // self.kept)
        return fit_whitening(statistics) | {"codes": np.ascontiguousarray(statistics[::every], np.float32)}


class LatentPath(WhitenedScore):
    """Mahalanobis distance of (log ||x - x^||, log ||mu||, log ||sigma||, log ||sigma_x||) from normals (likelihood
    path, Huang et al. 2024). Cost: 1 pass, in float64.

    Of these the ones that the model has: sigma where q(z|x) has a scale, sigma_x where the decoder tells one.
    """

    kind: Literal["latent_path"] = "latent_path"

    def numbers(self, seen: Observation) -> Tensor:
        """Logarithms of the norms along the way from x to its reconstruction, (B, 2 to 4)."""
        seen = seen.exact
        posterior, likelihood = seen.posterior, seen.model.likelihood
        parts = [seen.x - seen.reconstruction, posterior.mu]
        if isinstance(posterior, DiagonalGaussian):
            parts.append((0.5 * posterior.logvar).exp())
        if isinstance(posterior, Spherical):
            parts.append(posterior.kappa.rsqrt())
        if isinstance(likelihood, Gaussian | Laplace) and likelihood.scale == "learned":
            parts.append(likelihood.log_scale_of(seen.output).exp())
        # An exact reconstruction or an empty code has no logarithm.
        return torch.stack([(wide(part).flatten(1).square().sum(1).sqrt() + 1e-6).log() for part in parts], 1)

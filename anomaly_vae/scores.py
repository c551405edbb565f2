"""Per-image scores and per-pixel maps of a trained model: the closed union. Higher is more anomalous, always."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from anomaly_vae.debiased_scores import BcLikelihood, InputComplexity, LikelihoodRatio
from anomaly_vae.difference_scores import EncoderDifference, NormalisedActivationPath, SimpleActivationPath
from anomaly_vae.error_scores import (
    AbsoluteError,
    GeneratorResidual,
    LocalMaximum,
    RelativeError,
    SquaredError,
    TopK,
)
from anomaly_vae.gradient_scores import EnergyProjection, Gradient, LikelihoodRegret
from anomaly_vae.inpainting_scores import Inpainting
from anomaly_vae.latent_scores import GaussianMixture, LatentPath, Mahalanobis, NearestNeighbours
from anomaly_vae.learned_scores import SyntheticDefect, UnfamiliarFeatures, UnfamiliarView
from anomaly_vae.likelihood_scores import (
    ImportanceWeighted,
    KullbackLeibler,
    NegativeElbo,
    Reconstruction,
    ReconstructionProbability,
    Typicality,
)
from anomaly_vae.observations import Observation, Seen
from anomaly_vae.score_base import References, Score
from anomaly_vae.shape_scores import UnfamiliarShape
from anomaly_vae.structure_scores import Msgms, Ssim
from anomaly_vae.surprise_scores import LocalSurprise
from anomaly_vae.texture_scores import UnfamiliarTexture

__all__ = [
    "AbsoluteError",
    "BcLikelihood",
    "EncoderDifference",
    "EnergyProjection",
    "GaussianMixture",
    "GeneratorResidual",
    "Gradient",
    "ImportanceWeighted",
    "Inpainting",
    "InputComplexity",
    "KullbackLeibler",
    "LatentPath",
    "LikelihoodRatio",
    "LikelihoodRegret",
    "LocalMaximum",
    "LocalSurprise",
    "Mahalanobis",
    "Msgms",
    "NearestNeighbours",
    "NegativeElbo",
    "NormalisedActivationPath",
    "Reconstruction",
    "ReconstructionProbability",
    "References",
    "RelativeError",
    "Score",
    "ScoreSpec",
    "SimpleActivationPath",
    "SquaredError",
    "Ssim",
    "SyntheticDefect",
    "TopK",
    "Typicality",
    "UnfamiliarFeatures",
    "UnfamiliarShape",
    "UnfamiliarTexture",
    "UnfamiliarView",
    "measure",
    "measure_map",
]

ScoreSpec = Annotated[
    NegativeElbo
    | Reconstruction
    | ReconstructionProbability
    | KullbackLeibler
    | ImportanceWeighted
    | LikelihoodRegret
    | InputComplexity
    | LikelihoodRatio
    | Typicality
    | BcLikelihood
    | SquaredError
    | AbsoluteError
    | RelativeError
    | LocalMaximum
    | TopK
    | Ssim
    | Msgms
    | GeneratorResidual
    | SimpleActivationPath
    | NormalisedActivationPath
    | EncoderDifference
    | Mahalanobis
    | GaussianMixture
    | NearestNeighbours
    | LatentPath
    | Gradient
    | EnergyProjection
    | Inpainting
    | LocalSurprise
    | SyntheticDefect
    | UnfamiliarFeatures
    | UnfamiliarShape
    | UnfamiliarTexture
    | UnfamiliarView,
    Field(discriminator="kind"),
]


def measure(score: Score, seen: Seen, references: References) -> Tensor:
    """The score of each image, shape (B,), the class marginalised where it is not known.

    Log-likelihoods mix as such, -log mean exp(-score), which keeps the ELBO a bound; others by their mean under
    p(class given x).
    """
    if isinstance(seen, Observation):
        return score(seen, references)
    if score.untaught:
        return score(seen.of_classes[0], references)
    of_classes = [score(one, references) for one in seen.of_classes]
    if score.is_log_likelihood:
        return math.log(len(of_classes)) - (-torch.stack(of_classes)).logsumexp(0)
    return seen.mean(of_classes)


def measure_map(score: Score, seen: Seen, references: References) -> Tensor | None:
    """The score's map, shape (B, H, W), the mean under p(class given x) where the class is not known; None if none."""
    if isinstance(seen, Observation):
        return score.map(seen, references)
    if score.untaught:
        return score.map(seen.of_classes[0], references)
    maps = [found for one in seen.of_classes if (found := score.map(one, references)) is not None]
    return seen.mean(maps) if maps else None

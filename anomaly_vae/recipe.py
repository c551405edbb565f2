"""`DetectorSpec`: all that makes a detector, from the folder's layout to the verdict; stored whole in a bundle."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from anomaly_vae.calibration import Mode
from anomaly_vae.data import DataSpec
from anomaly_vae.fusion import FusionSpec
from anomaly_vae.images import ImageSpec
from anomaly_vae.model import ModelSpec
from anomaly_vae.objectives import ObjectiveSpec
from anomaly_vae.scores import (
    KullbackLeibler,
    LocalMaximum,
    Mahalanobis,
    NegativeElbo,
    Reconstruction,
    RelativeError,
    ScoreSpec,
    SquaredError,
)
from anomaly_vae.spec import Spec

FUSED = "fused"


class RaritySpec(Spec):
    """Train more often on pictures whose codes are rare among the training pictures (Amini et al. 2019, eq. 2).

    The density of a code is the product over latents of histograms with `bins` bins; `smoothing` is added to each, and
    the larger it is, the nearer the draw comes to a uniform one.
    """

    bins: int = Field(10, ge=2, le=1000)
    smoothing: float = Field(0.01, gt=0)


class TrainingSpec(Spec):
    """How the weights are found.

    `steps` is the budget of optimiser steps, shared by the models of a K-fold detector; it decides the number of epochs
    unless `epochs` is given. `select`:
    `best` keeps the epoch with the lowest loss on the *fit* split and stops when there was none better for the share
    `patience` of the budget (null: never); `last` keeps the last. `precision` `auto` is bfloat16
    mixed precision on GPUs that have it and float32 elsewhere. `betas` are AdamW's; games with critics want
    [0.5, 0.999].
    """

    steps: int = Field(1500, ge=1)
    epochs: int | None = Field(None, ge=1)
    batch_size: int = Field(64, ge=2)
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    clip_norm: float | None = Field(10.0, gt=0)
    rarity: RaritySpec | None = None
    select: Literal["best", "last"] = "best"
    patience: float | None = Field(0.25, gt=0, le=1)
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    checkpoint_seconds: float = Field(15.0, ge=0)


class CalibrationSpec(Spec):
    """How verdicts are calibrated; see `calibration`.

    Fewer than `few_normals` usable normals are not split but calibrated by `folds`-fold cross-conformal prediction.
    """

    alpha: float | None = Field(None, gt=0, lt=1)
    mode: Mode = "average"
    few_normals: int = Field(200, ge=0)
    folds: int = Field(5, ge=2, le=20)


class SplitSpec(Spec):
    """Shares of the normals (after the test part is set aside) that are not trained on."""

    fit: float = Field(0.15, gt=0, lt=0.5)
    calibrate: float = Field(0.25, gt=0, lt=0.8)

    @model_validator(mode="after")
    def _some_left_to_train(self) -> Self:
        if self.fit + self.calibrate > 0.8:
            raise ValueError("fit + calibrate must leave at least 20% of the normals for training")
        return self


def _default_scores(validated: dict[str, Any]) -> tuple[ScoreSpec, ...]:
    """Those of the usual ones that mean something for the model."""
    usual: tuple[ScoreSpec, ...] = (
        NegativeElbo(),
        Reconstruction(),
        KullbackLeibler(),
        SquaredError(),
        RelativeError(),
        LocalMaximum(),
        Mahalanobis(),
    )
    model = validated.get("model", ModelSpec())
    return tuple(score for score in usual if score.refusal(model) is None)


class DetectorSpec(Spec):
    """A detector before it is trained. `image: null` chooses size and channels from the pictures.

    `model` is what scores, `objective` what its training minimises. `scores`: null for the usual ones that suit the
    model. `verdict` names the score that is calibrated: one of `scores`, or `fused`. `probes`: how many training
    pictures the bundle keeps to check itself on another machine (0: none).
    """

    preset: str = "custom"
    image: ImageSpec | None = None
    model: ModelSpec = Field(default_factory=ModelSpec)
    objective: ObjectiveSpec = Field(default_factory=ObjectiveSpec)
    scores: tuple[ScoreSpec, ...] = Field(default_factory=_default_scores, min_length=1)
    fusion: FusionSpec = Field(default_factory=FusionSpec)
    verdict: str = FUSED
    heat_blur: float = Field(0.015, ge=0, le=0.5)
    calibration: CalibrationSpec = Field(default_factory=CalibrationSpec)
    split: SplitSpec = Field(default_factory=SplitSpec)
    data: DataSpec = Field(default_factory=DataSpec)
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    probes: int = Field(32, ge=0, le=1024)
    seed: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _usual_scores(cls, data: Any) -> Any:
        """`scores: null` in YAML is the same as not saying it."""
        if isinstance(data, Mapping) and data.get("scores", ()) is None:
            return {key: value for key, value in data.items() if key != "scores"}
        return data

    def derived(self) -> set[str]:
        """Scores that nobody chose follow the model."""
        return set() if "scores" in self.model_fields_set else {"scores"}

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        kinds = [score.kind for score in self.scores]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"scores lists a kind twice: {', '.join(kinds)}")
        if self.verdict != FUSED and self.verdict not in kinds:
            raise ValueError(f"verdict {self.verdict!r} is not among the scores: {', '.join((FUSED, *kinds))}")
        missing = [part for part in self.fusion.parts if part not in kinds]
        if self.verdict == FUSED and missing:
            raise ValueError(f"fusion.parts names {', '.join(missing)}, which scores does not compute; add it there")
        return self

    @model_validator(mode="after")
    def _scores_suit_model(self) -> Self:
        for score in self.scores:
            reason = score.refusal(self.model)
            if reason is not None:
                raise ValueError(f"scores: {score.kind} cannot be had of this model: {reason}; remove it from scores")
        return self

    @model_validator(mode="after")
    def _objective_suits_model(self) -> Self:
        problem = self.objective.problem(self.model)
        if problem is not None:
            raise ValueError(problem)
        if self.training.select == "best" and not self.objective.comparable(self.model):
            raise ValueError(
                "the losses of epochs cannot be compared where a critic or a course changes what they mean; "
                "set training.select to last"
            )
        return self

    @model_validator(mode="after")
    def _network_fits_image(self) -> Self:
        if self.image is not None:
            shape = (self.image.channels, self.image.height, self.image.width)
            self.model.network.plan(shape)
            if self.model.critic is not None:
                self.model.critic.network.plan(shape)
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the scores, in order."""
        return tuple(score.kind for score in self.scores)

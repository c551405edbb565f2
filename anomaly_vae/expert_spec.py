"""`ExpertSpec`: one kind of model in a detector: what it is, how it learns, and which scores it gives."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from anomaly_vae.fusion import FusionSpec
from anomaly_vae.model import ModelSpec
from anomaly_vae.networks import Shape
from anomaly_vae.objectives import ObjectiveSpec
from anomaly_vae.score_base import Score, refusal
from anomaly_vae.scores import (
    KullbackLeibler,
    LocalMaximum,
    Mahalanobis,
    NegativeElbo,
    Reconstruction,
    RelativeError,
    ScoreSpec,
    SquaredError,
    SyntheticDefect,
    UnfamiliarView,
)
from anomaly_vae.spec import Spec

_FUSED = (
    "relative_error",
    "local_maximum",
    "mahalanobis",
    "synthetic_defect",
    "unfamiliar_view",
    "unfamiliar_shape",
    "unfamiliar_texture",
)
"""What is fused, of the scores there are, where nobody says."""
_MAPPED = ("local_surprise", "synthetic_defect")
"""Whose maps make the heat map, likewise."""


class RaritySpec(Spec):
    """Train more often on pictures whose codes are rare among the training pictures (Amini et al. 2019, eq. 2).

    The density of a code is the product over latents of histograms with `bins` bins; `smoothing` is added to each, and
    the larger it is, the nearer the draw comes to a uniform one.
    """

    bins: int = Field(10, ge=2, le=1000)
    smoothing: float = Field(0.01, gt=0)


class TrimSpec(Spec):
    """Leave out of training what looks least normal (iterative trimmed loss minimisation, Shen and Sanghavi 2019).

    For folders that are not as normal as they are said to be: once the share `after` of training is done, each epoch
    leaves out the `share` of the pictures with the largest error relative to their energy, as things then stand.
    """

    share: float = Field(0.1, gt=0, le=0.5)
    after: float = Field(0.2, ge=0, lt=1)


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
    trim: TrimSpec | None = None
    select: Literal["best", "last"] = "best"
    patience: float | None = Field(0.25, gt=0, le=1)
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    checkpoint_seconds: float = Field(15.0, ge=0)


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
        SyntheticDefect(),
        UnfamiliarView(),
    )
    model = validated.get("model", ModelSpec())
    return tuple(score for score in usual if refusal(score, model) is None)


class ExpertSpec(Spec):
    """`model` is what scores, `objective` what its training minimises, `scores` what it tells of a picture.

    `scores`: null for the usual ones that suit the model. `fusion` makes one number of them. `heat`: scores whose maps
    make the heat map; null: those that are made for it, else the deviation in the likelihood's own scale. `ensemble`:
    so many models with different seeds, whose scores are averaged.
    """

    model: ModelSpec = Field(default_factory=ModelSpec)
    objective: ObjectiveSpec = Field(default_factory=ObjectiveSpec)
    scores: tuple[ScoreSpec, ...] = Field(default_factory=_default_scores, min_length=1)
    fusion: FusionSpec = Field(default_factory=FusionSpec)
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    heat: tuple[str, ...] | None = None
    ensemble: int = Field(1, ge=1, le=16)

    @model_validator(mode="before")
    @classmethod
    def _usual_scores(cls, data: Any) -> Any:
        """`scores: null` in YAML is the same as not saying it."""
        if isinstance(data, Mapping) and data.get("scores", ()) is None:
            return {key: value for key, value in data.items() if key != "scores"}
        return data

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the scores, in order."""
        return tuple(score.column for score in self.scores)

    @property
    def fused(self) -> tuple[str, ...]:
        """Names of the scores that are fused."""
        return self.fusion.parts or tuple(name for name in self.columns if name in _FUSED) or self.columns[:1]

    @property
    def mapped(self) -> tuple[ScoreSpec, ...]:
        """The scores whose maps make the heat map; none: the likelihood's deviation does."""
        chosen = _MAPPED if self.heat is None else self.heat
        return tuple(score for score in self.scores if score.column in chosen)

    def derived(self) -> Any:
        """Scores that nobody chose follow the model."""
        return set() if "scores" in self.model_fields_set else {"scores"}

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"scores lists a kind twice: {', '.join(self.columns)}; give one of them a name")
        missing = [part for part in self.fusion.parts or () if part not in self.columns]
        if missing:
            raise ValueError(f"fusion.parts names {', '.join(missing)}, which scores does not compute; add it there")
        mapped = {score.column for score in self.scores if type(score).map is not Score.map}
        blank = [name for name in self.heat or () if name not in mapped]
        if blank:
            raise ValueError(f"heat names {', '.join(blank)}, which scores gives no map of; leave it out")
        return self

    @model_validator(mode="after")
    def _scores_suit_model(self) -> Self:
        for score in self.scores:
            reason = refusal(score, self.model)
            if reason is not None:
                raise ValueError(f"scores: {score.column} cannot be had of this model: {reason}; remove it from scores")
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

    def check_shape(self, shape: Shape) -> None:
        """Raises ValueError where the networks do not suit images of `shape` (C, H, W)."""
        shape = self.model.seen(shape)
        if self.model.backbone is not None:
            # How many channels its maps have changes nothing here.
            shape = (shape[0], *self.model.backbone.grid(shape))
        self.model.network.plan(shape)
        if self.model.critic is not None:
            self.model.critic.network.plan(shape)

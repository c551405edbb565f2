"""Scores of networks that learned beside the model from what was done to normal pictures on purpose."""

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from anomaly_vae.model import ModelSpec
from anomaly_vae.observations import Observation, gaussian_blur, shorter_side, wide
from anomaly_vae.score_base import References, Score, mean_of_largest
from anomaly_vae.whitened_score import WhitenedScore


class SyntheticDefect(Score):
    """Mean of the largest marks of `model.marker` (DRAEM, Zavrtanik et al. 2021): trained on synthetic defects.

    A pixel's mark is -log(1 - p), p its probability of being damaged, blurred over `window` of the shorter side;
    averaged are the `share` of the pixels with the largest. Cost: 1 pass and one of the marker.
    """

    kind: Literal["synthetic_defect"] = "synthetic_defect"
    window: float = Field(0.01, ge=0, le=0.5)
    share: float = Field(0.002, gt=0, le=1)

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return mean_of_largest(wide(self.map(seen, references)).flatten(1), self.share)

    def map(self, seen: Observation, references: References) -> Tensor:
        return seen.once(("marks", self.window), lambda: self._marks(seen))

    def _marks(self, seen: Observation) -> Tensor:
        marks = F.softplus(seen.model.mark(seen.x, seen.output))
        return gaussian_blur(marks, self.window * shorter_side(marks))

    def refusal(self, model: ModelSpec) -> str | None:
        return None if model.marker else "it asks a marker trained on synthetic defects; set model.marker={}"


class UnfamiliarFeatures(WhitenedScore):
    """Squared Mahalanobis distance, from normals, of what `model.views` sees in all eight views of a picture (features
    that a pretext task taught, Sehwag et al. 2021; covariance after Ledoit and Wolf 2004).

    It also sees what is odd without looking like another view. Cost: 8 passes of a small network, in float64.
    """

    kind: Literal["unfamiliar_features"] = "unfamiliar_features"

    def numbers(self, seen: Observation) -> Tensor:
        exact = seen.exact
        assert exact.model.views is not None
        found: Tensor = exact.model.views.features(exact.x)
        return found

    def refusal(self, model: ModelSpec) -> str | None:
        return _no_views(model)


class UnfamiliarView(Score):
    """-log p(view k given view k of x) in nats, mean over eight turned and mirrored views (Golan and El-Yaniv 2018).

    High where `model.views` cannot tell which way up the picture is. Cost: 8 passes of a small network.
    """

    kind: Literal["unfamiliar_view"] = "unfamiliar_view"

    def __call__(self, seen: Observation, references: References) -> Tensor:
        assert seen.model.views is not None
        return wide(seen.model.views.strangeness(seen.x))

    def refusal(self, model: ModelSpec) -> str | None:
        return _no_views(model)


def _no_views(model: ModelSpec) -> str | None:
    return None if model.views else "it asks a network that tells views apart; set model.views={}"

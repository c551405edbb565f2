"""`Score`: what all scores have in common. Higher is more anomalous, without exception.

A score is a frozen spec that does the work. What it must know about normals (`fit`) is measured on the *fit* split and
frozen.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import Tensor

from anomaly_vae.model import ModelSpec
from anomaly_vae.observations import Observation, Seen
from anomaly_vae.spec import Spec

Array = npt.NDArray[np.float64]
Fitted = dict[str, npt.NDArray[np.float32]]
References = Mapping[str, Tensor]


class Score(Spec):
    """Base: `kind` names the column, or `name` where a kind stands twice; `log_scale` says that its logarithm is the
    natural scale for fusing.

    `untaught`: it asks the pictures alone, not the model, so it may fit the training pictures too, which are more.
    `is_log_likelihood`: minus the score is a log-likelihood in nats, up to what does not depend on the class.
    `offline`: it costs far too much for a service that answers while somebody waits. `of_pictures`: it takes what the
    model sees for a picture in [0, 1].
    """

    log_scale: ClassVar[bool] = True
    untaught: ClassVar[bool] = False
    is_log_likelihood: ClassVar[bool] = False
    offline: ClassVar[bool] = False
    of_pictures: ClassVar[bool] = False

    name: str | None = Field(None, pattern=r"^[a-z][a-z0-9_]*$")

    @property
    def column(self) -> str:
        """What the score is called wherever it is shown."""
        kind: str = getattr(self, "kind")  # noqa: B009 - every member has it
        return self.name or kind

    def refusal(self, model: ModelSpec) -> str | None:
        """Why the score means nothing for such a model; None where it does."""
        return None

    @abstractmethod
    def __call__(self, seen: Observation, references: References) -> Tensor:
        """The score of each image, shape (B,)."""

    def map(self, seen: Observation, references: References) -> Tensor | None:
        """The same for each pixel, shape (B, H, W), >= 0, higher = more anomalous; None where it has no place."""
        return None

    @property
    def shown(self) -> int | None:
        """About how many images `fit` is shown at most; None: all."""
        return None

    def statistic(self, seen: Seen) -> Tensor | None:
        """What `fit` wants to see of the fit split, one row an image; None where nothing is fitted."""
        return None

    def fit(self, statistics: Array) -> Fitted:
        """References from the statistics of all fit images, (n, ...), however few."""
        return {}


def mean_of_largest(values: Tensor, share: float) -> Tensor:
    """Mean of the largest of each row (B, N), those of the share `share` of N (at least one); shape (B,)."""
    # While a model's scores are recorded (`compiled`), a size is no number until it is made one.
    count = max(1, round(share * int(values.shape[1])))
    return values.topk(count, dim=1).values.mean(1)


def refusal(score: Score, model: ModelSpec) -> str | None:
    """Why a score means nothing for a model; None where it does."""
    if score.of_pictures and model.backbone is not None:
        return "it looks at pictures, and with model.backbone the model sees features"
    return score.refusal(model)


def of_classes(seen: Seen, take: Callable[[Observation], Tensor]) -> Tensor:
    """A statistic (B, ...), averaged over the classes as the scores are where the class is not known."""
    return take(seen) if isinstance(seen, Observation) else seen.mean([take(one) for one in seen.of_classes])


def no_bound(model: ModelSpec) -> str | None:
    """Why the model has no ELBO; None where it has one."""
    if model.has_elbo:
        return None
    if not model.latent.has_kl:
        return f"it is no bound, since a {model.latent.kind} latent law has no KL; set model.latent.kind=gaussian"
    return (
        "it is no bound, since with skips the decoder sees the picture other than through z; "
        "set model.network.skips=false"
    )

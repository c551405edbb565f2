"""What a request to score wants beside the verdict."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from anomaly_vae import CalibrationError, Detector
from service.asked import ScoreWanted
from service.decisions import PolicyChoice
from service.errors import Problem
from service.models import Served
from service.policies import InForce

Heat = Literal["none", "regions", "png"]
"""What is wanted of heat maps: nothing, boxes around what they show, or those and the drawn map."""


@dataclass(frozen=True)
class Options:
    """`policy`: judge this reply by it instead of the one in force, which the store and the metrics go on with."""

    heat: Heat = "none"
    policy: InForce | None = None
    parts: bool = True

    @classmethod
    def of(cls, asked: ScoreWanted, served: Served) -> "Options":
        """What was asked, for a model; raises `Problem` for a rate that its normals cannot support."""
        policy = None if asked.alpha is None else _policy(asked.alpha, served)
        return cls(asked.heatmap, policy, asked.parts)

    def applied(self, row: dict[str, Any], detector: Detector) -> dict[str, Any]:
        """A verdict's row as this request wants it."""
        row = row if self.policy is None else self.policy.applied(row, detector)
        return row if self.parts else {name: value for name, value in row.items() if name != "parts"}


def _policy(alpha: float, served: Served) -> InForce:
    try:
        return InForce.of(served.detector, PolicyChoice(alpha), served.policy.revision)
    except CalibrationError as error:
        raise Problem(HTTPStatus.BAD_REQUEST, "alpha_not_supported", str(error)) from None

"""What a request to score wants beside the verdict."""

from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

from anomaly_vae import CalibrationError, Detector
from service.asked import ScoreWanted
from service.decisions import PolicyChoice
from service.errors import Problem
from service.policies import InForce
from service.served import Served
from service.tickets import Also

if TYPE_CHECKING:
    from torch import Tensor

Heat = Literal["none", "regions", "png", "overlay"]
"""What is wanted of heat maps: nothing, boxes around what they show, or those and a drawn one."""


@dataclass(frozen=True)
class Options:
    """`policy`: judge this reply by it instead of the one in force, which the store and the metrics go on with.

    `named`: whoever asks may know the names of the normal pictures that explanations compare with.
    """

    heat: Heat = "none"
    policy: InForce | None = None
    parts: bool = True
    explain: bool = False
    reconstruction: bool = False
    named: bool = True

    @classmethod
    def of(cls, asked: ScoreWanted, served: Served, named: bool) -> "Options":
        """What was asked, for a model; raises `Problem` for what its bundle cannot support."""
        policy = None if asked.alpha is None else _policy(asked.alpha, served)
        heat = asked.heatmap
        if asked.explain:
            if served.detector.normals is None:
                message = "this bundle keeps nothing to explain by; train it again with this version"
                raise Problem(HTTPStatus.CONFLICT, "cannot_explain", message)
            # Where it is odd belongs to why.
            heat = "regions" if heat == "none" else heat
        return cls(heat, policy, asked.parts, asked.explain, asked.reconstruction, named)

    def applied(self, row: dict[str, Any], detector: Detector) -> dict[str, Any]:
        """A verdict's row as this request wants it."""
        row = row if self.policy is None else self.policy.applied(row, detector)
        return row if self.parts else {name: value for name, value in row.items() if name != "parts"}

    @property
    def draws(self) -> bool:
        """Whether the answer has pictures."""
        return self.reconstruction or self.heat in ("png", "overlay")

    def also(self, detector: Detector) -> Also | None:
        """What the models' thread has to find out beside the verdict: `explanation` and `reconstruction`."""
        return partial(_found, self, detector) if self.explain or self.reconstruction else None


def _found(options: Options, detector: Detector, image: "Tensor", row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if options.explain:
        parts = {name: [value] for name, value in row["parts"].items()}
        (explanation,) = detector.explain(image[None], parts)
        nearest = explanation["nearest_normal"]
        if nearest is not None and not options.named:
            explanation["nearest_normal"] = {**nearest, "name": None}
        found["explanation"] = explanation
    if options.reconstruction:
        made = detector.reconstruct(image[None])
        found["reconstruction"] = None if made is None else made[0]
    return found


def _policy(alpha: float, served: Served) -> InForce:
    try:
        return InForce.of(served.detector, PolicyChoice(alpha), served.policy.revision)
    except CalibrationError as error:
        raise Problem(HTTPStatus.BAD_REQUEST, "alpha_not_supported", str(error)) from None

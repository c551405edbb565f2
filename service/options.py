"""What a request to score asks for beside the verdict: its query parameters."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from anomaly_vae import CalibrationError, Detector
from service.decisions import PolicyChoice
from service.errors import Problem
from service.models import Served
from service.policies import InForce

Heat = Literal["none", "regions", "png"]
"""What is wanted of heat maps: nothing, boxes around what they show, or those and the drawn map."""

_HEATS: dict[str, Heat] = {"none": "none", "regions": "regions", "png": "png"}
_SAID = {"true": True, "1": True, "false": False, "0": False}
_KNOWN = "model=NAME, heatmap=png or regions, alpha=0.01, parts=false, explain=true"


@dataclass(frozen=True)
class Options:
    """`policy`: judge this reply by it instead of the one in force, which the store and the metrics go on with."""

    heat: Heat = "none"
    policy: InForce | None = None
    parts: bool = True
    explain: bool = False

    @classmethod
    def of(cls, arguments: Iterable[tuple[str, str]], served: Served) -> "Options":
        """From the query's (name, value) pairs, the last of a name counting; raises `Problem`."""
        found: dict[str, Any] = {}
        for name, value in arguments:
            if name == "heatmap":
                found["heat"] = _heat(value)
            elif name == "alpha":
                found["policy"] = _policy(value, served)
            elif name in ("parts", "explain"):
                found[name] = _flag(name, value)
            elif name != "model":
                message = f"there is no parameter {name[:40]!r}; there are {_KNOWN}"
                raise Problem(HTTPStatus.BAD_REQUEST, "unknown_parameter", message)
        if found.get("explain"):
            if served.detector.normals is None:
                message = "this bundle keeps nothing to explain by; train it again with this version"
                raise Problem(HTTPStatus.CONFLICT, "cannot_explain", message)
            # Where it is odd belongs to why.
            found["heat"] = "regions" if found.get("heat", "none") == "none" else found["heat"]
        return cls(**found)

    def applied(self, row: dict[str, Any], detector: Detector) -> dict[str, Any]:
        """A verdict's row as this request wants it."""
        row = row if self.policy is None else self.policy.applied(row, detector)
        return row if self.parts else {name: value for name, value in row.items() if name != "parts"}


def _heat(value: str) -> Heat:
    if value not in _HEATS:
        raise _bad(f"heatmap can be png, regions or none, not {value[:40]!r}")
    return _HEATS[value]


def _policy(value: str, served: Served) -> InForce:
    try:
        alpha = float(value)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < 1:
        raise _bad(f"alpha is a rate of false alarms between 0 and 1, such as 0.01, not {value[:40]!r}")
    try:
        return InForce.of(served.detector, PolicyChoice(alpha), served.policy.revision)
    except CalibrationError as error:
        raise Problem(HTTPStatus.BAD_REQUEST, "alpha_not_supported", str(error)) from None


def _flag(name: str, value: str) -> bool:
    if value not in _SAID:
        raise _bad(f"{name} can be true or false, not {value[:40]!r}")
    return _SAID[value]


def _bad(message: str) -> Problem:
    return Problem(HTTPStatus.BAD_REQUEST, "bad_parameter", message)

"""What the API is asked, as types: bodies and queries are checked against them, and OpenAPI describes them."""

from datetime import UTC, datetime
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from anomaly_vae import Spec
from service import ids
from service.reviewing import LABELS

Label = Literal["false_alarm", "confirmed", "missed", "normal", "unclear"]
assert set(LABELS) == set(get_args(Label))


def _in_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _a_verdict(text: str) -> str:
    if ids.read(text) is None:
        raise ValueError("a verdict's id has 16 hex digits")
    return text


Moment = Annotated[datetime, AfterValidator(_in_utc)]
"""ISO 8601, in UTC unless it says otherwise, or seconds since 1970."""
VerdictId = Annotated[str, AfterValidator(_a_verdict)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Share = Annotated[float, Field(gt=0, lt=1)]


class ScoreWanted(Spec):
    """`heatmap`: boxes around what is hot, or those and a PNG. `alpha`: judge this reply at another rate of false
    alarms. `parts`: every score beside the fused one. `explain`: why."""

    model: Name | None = None
    heatmap: Literal["none", "regions", "png"] = "none"
    alpha: Share | None = None
    parts: bool = True
    explain: bool = False


class PolicyWanted(Spec):
    """`alpha` (a rate of false alarms) and perhaps `mode`, or a `threshold` of the score; nothing: the bundle's own."""

    alpha: Share | None = None
    mode: Literal["average", "guaranteed"] | None = None
    threshold: float | None = Field(None, allow_inf_nan=False)


class PreviewWanted(PolicyWanted):
    """A policy to try on the `last` verdicts."""

    last: int = Field(1000, ge=1, le=100_000)


class LoadWanted(Spec):
    """A bundle by the name of its folder; `activate`: at once."""

    bundle: Name
    activate: bool = False


class ActivateWanted(Spec):
    """A version that is loaded."""

    version: str = Field(min_length=1, max_length=16)


class RecalibrateWanted(Spec):
    """`minimum`: so many reviewed normals it takes. `preview`: only tell. `undo`: back to the bundle's own."""

    minimum: int = Field(100, ge=20, le=1_000_000)
    preview: bool = False
    undo: bool = False


class FeedbackWanted(Spec):
    """What a person says of a verdict."""

    verdict: VerdictId
    label: Label
    note: str = Field("", max_length=1000)


class VerdictsWanted(Spec):
    """Filters of verdicts; `cursor` is `next` of the page before. CSV and NDJSON give all pages at once."""

    since: Moment | None = None
    until: Moment | None = None
    model: Name | None = None
    source: Name | None = None
    outlier: bool | None = None
    p_value_at_most: float | None = Field(None, ge=0, le=1)
    cursor: VerdictId | None = None
    limit: int | None = Field(None, ge=1, le=10_000_000)
    format: Literal["json", "csv", "ndjson"] = "json"


class ForgetWanted(Spec):
    """Which verdicts to forget: at least one filter. `pictures_only`: they stay, without pictures."""

    since: Moment | None = None
    until: Moment | None = None
    model: Name | None = None
    source: Name | None = None
    outlier: bool | None = None
    pictures_only: bool = False


class RatesWanted(Spec):
    """A span (the last day) and the minutes of a bucket."""

    since: Moment | None = None
    until: Moment | None = None
    minutes: int = Field(60, ge=1, le=44_640)
    model: Name | None = None
    source: Name | None = None


class ReviewWanted(Spec):
    """How many pictures to look at."""

    model: Name | None = None
    limit: int = Field(20, ge=1, le=500)


class AuditWanted(Spec):
    """`cursor` is `next` of the page before."""

    cursor: int | None = Field(None, ge=1)
    limit: int = Field(100, ge=1, le=1000)

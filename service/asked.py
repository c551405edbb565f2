"""What the API is asked, as types: bodies and queries are checked against them, and OpenAPI describes them."""

import re
from datetime import UTC, datetime
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from anomaly_vae import Spec
from anomaly_vae.answers import Label
from service import ids
from service.reviewing import LABELS

assert set(LABELS) == set(get_args(Label))


_FIRST, _LAST = datetime(1970, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC)
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d([Tt ].+)?|\d{1,10}", re.ASCII)
_VERDICT = "^[0-7][0-9a-f]{15}$"


class Body(Spec):
    """What a JSON body says. JSON has types, so a text is no number in it."""

    model_config = ConfigDict(strict=True)


def _a_moment(text: object) -> object:
    if isinstance(text, str) and not _MOMENT.fullmatch(text):
        raise ValueError("a moment is written like 2026-01-31, 2026-01-31T12:00:00Z, or in seconds since 1970")
    return text


def _in_utc(moment: datetime) -> datetime:
    """Moments that no clock shows are brought to the nearest one that others can be reckoned from."""
    known = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return min(max(known, _FIRST), _LAST)


def _a_verdict(text: str) -> str:
    if ids.read(text) is None:
        raise ValueError("a verdict's id has 16 hex digits")
    return text


def _a_flag(value: object) -> object:
    if isinstance(value, str) and value not in ("true", "false"):
        raise ValueError("it can be true or false")
    return value


def _a_whole(value: object) -> object:
    """To JSON, 20.0 is as whole as 20."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _moment_schema(seconds: str) -> WithJsonSchema:
    texts = [{"type": "string", "format": "date-time"}, {"type": "string", "format": "date"}]
    about = "ISO 8601, in UTC unless it says otherwise, or seconds since 1970"
    number = {"type": seconds, "minimum": 0, "maximum": 9_999_999_999}
    return WithJsonSchema({"anyOf": [*texts, number], "description": about})


Moment = Annotated[
    datetime,
    BeforeValidator(_a_moment),
    AfterValidator(_in_utc),
    _moment_schema("integer"),
]


def _a_moment_in_json(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("a moment is a text like 2026-01-31T12:00:00Z, or a number of seconds since 1970")
    if isinstance(value, str) and "-" not in value:
        raise ValueError("as a text a moment is written like 2026-01-31 or 2026-01-31T12:00:00Z")
    if not isinstance(value, str) and not 0 <= value <= 9_999_999_999:
        raise ValueError("seconds since 1970 are from 0 to 9999999999")
    return _a_moment(value)


JsonMoment = Annotated[
    datetime,
    Field(strict=False),
    BeforeValidator(_a_moment_in_json),
    AfterValidator(_in_utc),
    _moment_schema("number"),
]
VerdictId = Annotated[str, AfterValidator(_a_verdict), WithJsonSchema({"type": "string", "pattern": _VERDICT})]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Share = Annotated[float, Field(ge=1e-9, lt=1)]
Whole = Annotated[int, BeforeValidator(_a_whole)]
Number = Annotated[int, BeforeValidator(_a_whole), Field(ge=0, le=10**15)]
Flag = Annotated[bool, BeforeValidator(_a_flag)]


class ScoreWanted(Spec):
    """`heatmap`: boxes around what is hot, or those and a PNG: the map over a grey picture (`png`), or the picture
    itself under what is hot in it (`overlay`). `alpha`: judge this reply at another rate of false alarms. `parts`:
    every score beside the fused one. `explain`: why. `reconstruction`: what the model made of the picture."""

    model: Name | None = None
    heatmap: Literal["none", "regions", "png", "overlay"] = "none"
    alpha: Share | None = None
    parts: Flag = True
    explain: Flag = False
    reconstruction: Flag = False


class HeatmapWanted(Spec):
    """`style`: the map over a grey picture (`png`), or the picture itself under what is hot in it (`overlay`)."""

    style: Literal["png", "overlay"] = "png"


class PolicyWanted(Body):
    """`alpha` (a rate of false alarms) and perhaps `mode`, or a `threshold` of the score; nothing: the bundle's own."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"alpha": 0.05}]})

    alpha: Share | None = None
    mode: Literal["average", "guaranteed"] | None = None
    threshold: float | None = Field(None, allow_inf_nan=False)


class PreviewWanted(PolicyWanted):
    """A policy to try on the `last` verdicts."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"alpha": 0.05, "last": 1000}]})

    last: Whole = Field(1000, ge=1, le=100_000)


class LoadWanted(Body):
    """A bundle by the name of its folder; `activate`: at once."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"bundle": "line-3-june", "activate": True}]})

    bundle: Name
    activate: bool = False


class ActivateWanted(Body):
    """A version that is loaded."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": "858e1c0ce8f6"}]})

    version: str = Field(min_length=1, max_length=16)


class RetireWanted(Body):
    """A version that is not active; without one the whole model, unless it is the default one."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": "858e1c0ce8f6"}]})

    version: str | None = Field(None, min_length=1, max_length=16)


class RecalibrateWanted(Body):
    """`minimum`: so many reviewed normals it takes. `preview`: only tell. `undo`: back to the bundle's own.

    `independent`: that no two of the reviewed pictures belong together (one of each part, say), which feedback does not
    tell; only then a band is claimed, and the mode `guaranteed` can be kept."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"preview": True}]})

    minimum: Whole = Field(100, ge=20, le=1_000_000)
    preview: bool = False
    undo: bool = False
    independent: bool = False


class FeedbackWanted(Body):
    """What a person says of a verdict."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"verdict": "06d41f3a5c800001", "label": "false_alarm"}]})

    verdict: VerdictId
    label: Label
    note: str = Field("", max_length=1000, pattern=r"^[^\x00]*$")


class VerdictsWanted(Spec):
    """Filters of verdicts; `cursor` is `next` of the page before. CSV and NDJSON give all pages at once."""

    since: Moment | None = None
    until: Moment | None = None
    model: Name | None = None
    source: Name | None = None
    outlier: Flag | None = None
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
    outlier: Flag | None = None
    pictures_only: Flag = False


class RatesWanted(Spec):
    """A span (the last day) and the minutes of a bucket."""

    since: Moment | None = None
    until: Moment | None = None
    minutes: int = Field(60, ge=1, le=44_640)
    model: Name | None = None
    source: Name | None = None


class ScoreCountsWanted(Spec):
    """How many of the last verdicts to count."""

    last: int = Field(1000, ge=1, le=10_000)


class SignInWanted(Body):
    """A key to stay signed in with."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"key": "av_0123abcd_SECRET"}]})

    key: str = Field(min_length=1, max_length=200)


class ReviewWanted(Spec):
    """How many pictures to look at."""

    model: Name | None = None
    limit: int = Field(20, ge=1, le=500)


class AuditWanted(Spec):
    """`cursor` is `next` of the page before."""

    cursor: int | None = Field(None, ge=1, le=2**63 - 1)
    limit: int = Field(100, ge=1, le=1000)


class ScanWanted(Body):
    """A scan that came to its end. `source`: the key's, or the service's own, unless told. `expected_rate`: of
    outliers, were all pictures normal. `token`: made up at random by a command that sends rows; told again, it finds
    the scan that there is."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "monday, line 3", "model": "parts", "version": "858e1c0ce8f6", "source": "line-3",
                    "started": "2026-01-31T06:00:00Z", "finished": "2026-01-31T06:12:30Z", "scored": 4000, "failed": 2,
                    "outliers": 51, "expected_rate": 0.01, "alpha": 0.01,
                }
            ]
        }
    )  # fmt: skip

    name: str = Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")
    model: Name
    version: str = Field(pattern=r"^[A-Za-z0-9._-]{1,16}$")
    source: Name | None = None
    started: JsonMoment
    finished: JsonMoment
    scored: Number
    failed: Number
    outliers: Number
    expected_rate: Annotated[float, Field(ge=0, le=1)]
    alpha: Annotated[float, Field(ge=0, le=1)]
    token: str | None = Field(None, pattern=r"^[0-9a-f]{32}$")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.finished < self.started:
            raise ValueError("the scan finished before it started; exchange the two")
        if self.outliers > self.scored:
            raise ValueError(f"{self.outliers} outliers of {self.scored} pictures that were scored; mend the counts")
        return self


class RowsWanted(Spec):
    """`first`: the place of the first of these rows in the scan's result, counted from 0."""

    first: int = Field(ge=0, le=10**15)


class ScansWanted(Spec):
    """`cursor` is `next` of the page before."""

    cursor: VerdictId | None = None
    limit: int = Field(50, ge=1, le=1000)

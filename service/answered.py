"""What the API answers, as types: OpenAPI describes answers by them, and the client reads them."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Label = Literal["false_alarm", "confirmed", "missed", "normal", "unclear"]


class Reply(BaseModel):
    """A part of an answer. Later versions may add fields; none goes."""

    model_config = ConfigDict(extra="forbid")


class Failure(Reply):
    """Why something was refused: `code` is stable, `message` names the remedy."""

    code: str
    message: str
    request_id: str | None = None


class Refusal(Reply):
    """Every answer that is no success; `results` where several pictures were sent."""

    error: Failure
    results: list["Scored"] | None = None


class ModelName(Reply):
    """Which model, and the version of it."""

    name: str
    version: str


class Policy(Reply):
    """When a picture is an outlier, and the rate of false alarms that is expected of normal ones."""

    revision: int
    alpha: float
    mode: Literal["average", "guaranteed", "threshold"]
    threshold: float | None
    expected_false_alarm_rate: float
    bound: float | None
    band: tuple[float, float] | None


class Region(Reply):
    """A box around what the heat map shows, in pixels of the picture as sent."""

    model_config = ConfigDict(extra="allow")


class Latent(Reply):
    """A number of the code that lies far from normal ones, in their standard deviations."""

    index: int
    value: float
    deviations: float


class Neighbour(Reply):
    """The normal picture with the most similar code; `distance`: root mean square of their deviations."""

    name: str
    distance: float


class Explanation(Reply):
    """Why a picture got its verdict. `percentiles`: of each part among normals, 100 being beyond all of them."""

    percentiles: dict[str, float]
    latents: list[Latent]
    nearest_normal: Neighbour | None


class Scored(Reply):
    """A picture's verdict, or the `error` that kept it from one."""

    id: str | None = None
    filename: str | None = None
    score: float | None = None
    p_value: float | None = None
    outlier: bool | None = None
    alpha: float | None = None
    mode: Literal["average", "guaranteed", "threshold"] | None = None
    threshold: float | None = None
    parts: dict[str, float | None] | None = None
    regions: list[Region] | None = None
    heatmap_png: str | None = None
    explanation: Explanation | None = None
    error: Failure | None = None


class Scores(Reply):
    """The answer to pictures, in the order they were sent."""

    model: ModelName
    results: list[Scored]


class Model(Reply):
    """A model as it stands. `loaded`: its versions in memory; `n`: normals that calibrate it."""

    name: str
    version: str
    bundle: str
    base_version: str
    default: bool
    loaded: list[str]
    n: int
    policy: Policy
    image: dict[str, Any]


class ModelList(Reply):
    """All models, and the bundles that may be loaded."""

    models: list[Model]
    bundles: list[str]


class PolicyRevision(Reply):
    """One decision on the policy; all None: the bundle's own."""

    revision: int
    by: str
    at: datetime
    alpha: float | None
    mode: str | None
    threshold: float | None


class PolicyBook(Reply):
    """The policy in force, and what was decided before, the newest first."""

    policy: Policy
    revisions: list[PolicyRevision]


class Preview(Reply):
    """What share of the last verdicts is flagged, and would be."""

    policy: Policy
    verdicts: int
    flagged_now: int
    flagged_then: int


class Recalibrated(Reply):
    """Reviewed verdicts, and the rates before and after. `applied`: whether it was done."""

    applied: bool
    drawn: int
    judged: int
    unclear: int
    normal: int
    before: "Ranking"
    after: "Ranking"


class Ranking(Reply):
    """`flagged_normals`: the share of the reviewed normals that is flagged, to be held against the expected rate."""

    version: str
    normals: int
    expected_false_alarm_rate: float
    flagged_normals: float | None


class Said(Reply):
    """What a person said of a verdict."""

    label: Label
    note: str
    by: str
    at: datetime


class Verdict(Reply):
    """A verdict as it was kept."""

    id: str
    at: datetime
    request_id: str
    filename: str | None
    model: str
    version: str
    source: str
    score: float
    p_value: float
    outlier: bool
    alpha: float
    policy_revision: int
    parts: dict[str, float | None]
    has_picture: bool
    feedback: Said | None


class VerdictPage(Reply):
    """Verdicts, the newest first; `next` is the cursor of the next page, None on the last."""

    verdicts: list[Verdict]
    next: str | None


class Forgotten(Reply):
    """How many verdicts, or pictures, there are no longer."""

    forgotten: int


class Bucket(Reply):
    """Counts of a span of time. `band`: where the true rate lies with 95% confidence (Wilson 1927)."""

    start: datetime
    scored: int
    outliers: int
    rate: float
    band: tuple[float, float]
    expected_rate: float


class Rates(Reply):
    """Buckets with at least one picture, and p-values counted in 20 bins from 0 to 1."""

    since: datetime
    until: datetime
    minutes: int
    buckets: list[Bucket]
    p_values: list[int]


class ToReview(Reply):
    """A picture to look at, drawn by chance; what was thought of it is not told."""

    id: str
    model: str
    at: datetime
    filename: str | None
    has_picture: bool


class ReviewPage(Reply):
    """Pictures to look at, the oldest first."""

    verdicts: list[ToReview]


class Change(Reply):
    """What somebody changed."""

    number: int
    at: datetime
    by: str
    action: str
    subject: str
    before: Any
    after: Any


class Audit(Reply):
    """Changes, the newest first."""

    changes: list[Change]
    next: int | None

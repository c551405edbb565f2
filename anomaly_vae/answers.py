"""What the service answers, as types: its OpenAPI document is made from them, and the client reads answers by them.

A field with a default may be left out of an answer. One without is always there, and null only where its type says so.
"""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Label = Literal["false_alarm", "confirmed", "missed", "normal", "unclear"]
Mode = Literal["average", "guaranteed", "threshold"]
VerdictId = Annotated[str, Field(pattern=r"^[0-7][0-9a-f]{15}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Reply(BaseModel):
    """A part of an answer. Later versions may add fields, which older clients pass over; none goes."""

    model_config = ConfigDict(frozen=True)


class Failure(Reply):
    """Why something was refused: `code` is stable, `message` names the remedy. `retry_after_ms`: later it may work."""

    code: str
    message: str
    request_id: str | None = None
    retry_after_ms: int | None = None


class Refusal(Reply):
    """Every answer that is no success; `results` where several pictures were sent and each has its own reason."""

    error: Failure
    results: list["Unscored"] | None = None


class ModelName(Reply):
    """Which model, and the version of it."""

    name: str
    version: str


class Policy(Reply):
    """When a picture is an outlier, and the rate of false alarms that is expected of normal ones."""

    revision: Count
    alpha: Share
    mode: Mode
    threshold: float | None
    expected_false_alarm_rate: Share
    bound: float | None
    band: tuple[Share, Share] | None


class Region(Reply):
    """A box in pixels of the picture as sent (`x`, `y`: upper left corner), the share `area` of the picture that is hot
    in it, and how hot: in units that 99.5% of the pixels of normal pictures do not exceed."""

    x: float
    y: float
    width: float
    height: float
    area: Share
    peak_heat: float
    mean_heat: float


class Latent(Reply):
    """A number of the code that lies far from normal ones, in their standard deviations."""

    index: Count
    value: float
    deviations: float


class Neighbour(Reply):
    """The normal picture with the most similar code; `distance`: root mean square of their deviations.

    `id` stands for it; `name` is for the roles `read` and `admin`, null for others.
    """

    id: str
    name: str | None
    distance: float


class Explanation(Reply):
    """Why a picture got its verdict. `percentiles`: of each part among normals, 100 being beyond all of them."""

    percentiles: dict[str, Annotated[float, Field(ge=0, le=100)]]
    latents: list[Latent]
    nearest_normal: Neighbour | None


class Scored(Reply):
    """A picture's verdict; a higher `score` is more unusual. `threshold`: of the score, null where p-values decide.

    `parts`: every score beside the fused one, null where it was no number. `heatmap_png`: base64. `reconstruction_png`:
    likewise, null where no model makes pictures.
    """

    id: VerdictId
    filename: str | None = None
    score: float
    p_value: Share
    outlier: bool
    alpha: Share
    mode: Mode
    threshold: float | None
    parts: dict[str, float | None] | None = None
    regions: list[Region] | None = None
    heatmap_png: str | None = None
    reconstruction_png: str | None = None
    explanation: Explanation | None = None


class Unscored(Reply):
    """The `error` that kept a picture from a verdict."""

    filename: str | None = None
    error: Failure


class Scores(Reply):
    """The answer to pictures, in the order they were sent."""

    model: ModelName
    results: list[Scored | Unscored]


class Counts(Reply):
    """What became of an archive's pictures."""

    scored: Count
    failed: Count
    outliers: Count


class Summary(Reply):
    """The last line of the answer to an archive that was finished."""

    summary: Counts
    model: ModelName


class ImageSettings(Reply):
    """What a model makes of every picture: see `ImageSpec`. `region`: which pixels count, a PNG in base64."""

    height: int
    width: int
    channels: Literal[1, 3]
    fit: Literal["stretch", "crop", "letterbox"]
    background: tuple[int, int, int]
    max_bytes: int
    max_pixels: int
    region: str | None


class Model(Reply):
    """A model as it stands. `loaded`: its versions in memory; `n`: normals that calibrate it."""

    name: str
    version: str
    bundle: str
    base_version: str
    default: bool
    loaded: list[str]
    n: Count
    policy: Policy
    image: ImageSettings


class ModelList(Reply):
    """All models, and the bundles that may be loaded."""

    models: list[Model]
    bundles: list[str]


class Retired(Reply):
    """Which versions of a model are in memory no more, and which still are."""

    name: str
    retired: list[str]
    loaded: list[str]


class PolicyRevision(Reply):
    """One decision on the policy; all None: the bundle's own."""

    revision: Count
    by: str
    at: datetime
    alpha: float | None
    mode: Literal["average", "guaranteed"] | None
    threshold: float | None


class PolicyBook(Reply):
    """The policy in force, and what was decided before, the newest first."""

    policy: Policy
    revisions: list[PolicyRevision]


class Preview(Reply):
    """What share of the last verdicts is flagged, and would be."""

    policy: Policy
    verdicts: Count
    flagged_now: Count
    flagged_then: Count


class Recalibrated(Reply):
    """Reviewed verdicts, and the rates before and after. `applied`: whether it was done."""

    applied: bool
    drawn: Count
    judged: Count
    unclear: Count
    normal: Count
    before: "Ranking"
    after: "Ranking"


class Ranking(Reply):
    """`flagged_normals`: the share of the reviewed normals that is flagged, to be held against the expected rate.

    `band`: where the rate lies nine times in ten; null where the pictures may belong together, or with K-fold.
    """

    version: str
    normals: Count
    expected_false_alarm_rate: Share
    band: tuple[Share, Share] | None
    flagged_normals: Share | None


class Said(Reply):
    """What a person said of a verdict."""

    label: Label
    note: str
    by: str
    at: datetime


class Verdict(Reply):
    """A verdict as it was kept, and what a person said of it since."""

    id: VerdictId
    at: datetime
    request_id: str
    filename: str | None
    model: str
    version: str
    source: str
    score: float
    p_value: Share
    outlier: bool
    alpha: Share
    policy_revision: Count
    parts: dict[str, float | None]
    has_picture: bool
    feedback: Said | None


class VerdictPage(Reply):
    """Verdicts, the newest first; `next` is the cursor of the next page, None on the last."""

    verdicts: list[Verdict]
    next: VerdictId | None


class Forgotten(Reply):
    """How many verdicts, or pictures, there are no longer."""

    forgotten: Count


class Bucket(Reply):
    """Counts of a span of time. `band`: where the true rate lies with 95% confidence (Wilson 1927)."""

    start: datetime
    scored: Count
    outliers: Count
    rate: Share
    band: tuple[Share, Share]
    expected_rate: Share


class Rates(Reply):
    """Buckets with at least one picture, and p-values counted in 20 bins from 0 to 1."""

    since: datetime
    until: datetime
    minutes: int
    buckets: list[Bucket]
    p_values: Annotated[list[Count], Field(min_length=20, max_length=20)]


class ToReview(Reply):
    """A picture to look at, drawn by chance; what was thought of it is not told."""

    id: VerdictId
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


class ScoreCounts(Reply):
    """Scores counted between `edges` (one more than bins): the normals of the calibration and the last verdicts.

    Scores beyond the edges count in the first or the last bin. `threshold`: null where p-values decide.
    """

    version: str
    edges: list[float]
    calibration: list[Count]
    recent: list[Count]
    threshold: float | None


class Session(Reply):
    """Who is signed in on the page: `key` names the key, None for nobody. `needed`: whether keys are asked for."""

    needed: bool
    key: str | None
    role: Literal["score", "read", "admin"] | None
    ends: datetime | None


class VerdictRegions(Reply):
    """Boxes around what is hot, in pixels of the kept picture; `width` and `height` are its own."""

    width: Count
    height: Count
    regions: list[Region]


class Live(Reply):
    """The process lives."""

    live: bool


class StoreStanding(Reply):
    """How the store of verdicts stands: `behind` while it cannot be written, with the `error`. Scoring goes on."""

    state: Literal["ok", "behind"]
    waiting: Count
    lost_verdicts: Count
    lost_pictures: Count
    error: str | None = None


class Ready(Reply):
    """Whether pictures are taken, and why not; `store` where verdicts are kept."""

    ready: bool
    state: Literal["loading", "ready", "draining", "failed"]
    store: StoreStanding | None = None

"""What the service answers of alarms and of scans, as types; see `answers`."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from anomaly_vae.answers import Count, Reply, Share, VerdictId


class Alarm(Reply):
    """Whether a source's stream still looks as calibration did. `rate`: more outliers; `shift`: most pictures moved.

    `since`: when it was raised. `limit`: of `evidence` (rate), or of `effect` (shift: from -1 to 1, in `part`).
    `images`: how many it rests on. `tolerated_rate`: of outliers, explained by calibration and the source's base rate;
    `recent_rate`: since evidence began to grow. `promised`: whether the bound on false alarms is proven.
    """

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    model: str
    version: str
    source: str
    kind: Literal["rate", "shift"]
    raised: bool
    since: datetime | None
    evidence: float | None
    limit: float
    observed_rate: Share | None
    expected_rate: Share
    tolerated_rate: Share
    recent_rate: Share | None
    images: Count
    recent_images: Count
    promised: bool
    part: str | None
    effect: float | None
    message: str
    examples: list[VerdictId]


class AlarmList(Reply):
    """Both alarms of each source whose pictures the active versions have judged."""

    alarms: list[Alarm]


class Scan(Reply):
    """A scan of a whole folder, as its command told of it. `expected_rate`: of outliers, were all pictures normal.

    `rows`: how many rows of its result have come, verdicts and errors, from the first on.
    """

    id: VerdictId
    name: str
    model: str
    version: str
    source: str
    by: str
    started: datetime
    finished: datetime
    scored: Count
    failed: Count
    outliers: Count
    expected_rate: Share
    alpha: Share
    has_report: bool
    rows: Count = 0


class RowsTaken(Reply):
    """`rows`: how many rows of the scan are kept now, from the first on. `served`: whether the service serves this very
    version; if not, its verdicts are kept and shown, and Prometheus does not see them."""

    rows: Count
    served: bool


class ScanPage(Reply):
    """Scans, the newest first; `next` is the cursor of the next page, None on the last."""

    scans: list[Scan]
    next: VerdictId | None

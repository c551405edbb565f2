"""What the store is given and asked: a verdict to be kept, which verdicts are wanted, and how much is to be kept."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """One verdict to be kept. `expected`: the share of normal pictures that the policy takes for outliers.

    `drawn`: for review, by chance alone, and then `content` is the hash of the file. `png`: what the model saw of the
    picture, where it is kept. `latents`: for the alarms, and not kept.
    """

    id: int
    request: str
    filename: str | None
    model: str
    version: str
    source: str
    score: float
    p_value: float
    outlier: bool
    alpha: float
    policy: int
    expected: float
    parts: dict[str, float | None]
    drawn: bool = False
    content: int | None = None
    png: bytes | None = None
    latents: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which verdicts: made at `since` or later and before `until` (seconds since 1970); None means any."""

    since: float | None = None
    until: float | None = None
    model: str | None = None
    source: str | None = None
    outlier: bool | None = None
    p_value_at_most: float | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """How much is kept: days of verdicts, pictures and counts, and bytes of pictures; None means all.

    `minute_days`, `hour_days`: for how long counts are kept by the minute and by the hour; by the day they stay.
    """

    verdict_days: float | None = None
    picture_days: float | None = 30.0
    picture_bytes: int | None = 1 << 30
    minute_days: float | None = 7.0
    hour_days: float | None = 400.0

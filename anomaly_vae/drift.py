"""Does the stream of pictures still look as calibration did? Two alarms, in constant memory. NumPy and SciPy only.

`RateAlarm`: more outliers than calibration and source explain, as evidence that may be looked at after every picture.
`ShiftAlarm`: most pictures have moved, as the size of that move; a tail that grows does not raise it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from anomaly_vae.calibration import Calibration, tie_of

Floats = npt.NDArray[np.float64]

EVIDENCE = 200.0
"""The rate alarm is raised here: by Ville's inequality evidence gets so far with probability 1/200 if all is well."""
UNLUCKY = 0.005
"""With what probability a calibration is so unlucky that its rate lies beyond `tolerated_rate`."""
_ALTERNATIVES = 24
_LEAST_RISE = 0.1
_MOST = 300 * math.log(10)
_AT_ONCE = 1024

SCORE = "score"
"""The part that is the verdict's own score."""
LEAST_EFFECT = 1 / 3
"""A smaller move of most pictures raises no alarm, however sure it is: Cliff's delta, `medium` by Romano (2006)."""
BLOCK, BLOCKS = 32, 32
WINDOWS = (2, 4, 8, 16, 32)
"""In blocks: the last 64, 128 ... 1,024 pictures."""
_SHOWN = 8
PER_PICTURES = 1_000_000
"""So many pictures of one source raise a false shift alarm with probability 1% at most."""
_TRIM = 0.05
_ALL = 0.95
_UNIT = 1 << 20
LEAST_REFERENCE = 20
MOST_LATENTS = 16


@dataclass(frozen=True)
class Tolerated:
    """`rate`: what share of outliers is no reason for an alarm. `expected`: what is expected when all is well.

    `promised`: whether at most 1% false alarms a calibration are proven for independent pictures.
    """

    rate: float
    expected: float
    promised: bool


def tolerated_rate(calibration: Calibration, rank: int, base_rate: float = 0.0) -> Tolerated:
    """The largest share of outliers that a calibration with k = `rank` (see `rank_allowed`) may mean, and no defects.

    Split calibration: the 99.5% quantile of the rate given this calibration, Beta(k, n+1-k). Grouped images: that of
    as many as there are groups, as if those of one group were the same; nothing is promised of new groups. K-fold: the
    larger of that quantile and the proven bound of the mean rate, 2 (k+K-1) / (n+K); nothing is promised either.
    `base_rate`: the share of outliers that the source is known to have, which counts where it is larger.
    """
    n, expected = calibration.n, rank / (calibration.n + 1)
    if rank > n:
        return Tolerated(1.0, 1.0, False)
    if calibration.groups is None:
        bound = float(special.betaincinv(rank, n + 1 - rank, 1 - UNLUCKY))
    else:
        independent = min(calibration.groups, n)
        counted = max(1.0, rank * independent / n)
        bound = float(special.betaincinv(counted, max(independent + 1 - counted, 1e-3), 1 - UNLUCKY))
    if calibration.crossed:
        members = len(calibration.scores)
        bound = max(bound, min(1.0, 2 * (rank + members - 1) / (n + members)))
    promised = calibration.groups is None and not calibration.crossed
    return Tolerated(max(bound, base_rate), max(expected, base_rate), promised)


class RateAlarm:
    """Evidence that the share of outliers is above `tolerated`, in a stream of verdicts; `raised` at `EVIDENCE`.

    An e-process (Shafer and Vovk 2019; Ramdas et al. 2023): while every picture is an outlier with probability at most
    `tolerated`, whatever came before, evidence has an expectation of at most 1 at any time, and reaches 200 with
    probability 1/200 at most in all time. It bets on 24 rises, from a tenth more (in odds) to all being outliers, and
    on every picture as the first of the rise, with shares of the stake that sum to one: 1/ln(t+e) of it is left after
    t pictures. Pictures count one by one, so that it does not matter in which batches they come.
    """

    def __init__(self, tolerated: float) -> None:
        self.tolerated = tolerated
        self.images = self.outliers = 0
        self.recent_images = self.recent_outliers = 0
        self.raised = False
        self._low = self._log_evidence = 0.0
        self._log_wealth = np.full(_ALTERNATIVES, -np.inf)
        self._set_stakes()

    def _set_stakes(self) -> None:
        self._on_outlier = self._on_other = np.zeros(_ALTERNATIVES)
        if 0 < self.tolerated < 1:
            odds = special.logit(self.tolerated)
            rises = np.geomspace(_LEAST_RISE, max(special.logit(0.995) - odds, 2 * _LEAST_RISE), _ALTERNATIVES)
            self._on_outlier = special.log_expit(odds + rises) - math.log(self.tolerated)
            self._on_other = special.log_expit(-odds - rises) - math.log1p(-self.tolerated)

    @property
    def log_evidence(self) -> float:
        """Natural logarithm of the evidence; 0 at the start."""
        return self._log_evidence

    @property
    def evidence(self) -> float:
        """The evidence, at most 1e300."""
        return math.exp(min(self._log_evidence, _MOST))

    def update(self, outliers: Sequence[bool] | npt.NDArray[np.bool_]) -> int | None:
        """Count verdicts in their order; the position of the one that raised the alarm, if one did."""
        raised_at, done = None, 0
        # Between outliers evidence can only sink.
        for i in np.flatnonzero(np.asarray(outliers, np.bool_)).tolist():
            self._pass_others(i - done)
            self._count_outlier()
            if not self.raised and self._log_evidence >= math.log(EVIDENCE):
                self.raised, raised_at = True, i
            done = i + 1
        self._pass_others(len(outliers) - done)
        return raised_at

    def _pass_others(self, count: int) -> None:
        for start in range(0, count, _AT_ONCE):
            stakes = self._staked(min(_AT_ONCE, count - start))
            played = np.arange(len(stakes), 0, -1)[:, None] * self._on_other
            new = np.log(stakes @ np.exp(played))
            self._log_wealth = np.logaddexp(self._log_wealth + played[0], new)
            self._weigh(len(stakes), 0)
            if self._log_evidence < self._low and not self.raised:
                # Evidence was never lower: a rise, if there is one, begins after this.
                self._low, self.recent_images, self.recent_outliers = self._log_evidence, 0, 0

    def _count_outlier(self) -> None:
        self._log_wealth = np.logaddexp(self._log_wealth, math.log(self._staked(1)[0])) + self._on_outlier
        self._weigh(1, 1)

    def _staked(self, count: int) -> Floats:
        """What is staked on each of the next so many pictures as the first of a rise, for each size of the rise."""
        left = 1 / np.log(self.images + np.arange(count + 1) + math.e)
        return np.asarray(-np.diff(left) / _ALTERNATIVES)

    def _weigh(self, images: int, outliers: int) -> None:
        self.images, self.outliers = self.images + images, self.outliers + outliers
        self.recent_images, self.recent_outliers = self.recent_images + images, self.recent_outliers + outliers
        top, left = max(float(self._log_wealth.max()), 0.0), 1 / math.log(self.images + math.e)
        self._log_evidence = top + math.log(float(np.exp(self._log_wealth - top).sum()) + left * math.exp(-top))

    def packed(self) -> dict[str, Any]:
        """Its whole state as plain values."""
        names = ("tolerated", "images", "outliers", "recent_images", "recent_outliers", "raised")
        known = {name: getattr(self, name) for name in names}
        wealth = [max(value, -1e308) for value in self._log_wealth.tolist()]
        return {**known, "low": self._low, "log_evidence": self._log_evidence, "wealth": wealth}

    @classmethod
    def unpacked(cls, values: Mapping[str, Any]) -> "RateAlarm":
        """From `packed`; it goes on as if it had never stopped."""
        found = cls(values["tolerated"])
        for name in ("images", "outliers", "recent_images", "recent_outliers", "raised"):
            setattr(found, name, values[name])
        found._low, found._log_evidence = values["low"], values["log_evidence"]
        wealth = np.array(values["wealth"], np.float64)
        found._log_wealth = np.where(wealth <= -1e308, -np.inf, wealth)
        return found


class Reference:
    """What calibration pictures' values were, by name: the score, parts, and latents such as `latent 7`.

    A name whose values hardly differ, or of which there are fewer than 20, cannot be watched, and is left out.
    """

    def __init__(self, values: Mapping[str, npt.ArrayLike]) -> None:
        columns = {name: np.sort(_finite(np.asarray(column, np.float64))) for name, column in values.items()}
        self._columns = {name: column for name, column in columns.items() if _varies(column)}
        self._ties = {name: tie_of(column) for name, column in self._columns.items()}
        self.names = tuple(self._columns)
        self.n = np.array([len(column) for column in self._columns.values()], np.float64)
        # Among ties the bulk is not from 5% to 95%: what lies in it is measured on the calibration pictures themselves.
        own = [self._ranks_of(name, column) for name, column in self._columns.items()]
        inside = [ranks[_in_bulk(ranks)] for ranks in own]
        self.center = np.array([ranks.mean() if len(ranks) else 0.5 for ranks in inside])
        self.inside = np.array([max(len(part), 1) / len(ranks) for part, ranks in zip(inside, own, strict=True)])

    def ranks(self, values: Mapping[str, npt.ArrayLike]) -> Floats:
        """Mid-ranks in [0, 1], shape (pictures, names): the share of calibration pictures below, ties by half.

        What is no number counts as higher than all.
        """
        columns = [self._ranks_of(name, np.asarray(values[name], np.float64)) for name in self.names]
        return np.stack(columns, 1) if columns else np.zeros((0, 0))

    def _ranks_of(self, name: str, values: Floats) -> Floats:
        column, tie = self._columns[name], self._ties[name]
        values = np.where(np.isfinite(values), values, np.inf)
        below = np.searchsorted(column, values - tie, side="left")
        above = np.searchsorted(column, values + tie, side="right")
        return np.asarray((below + above) / (2 * len(column)), np.float64)


@dataclass(frozen=True)
class Shift:
    """A move of most pictures in one `part`: `effect` from -1 (all lower) to 1 (all higher), over the last `images`.

    `limit`: the effect that raises the alarm over so many.
    """

    part: str
    effect: float
    limit: float
    images: int


class ShiftAlarm:
    """Whether most of the last pictures have moved away from a `Reference`; `raised` by the size of the move.

    Effect: Cliff's delta, P(new > calibration) - P(new < calibration), of the pictures within the central 90% of the
    calibration pictures. Outliers are not among them, so that more defects alone do not count. Or the share of pictures
    that have left that range, where it is surely more than half. It is measured every 32 pictures over the last 64, 128
    ... 1,024. `limit` is 1/3, or more where chance could do that: see `noise`.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.raised: Shift | None = None
        self.images = 0
        # Of each block and name: ranks' sum within the bulk, how many those are, how many are above, how many below.
        # Whole numbers, so that it does not matter in which order they are added.
        self._sums = np.zeros((BLOCKS + 1, 4, len(reference.names)), np.int32)

    def update(self, values: Mapping[str, npt.ArrayLike]) -> int | None:
        """Count pictures, columns of `values` by name, in their order; the position at which the alarm was raised."""
        ranks, raised_at = self.reference.ranks(values), None
        start = 0
        while start < len(ranks):
            part = ranks[start : start + BLOCK - self.images % BLOCK]
            self._add(part)
            start += len(part)
            if self.images % BLOCK == 0:
                if self.raised is None:
                    self.raised = self._alarming()
                    raised_at = start - 1 if self.raised else None
                self._sums = np.roll(self._sums, 1, 0)
                self._sums[0] = 0
        return raised_at

    def _add(self, ranks: Floats) -> None:
        self._sums[0] += _sums(ranks).astype(np.int32)
        self.images += len(ranks)

    def shifts(self, blocks: int = _SHOWN) -> list[Shift]:
        """The move of each name over the last so many blocks, or as many as there are; none before the least window."""
        most = min(blocks, self.images // BLOCK, BLOCKS)
        # The first of the sums is of a block that is not full yet.
        return self._over(1, most) if most >= WINDOWS[0] else []

    def _over(self, first: int, blocks: int) -> list[Shift]:
        return _moves(self.reference, self._sums[first : first + blocks].astype(np.float64).sum(0), blocks * BLOCK)

    def _alarming(self) -> Shift | None:
        """The move that most exceeds its limit, of the shortest window that shows any."""
        for blocks in WINDOWS:
            if self.images >= blocks * BLOCK:
                found = [one for one in self._over(0, blocks) if abs(one.effect) >= one.limit]
                if found:
                    return max(found, key=lambda one: abs(one.effect) - one.limit)
        return None

    def packed(self) -> dict[str, Any]:
        """Its state as plain values and an array, without the reference."""
        raised = None if self.raised is None else vars(self.raised)
        return {"names": list(self.reference.names), "images": self.images, "raised": raised, "sums": self._sums}

    @classmethod
    def unpacked(cls, reference: Reference, values: Mapping[str, Any]) -> "ShiftAlarm":
        """From `packed`; it begins anew where the reference has other names."""
        found = cls(reference)
        if list(values["names"]) == list(reference.names):
            found.images = values["images"]
            found.raised = None if values["raised"] is None else Shift(**values["raised"])
            found._sums = np.array(values["sums"], np.int32).reshape(found._sums.shape)
        return found


def _moves(reference: Reference, sums: Floats, count: int) -> list[Shift]:
    """The larger of two moves of `count` pictures in each name: that of the bulk, and the share that has left it."""
    total, inside, above, below = sums
    bulk = (total / _UNIT / np.maximum(inside, 1) - reference.center) / (0.5 - _TRIM)
    enough = np.maximum(inside, count / 4)
    of_bulk = np.maximum(LEAST_EFFECT, noise(enough, reference.n, len(bulk)))
    left = np.clip(1 - inside / count / reference.inside, 0, 1) * np.where(above >= below, 1, -1)
    of_left = np.minimum(0.5 + window_noise(count, len(bulk)), _ALL)
    leaves = np.abs(left) / of_left > np.abs(bulk) * (inside >= count / 4) / of_bulk
    effects = np.clip(np.where(leaves, left, bulk), -1, 1)
    columns = zip(reference.names, effects.tolist(), np.where(leaves, of_left, of_bulk).tolist(), strict=True)
    return [Shift(name, effect, limit, count) for name, effect, limit in columns]


def _sums(ranks: Floats) -> npt.NDArray[np.int64]:
    """Of each name: ranks' sum within the bulk, how many those are, how many are above, how many below."""
    inside = _in_bulk(ranks)
    found = (np.where(inside, np.rint(ranks * _UNIT), 0).astype(np.int64), inside, ranks > 1 - _TRIM, ranks < _TRIM)
    return np.stack([one.sum(0, dtype=np.int64) for one in found])


class Moves:
    """How most of all pictures differ from a `Reference`: one window over a whole scan, in which order is nothing."""

    def __init__(self, reference: Reference) -> None:
        self.reference, self.images = reference, 0
        self._totals = np.zeros((4, len(reference.names)), np.int64)

    def update(self, values: Mapping[str, npt.ArrayLike]) -> None:
        """Count pictures, columns of `values` by name."""
        ranks = self.reference.ranks(values)
        self._totals += _sums(ranks)
        self.images += len(ranks)

    def largest(self) -> Shift | None:
        """The move that most exceeds its limit, as the shift alarm has it; None where none does, or of few pictures."""
        if self.images < WINDOWS[0] * BLOCK or not self.reference.names:
            return None
        found = _moves(self.reference, self._totals.astype(np.float64), self.images)
        beyond = [one for one in found if abs(one.effect) >= one.limit]
        return max(beyond, key=lambda one: abs(one.effect) - one.limit, default=None)


def noise(images: npt.ArrayLike, calibration: npt.ArrayLike, names: int) -> Floats:
    """How large an effect chance alone can show: of so many pictures against so many calibration pictures.

    Ranks of normal pictures are uniform, so that a mean of w of them is sub-Gaussian with variance 1/(3w) on this
    scale. One share is for the calibration's own error (0.5% over all names and both sides), one for all windows of
    `PER_PICTURES` pictures (0.5% in all).
    """
    tests = 2 * max(names, 1)
    own = np.sqrt(2 / 3 * math.log(tests / UNLUCKY) / np.asarray(calibration, np.float64))
    return np.asarray(window_noise(images, names) + own, np.float64)


def window_noise(images: npt.ArrayLike, names: int) -> Floats:
    """That of windows alone; see `noise`."""
    windows = 2 * max(names, 1) * len(WINDOWS) * PER_PICTURES / BLOCK
    return np.asarray(np.sqrt(2 / 3 * math.log(windows / UNLUCKY) / np.asarray(images, np.float64)), np.float64)


def widest(codes: npt.NDArray[Any], most: int = MOST_LATENTS) -> tuple[int, ...]:
    """The latents to watch, of codes (n, D): those that differ most between normals, in ascending order."""
    if codes.ndim != 2 or len(codes) < LEAST_REFERENCE:
        return ()
    spread = codes.std(0)
    chosen = np.argsort(-spread, kind="stable")[:most]
    return tuple(sorted(int(i) for i in chosen if spread[i] > 0))


def latent_name(index: int) -> str:
    """As a latent is called among parts."""
    return f"latent {index}"


def _finite(column: Floats) -> Floats:
    return column[np.isfinite(column)]


def _varies(column: Floats) -> bool:
    if len(column) < LEAST_REFERENCE:
        return False
    low, high = np.quantile(column, [0.25, 0.75])
    return bool(high - low > 1e-6 * max(abs(low), abs(high)))


def _in_bulk(ranks: Floats) -> npt.NDArray[np.bool_]:
    return np.asarray((ranks >= _TRIM) & (ranks <= 1 - _TRIM))

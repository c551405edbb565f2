"""Scores of held-out normals -> p-values, verdicts and what they promise. NumPy and SciPy only.

Split conformal prediction (Vovk, Gammerman, Shafer 2005; Bates et al. 2023 for the outlier case): with n
calibration scores exchangeable with the score s of a new normal image, p = (1 + #{calibration >= s}) / (n + 1) is at
most alpha with probability at most alpha. Polarity: a higher score, and a smaller p-value, is more anomalous.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from scipy import special

from anomaly_vae.errors import CalibrationError

Mode = Literal["average", "guaranteed"]
Floats = npt.NDArray[np.float64]

TIE = 1e-5
"""Scores closer than this share of the calibration scores' quartile range are equal: a float32 model gives the same
picture scores that differ by less, according to the batch it came in, and its rank must not."""

ALPHA_LADDER = (0.001, 0.01, 0.05, 0.10)
"""The default alpha is the smallest of these that the calibration images support."""

UNKNOWN_GROUPS = 0
"""Of images that may belong together, nobody knows which."""

LEAST_ALPHA = 1e-9
"""A rate that takes a thousand million calibration images; nobody means a smaller one."""

CONFIDENCE = 0.95
"""With what probability over calibration sets the `guaranteed` mode keeps the false-alarm rate at or below alpha."""


@lru_cache(256)
def rank_allowed(n: int, alpha: float, mode: Mode) -> int:
    """k such that the k-1 largest of n calibration scores may lie at or above an outlier's; 0 when alpha is too small.

    `average`: k = floor((n+1) alpha). `guaranteed`: the largest k with P(Beta(k, n+1-k) <= alpha) >= 0.95.
    """
    k = min(math.floor((n + 1) * alpha + 1e-9), n)
    if mode == "guaranteed":
        while k > 0 and special.betainc(k, n + 1 - k, alpha) < CONFIDENCE:
            k -= 1
    return k


def normals_needed(alpha: float, mode: Mode = "average") -> int:
    """The smallest number of calibration images that supports `alpha`."""
    _check_alpha(alpha)
    if mode == "guaranteed":
        n = math.ceil(math.log1p(-CONFIDENCE) / math.log1p(-alpha) - 1e-9)
    else:
        n = math.ceil(1 / alpha - 1e-9) - 1
    return max(n, 1)


def smallest_alpha(n: int, mode: Mode = "average") -> float:
    """The smallest alpha of `ALPHA_LADDER` that n calibration images support; raises `CalibrationError` if none."""
    for alpha in ALPHA_LADDER:
        if rank_allowed(n, alpha, mode) >= 1:
            return alpha
    needed = normals_needed(ALPHA_LADDER[-1], mode)
    raise CalibrationError(
        f"{n} calibration images support no false-alarm rate up to {ALPHA_LADDER[-1]:.0%} in mode {mode!r}; "
        f"it takes {needed} of them: add normal pictures"
    )


@dataclass(frozen=True)
class Promise:
    """What a verdict at this alpha promises about the false-alarm rate on new normal images.

    `expected`: its mean over calibration sets (nominal, with K-fold or groups). `bound`: what that mean is proven not
    to exceed; None for grouped images, since those of a new group may differ from all that were seen. `band`: the
    5-95% range of the rate given this calibration set; None with K-fold or groups.
    """

    expected: float
    bound: float | None
    band: tuple[float, float] | None


@dataclass(frozen=True)
class Calibration:
    """Scores of calibration images, one array for each member of the detector that ranks them.

    One member: split conformal. K members: each image's score comes from the one member that never saw it
    (cross-conformal, Vovk 2015) and p sums the counts over members. With k of `rank_allowed`, outliers have a weighted
    mean of the members' own p-values of at most (k + K - 1) / (n + K), and twice a mean of p-values is a p-value (Vovk
    and Wang 2020): the rate is proven to be at most twice that. It is near alpha in practice.
    `groups`: number of independent groups of images, when they are not exchangeable one by one; see `UNKNOWN_GROUPS`.
    `tie`: as `TIE`, for scores that may lie further from those that calibration would have ranked; where they lie no
    further, p-values are at least as large as calibration would have found them.
    """

    scores: tuple[Floats, ...]
    groups: int | None = None
    tie: float = TIE

    def __post_init__(self) -> None:
        if not self.scores or not sum(len(fold) for fold in self.scores):
            raise CalibrationError("a detector cannot be built without calibration images; add normal pictures")
        if not all(np.isfinite(fold).all() for fold in self.scores):
            raise CalibrationError("calibration scores must be finite numbers; the model has diverged, train again")

    @classmethod
    def of(cls, scores: Sequence[npt.ArrayLike], groups: int | None = None) -> Self:
        """Build from any arrays; scores are kept sorted."""
        return cls(tuple(np.sort(np.asarray(fold, np.float64)) for fold in scores), groups)

    @property
    def n(self) -> int:
        """Number of calibration images."""
        return sum(len(fold) for fold in self.scores)

    @property
    def crossed(self) -> bool:
        """Whether this is K-fold (cross-conformal) calibration."""
        return len(self.scores) > 1

    def p_values(self, scores: npt.ArrayLike) -> Floats:
        """p-values in [1/(n+1), 1] of images with `scores` of shape (images, members)."""
        columns = np.asarray(scores, np.float64).reshape(-1, len(self.scores))
        at_least = np.zeros(len(columns), np.int64)
        for fold, column, tie in zip(self.scores, columns.T, self.ties, strict=True):
            at_least += len(fold) - np.searchsorted(fold, column - tie, side="left")
        return np.asarray((1 + at_least) / (self.n + 1), np.float64)

    @cached_property
    def ties(self) -> tuple[float, ...]:
        """For each member, the distance within which a score ties with one of its calibration scores."""
        return tuple(tie_of(fold, self.tie) for fold in self.scores)

    @cached_property
    def unit(self) -> float:
        """The quartile range of all scores; never 0, so that it can divide."""
        return max(quartile_range(np.concatenate(self.scores)), 1e-12)

    def rank(self, alpha: float, mode: Mode = "average") -> int:
        """k of `rank_allowed`; raises `CalibrationError` with the number of images it would take."""
        _check_alpha(alpha)
        if mode == "guaranteed" and (self.crossed or self.groups is not None):
            why = "K-fold calibration" if self.crossed else "grouped calibration images"
            raise CalibrationError(
                f"mode 'guaranteed' cannot be kept with {why}; use mode 'average', or add independent normal pictures"
            )
        k = rank_allowed(self.n, alpha, mode)
        if k < 1:
            raise CalibrationError(
                f"alpha {alpha:g} in mode {mode!r} needs {normals_needed(alpha, mode)} calibration images; there are "
                f"{self.n}; choose a larger alpha or add normal pictures"
            )
        return k

    def outliers(self, p_values: npt.ArrayLike, alpha: float, mode: Mode = "average") -> npt.NDArray[np.bool_]:
        """Verdicts: p <= k / (n+1), which is p <= alpha in mode `average`."""
        return np.asarray(p_values) * (self.n + 1) <= self.rank(alpha, mode) + 1e-9

    def threshold(self, alpha: float, mode: Mode = "average") -> float | None:
        """An image is an outlier exactly when its score exceeds this; None with K-fold (the p-value decides)."""
        k = self.rank(alpha, mode)
        return None if self.crossed else float(self.scores[0][-k] + self.ties[0])

    def promise(self, alpha: float, mode: Mode = "average") -> Promise:
        """What the verdict at `alpha` promises; see `Promise`."""
        k = self.rank(alpha, mode)
        expected = k / (self.n + 1)
        if self.groups is not None:
            return Promise(expected, None, None)
        if self.crossed:
            members = len(self.scores)
            return Promise(expected, min(1.0, 2 * (k + members - 1) / (self.n + members)), None)
        low, high = (float(special.betaincinv(k, self.n + 1 - k, q)) for q in (0.05, 0.95))
        return Promise(expected, alpha, (low, high))

    def smallest_alpha(self, mode: Mode = "average") -> float:
        """The smallest alpha of `ALPHA_LADDER` supported here."""
        return smallest_alpha(self.n, mode)

    def false_alarms_interval(self, m: int, alpha: float, mode: Mode = "average") -> tuple[int, int]:
        """Central 90% interval of the number of false alarms among m test normals: beta-binomial(m, k, n+1-k)."""
        from scipy import stats  # half a second, for evaluations alone

        k = self.rank(alpha, mode)
        law = stats.betabinom(m, k, self.n + 1 - k)
        return int(law.ppf(0.05)), int(law.ppf(0.95))


def tie_of(scores: Floats, tie: float = TIE) -> float:
    """The distance within which a score ties with one of these; see `TIE`."""
    if not len(scores):
        return 0.0
    return tie * quartile_range(scores)


def quartile_range(scores: Floats) -> float:
    """From the first to the third quartile: the unit in which it is told how far scores move."""
    low, high = np.quantile(scores, [0.25, 0.75])
    return float(high - low)


def benjamini_hochberg(p_values: npt.ArrayLike, fdr: float) -> npt.NDArray[np.bool_]:
    """Which hypotheses to reject so that the false-discovery rate is at most `fdr` (Benjamini and Hochberg 1995)."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    below = np.nonzero(p[order] <= fdr * np.arange(1, len(p) + 1) / max(len(p), 1))[0]
    rejected = np.zeros(len(p), np.bool_)
    if len(below):
        rejected[order[: below[-1] + 1]] = True
    return rejected


def fdr_cut(counts: Mapping[float, int], fdr: float) -> float | None:
    """The largest p-value that Benjamini and Hochberg reject, of so many of each; None where they reject none."""
    total, so_far, cut = sum(counts.values()), 0, None
    for p in sorted(counts):
        so_far += counts[p]
        if p <= fdr * so_far / total:
            cut = p
    return cut


def fdr_resolution(n: int, fdr: float) -> float:
    """The least share of a batch that can be rejected at all, if no p-value is below 1/(n+1)."""
    return min(1.0, 1 / ((n + 1) * fdr))


def _check_alpha(alpha: float) -> None:
    if not LEAST_ALPHA <= alpha < 1:
        raise CalibrationError(f"alpha is a rate of false alarms between 0 and 1, such as 0.05; got {alpha:g}")

"""The promises of calibration, checked by simulation with redrawn calibration sets."""

import numpy as np
import pytest
from scipy import stats

from anomaly_vae.calibration import (
    ALPHA_LADDER,
    Calibration,
    benjamini_hochberg,
    normals_needed,
    rank_allowed,
    smallest_alpha,
)
from anomaly_vae.errors import CalibrationError


@pytest.mark.parametrize(
    ("alpha", "mode", "n"), [(0.01, "guaranteed", 299), (0.001, "guaranteed", 2995), (0.05, "average", 19)]
)
def test_the_known_numbers_of_normals(alpha, mode, n):
    assert normals_needed(alpha, mode) == n


@pytest.mark.parametrize("mode", ["average", "guaranteed"])
@pytest.mark.parametrize("alpha", [*ALPHA_LADDER, 0.02, 0.033])
def test_needed_is_the_smallest_supported(alpha, mode):
    n = normals_needed(alpha, mode)
    assert rank_allowed(n, alpha, mode) >= 1
    assert rank_allowed(n - 1, alpha, mode) < 1


def test_smallest_alpha_climbs_the_ladder():
    assert [smallest_alpha(n) for n in (9, 19, 99, 999)] == [0.1, 0.05, 0.01, 0.001]
    with pytest.raises(CalibrationError, match="it takes 9"):
        smallest_alpha(8)


def test_p_value_is_the_rank_with_ties_against_the_image():
    calibration = Calibration.of([[1.0, 2.0, 2.0, 3.0]])
    np.testing.assert_allclose(calibration.p_values([0.0, 2.0, 2.5, 3.0, 4.0]), np.array([5, 4, 2, 2, 1]) / 5)


@pytest.mark.parametrize("mode", ["average", "guaranteed"])
def test_threshold_and_p_value_give_one_verdict(mode):
    random = np.random.default_rng(0)
    calibration = Calibration.of([np.round(random.normal(size=400), 1)])  # rounded: ties
    scores = np.round(random.normal(1, 1, 1000), 1)
    flagged = calibration.outliers(calibration.p_values(scores), 0.05, mode)
    assert 0 < flagged.sum() < 1000
    np.testing.assert_array_equal(flagged, scores > calibration.threshold(0.05, mode))


@pytest.mark.parametrize(("mode", "n"), [("average", 99), ("average", 250), ("guaranteed", 150)])
def test_false_alarm_rate_over_calibration_sets(mode, n):
    """Conditional rates follow Beta(k, n+1-k): the mean in mode average, 95% of them below alpha in mode guaranteed."""
    random, alpha, rates = np.random.default_rng(1), 0.05, []
    for _ in range(2000):
        calibration = Calibration.of([random.normal(size=n)])
        rates.append(stats.norm.sf(calibration.threshold(alpha, mode)))  # the exact rate, given this set
    k = rank_allowed(n, alpha, mode)
    assert stats.kstest(rates, stats.beta(k, n + 1 - k).cdf).pvalue > 1e-3
    low, high = Calibration.of([np.arange(n)]).promise(alpha, mode).band
    assert abs(np.mean((np.array(rates) > low) & (np.array(rates) < high)) - 0.9) < 0.03
    if mode == "average":
        assert abs(np.mean(rates) - k / (n + 1)) < 0.002
    else:
        assert np.mean(np.array(rates) <= alpha) >= 0.95 - 0.015


def test_count_of_false_alarms_follows_its_interval():
    random, inside = np.random.default_rng(2), 0
    for _ in range(500):
        calibration = Calibration.of([random.normal(size=200)])
        alarms = calibration.outliers(calibration.p_values(random.normal(size=300)), 0.05).sum()
        low, high = calibration.false_alarms_interval(300, 0.05)
        inside += low <= alarms <= high
    assert 0.87 < inside / 500 < 0.96


def test_cross_conformal_is_near_alpha_and_claims_no_band():
    """Members rank on scales of their own; each image is ranked only against the member's own fold."""
    random, rates = np.random.default_rng(3), []
    for _ in range(300):
        scales = random.uniform(1, 10, 5)
        calibration = Calibration.of([scale * random.normal(size=8) for scale in scales])
        new = random.normal(size=(200, 1)) * scales
        rates.append(calibration.outliers(calibration.p_values(new), 0.1).mean())
    assert np.mean(rates) <= 0.1 + 0.01
    promise = calibration.promise(0.1)
    assert promise.bound == pytest.approx(2 * (4 + 5 - 1) / (40 + 5))
    assert (promise.band, calibration.threshold(0.1)) == (None, None)


def test_guaranteed_is_refused_where_it_cannot_be_kept():
    with pytest.raises(CalibrationError, match="K-fold"):
        Calibration.of([np.arange(300.0), np.arange(300.0)]).threshold(0.05, "guaranteed")
    with pytest.raises(CalibrationError, match="grouped"):
        Calibration.of([np.arange(600.0)], groups=20).threshold(0.05, "guaranteed")
    promise = Calibration.of([np.arange(600.0)], groups=20).promise(0.05)
    assert (promise.bound, promise.band) == (None, None)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 0.0001, 5e-324])
def test_impossible_alphas_are_refused_with_the_remedy(alpha):
    with pytest.raises(CalibrationError, match=r"such as 0.05|needs \d+ calibration images"):
        Calibration.of([np.arange(50.0)]).threshold(alpha)


def test_no_calibration_without_finite_scores():
    for scores in ([[]], [[1.0, float("nan")]]):
        with pytest.raises(CalibrationError):
            Calibration.of(scores)


def test_benjamini_hochberg_keeps_the_false_discovery_rate():
    random, rates = np.random.default_rng(4), []
    for _ in range(400):
        p = np.concatenate([random.uniform(size=180), random.uniform(0, 0.002, 20)])
        rejected = benjamini_hochberg(p, 0.1)
        rates.append(rejected[:180].sum() / max(rejected.sum(), 1))
    assert 0.05 < np.mean(rates) < 0.11
    assert benjamini_hochberg([], 0.1).shape == (0,)


def test_an_alpha_just_below_one_leaves_the_most_normal_picture_alone():
    calibration = Calibration.of([np.arange(144.0)])
    assert calibration.rank(1 - 1e-15) == 144
    assert 0 <= calibration.threshold(1 - 1e-15) < 1
    assert calibration.promise(1 - 1e-15).expected < 1

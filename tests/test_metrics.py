"""Metrics against their definitions, written the slow way."""

import numpy as np
import pytest

from anomaly_vae.metrics import detection, localisation, per_region_overlap, tpr_at_fpr


@pytest.fixture
def scores():
    random = np.random.default_rng(0)
    return np.round(random.normal(size=80), 1), np.round(random.normal(1.2, 1, 60), 1)  # rounded: ties


def test_auroc_is_the_chance_of_ranking_a_pair_rightly(scores):
    normal, abnormal = scores
    pairs = (abnormal[:, None] > normal) + 0.5 * (abnormal[:, None] == normal)
    assert detection(normal, abnormal).auroc == pytest.approx(pairs.mean())
    assert detection(abnormal, normal).auroc == pytest.approx(1 - pairs.mean())


def test_delong_interval_covers_at_its_level():
    random, inside = np.random.default_rng(1), 0
    truth = 0.7602  # of two normals a unit apart: Phi(1 / sqrt 2)
    for _ in range(300):
        low, high = detection(random.normal(size=60), random.normal(1, 1, 60)).auroc_interval
        inside += low <= truth <= high
    assert 0.91 <= inside / 300 <= 0.98


def test_tpr_at_fpr_never_exceeds_the_false_positives_allowed(scores):
    normal, abnormal = scores
    for fpr in (0.01, 0.05, 0.5):
        best = max(
            (abnormal > threshold).mean()
            for threshold in np.concatenate([normal, abnormal, [-np.inf]])
            if (normal > threshold).mean() <= fpr
        )
        assert tpr_at_fpr(normal, abnormal, fpr) == pytest.approx(best)


def test_maps_that_are_their_masks_are_perfect_and_chance_is_chance():
    masks = [np.zeros((20, 20), bool) for _ in range(3)]
    masks[0][2:6, 2:6] = masks[0][12:13, 12:19] = masks[1][8:12, 8:12] = True
    exact = localisation([mask.astype(np.float32) for mask in masks], masks)
    assert (exact.auroc, exact.average_precision) == (1, 1)
    assert exact.pro == pytest.approx(1, abs=0.01)
    random = np.random.default_rng(0)
    chance = localisation([random.random((20, 20), np.float32) for _ in masks], masks)
    assert abs(chance.auroc - 0.5) < 0.1
    assert abs(chance.pro - 0.15) < 0.08  # the diagonal's area up to 30%


def test_pro_counts_regions_not_pixels():
    """Missing a small region costs as much as missing a large one."""
    mask = np.zeros((40, 40), bool)
    mask[0:20, 0:20] = mask[30:32, 30:32] = True
    heat = np.zeros((40, 40), np.float32)
    heat[0:20, 0:20] = 1
    large_only = per_region_overlap([heat + np.random.default_rng(0).random((40, 40)).astype(np.float32) * 0.5], [mask])
    heat[0:20, 0:20], heat[30:32, 30:32] = 0, 1
    small_only = per_region_overlap([heat + np.random.default_rng(0).random((40, 40)).astype(np.float32) * 0.5], [mask])
    assert large_only == pytest.approx(small_only, abs=0.1)
    assert 0.45 < large_only < 0.75


def test_masks_all_of_one_kind_measure_nothing():
    blank = [np.zeros((4, 4), bool)]
    assert localisation([np.zeros((4, 4), np.float32)], blank) is None

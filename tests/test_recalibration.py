"""A detector ranked among other normals: the same scores, new p-values, a version of its own."""

import os
import time

import numpy as np
import pytest
import torch

from anomaly_vae import CalibrationError, Detector, Engine, content_hash
from anomaly_vae.calibration import UNKNOWN_GROUPS, Calibration
from anomaly_vae.console import policy_line
from anomaly_vae.data import open_pictures
from anomaly_vae.training import train


@pytest.fixture(scope="module", params=["split", "three folds"])
def detector(request, digits_folder, tiny_spec, tmp_path_factory):
    if request.param == "split":
        return Detector.load(request.getfixturevalue("tiny_bundle")).with_policy(0.05)
    few = ["calibration.few_normals=2000", "calibration.folds=3", "data.test_fraction=0.4", "training.steps=60"]
    path = tmp_path_factory.mktemp("folds") / "b"
    train(tiny_spec.with_overrides(few), digits_folder, path, device="cpu")
    return Detector.load(path).with_policy(0.05)


@pytest.fixture(scope="module")
def fresh(digits_folder, detector):
    """Normals that no part of the detector has seen, and what they score."""
    opened = open_pictures(digits_folder, detector.spec.data, detector.image)
    new = [i for i, item in enumerate(opened.items) if item.normal and opened.fingerprints[i] not in detector.seen]
    images = opened.images(new)
    return images, np.array(detector.judge(images).score)


def test_p_values_are_ranks_among_the_new_scores(detector, fresh):
    images, scores = fresh
    half = len(scores) // 2
    again = detector.recalibrated(scores[:half])
    assert again.calibration.n == half
    assert not again.calibration.crossed
    judged = again.judge(images[half:])
    np.testing.assert_allclose(judged.score, scores[half:], rtol=1e-6)
    expected = [(1 + (scores[:half] >= score).sum()) / (half + 1) for score in scores[half:]]
    np.testing.assert_allclose(judged.p_value, expected, atol=1.5 / (half + 1))
    assert abs(np.mean(judged.p_value) - 0.5) < 0.15
    assert judged.outlier == [p <= again.policy.alpha for p in judged.p_value]
    assert again.policy.threshold is not None


def test_the_version_tells_the_detector_and_the_scores(detector, fresh, tmp_path):
    _, scores = fresh
    again, same, other = (detector.recalibrated(chosen) for chosen in (scores, scores[::-1], scores[1:]))
    assert again.version == same.version
    assert len({detector.version, again.version, other.version}) == 3
    saved = again.save(tmp_path / "b")
    loaded = Detector.load(tmp_path / "b")
    assert loaded.version == saved.version
    images = torch.zeros((2, 1, 16, 16), dtype=torch.uint8)
    assert loaded.judge(images).p_value == again.judge(images).p_value


def test_fewer_scores_support_a_larger_alpha_and_too_few_none(detector, fresh):
    assert detector.recalibrated(fresh[1][:30]).policy.alpha == 0.05
    assert detector.with_policy(0.02).recalibrated(fresh[1][:30]).policy.alpha == 0.05
    assert detector.with_policy(0.04).recalibrated(fresh[1][:30]).policy.alpha == 0.04
    assert detector.recalibrated(fresh[1][:12]).policy.alpha == 0.1
    with pytest.raises(CalibrationError, match="calibration images"):
        detector.recalibrated(fresh[1][:5])


def test_the_bundle_tells_when_it_was_calibrated(detector, fresh, tmp_path):
    assert time.time() - 3600 < detector.calibrated_at < time.time()
    again = detector.recalibrated(fresh[1], at=1_700_000_000.0)
    again.save(tmp_path / "b")
    assert Detector.load(tmp_path / "b").calibrated_at == again.calibrated_at == 1_700_000_000.0
    assert again.with_policy(0.1).calibrated_at == again.calibrated_at


def test_a_bundle_that_does_not_tell_counts_as_calibrated_when_it_was_written(detector, fresh, tmp_path):
    detector.recalibrated(fresh[1]).save(tmp_path / "b")
    os.utime(tmp_path / "b" / "bundle.yaml", (1_600_000_000, 1_600_000_000))
    assert Detector.load(tmp_path / "b").calibrated_at == 1_600_000_000.0


def test_a_band_is_claimed_only_of_pictures_that_do_not_belong_together(detector, fresh, tmp_path):
    scores = fresh[1]
    assert detector.recalibrated(scores).policy.band is not None, "as of the pictures before"
    assert detector.recalibrated(scores, independent=False).policy.band is None
    assert detector.recalibrated(scores, independent=False).policy.bound is None
    grouped = detector.with_policy()
    grouped.calibration = Calibration.of(detector.calibration.scores, groups=12)
    for again in (grouped.recalibrated(scores), detector.recalibrated(scores, independent=False)):
        assert (again.policy.band, again.calibration.groups) == (None, UNKNOWN_GROUPS)
        assert again.policy.threshold == detector.recalibrated(scores).policy.threshold, "verdicts are the same"
        assert again.policy.expected_false_alarm_rate == detector.recalibrated(scores).policy.expected_false_alarm_rate
        with pytest.raises(CalibrationError, match="guaranteed"):
            again.with_policy(0.05, "guaranteed")
    assert grouped.recalibrated(scores, independent=True).policy.band is not None
    again = detector.recalibrated(scores, independent=False)
    again.save(tmp_path / "b")
    assert Detector.load(tmp_path / "b").policy.band is None
    assert "in groups that nobody knows" in policy_line(again)


def test_what_guaranteed_its_rate_goes_on_as_average_where_pictures_may_belong_together(tiny_detector, fresh):
    scores = np.tile(fresh[1], 4)[:400] + np.linspace(0, 1e-3, 400)
    sure = tiny_detector.with_policy(0.1, "guaranteed")
    assert sure.recalibrated(scores, independent=True).policy.mode == "guaranteed"
    assert sure.recalibrated(scores, independent=False).policy.mode == "average"


def test_the_pictures_that_recalibrate_count_as_seen(detector, fresh):
    scores = fresh[1]
    files = [f"picture {i}".encode() for i in range(len(scores))]
    again = detector.recalibrated(scores, [content_hash(data) for data in files])
    assert all(again.has_seen(data) for data in files)
    assert not detector.has_seen(files[0])
    assert set(detector.seen) < set(again.seen)
    assert len(again.seen) == len(detector.seen) + len(files)


def test_warm_models_rank_as_those_made_anew(detector, fresh):
    images, scores = fresh
    warm = Engine(detector, "cpu", 4)
    warm.warm()
    again = warm.ranked_as(detector.recalibrated(scores[:60]))
    expected = detector.recalibrated(scores[:60]).judge(images[60:64])
    judged = again.judge(images[60:64])
    assert (judged.p_value, judged.outlier, judged.version) == (
        expected.p_value,
        expected.outlier,
        expected.version,
    )
    assert warm.judge(images[:1]).version == detector.version

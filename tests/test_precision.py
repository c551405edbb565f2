"""bfloat16: where it is had, verdicts raise no more false alarms; where it cannot be trusted, it is refused by name."""

import numpy as np
import pytest
import torch
from conftest import TINY

from anomaly_vae import ConfigError, Detector, Engine, precision
from anomaly_vae.calibration import TIE
from anomaly_vae.data import open_pictures
from anomaly_vae.lowering import lowered
from anomaly_vae.member import Batch
from anomaly_vae.networks import ConvSpec
from anomaly_vae.observations import Observation
from anomaly_vae.precision import MOST_MOVED, TIE_LOW
from service.settings import ServiceSettings

SIZES = (1, 3, 16, 40)
COMPANY = 0.005
"""How far a low score may move with its batch, in quartile ranges: a tenth of a tie. A float32 rounding before one to
bfloat16 is enough to move it; measured are 0.0005."""


@pytest.fixture(autouse=True)
def imitated(monkeypatch):
    """bfloat16 can be computed anywhere, only not fast."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)


@pytest.fixture(scope="module")
def images(digits_folder):
    pictures = open_pictures(digits_folder, TINY.data, TINY.image)
    return pictures.images(np.arange(0, len(pictures), 12))


def quartile_range(detector):
    low, high = np.quantile(detector.calibration.scores[0], [0.25, 0.75])
    return high - low


@pytest.mark.parametrize("native", [False, True], ids=["python", "native"])
def test_bfloat16_moves_scores_by_less_than_a_tie_and_no_p_value_down(tiny_detector, images, native):
    engine = Engine(tiny_detector, "cpu", 40, "bfloat16")
    if native:
        engine.warm()
    assert engine.remark is None
    assert engine.detector.calibration.tie == TIE_LOW
    assert tiny_detector.calibration.tie == TIE, "the detector that was handed in is left as it was"
    full, low = tiny_detector.judge(images), engine.judge(images)
    moved = np.abs(np.subtract(full.score, low.score)) / quartile_range(tiny_detector)
    usual = np.array(full.p_value) > 0.05
    assert 0 < moved[usual].max() < TIE_LOW
    assert (np.subtract(low.p_value, full.p_value)[usual] >= 0).all()
    for score, p_value, outlier in zip(low.score, low.p_value, low.outlier, strict=True):
        policy = engine.detector.policy
        assert outlier == (score > policy.threshold) == (p_value <= policy.alpha)


@pytest.mark.parametrize("native", [False, True], ids=["python", "native"])
def test_a_low_score_does_not_depend_on_batch_mates_nor_on_whether_heat_is_wanted(tiny_detector, images, native):
    engine = Engine(tiny_detector, "cpu", 16, "bfloat16")
    if native:
        engine.warm()
    together = np.array(engine.judge(images[:40]).score)
    for size in SIZES:
        apart = [score for batch in torch.split(images[:40], size) for score in engine.judge(batch).score]
        assert np.abs(apart - together).max() <= COMPANY * quartile_range(tiny_detector)
    hot = engine.judge(images[:40], heat=True)
    assert np.abs(hot.score - together).max() <= COMPANY * quartile_range(tiny_detector)
    plain = Engine(tiny_detector, "cpu", 16).judge(images[:40], heat=True)
    np.testing.assert_array_equal(hot.heat, plain.heat)


def test_it_is_refused_by_name_and_auto_says_why_it_stays_in_float32(tiny_bundle, images, monkeypatch):
    def refusal(detector):
        with pytest.raises(ConfigError, match="precision bfloat16: ") as caught:
            Engine(detector, "cpu", precision="bfloat16")
        assert "set precision=float32" in str(caught.value)
        engine = Engine(detector, "cpu", precision="auto")
        assert engine.remark == str(caught.value)
        assert engine.judge(images[:3]).score == detector.judge(images[:3]).score
        return str(caught.value)

    detector = Detector.load(tiny_bundle)
    monkeypatch.setattr(precision, "MOST_MOVED", 1e-9)
    assert "moves the scores of probe images" in refusal(detector)
    monkeypatch.setattr(precision, "MOST_MOVED", MOST_MOVED)
    detector.probes = Batch(images[:3])
    assert "fewer than 8 probe images" in refusal(detector)
    detector.probes = None
    assert "fewer than 8 probe images" in refusal(detector)
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    assert "does not compute it" in refusal(detector)
    with pytest.raises(ConfigError, match="float32, bfloat16, auto"):
        Engine(detector, "cpu", precision="float16")


@pytest.mark.parametrize("network", [
    {"width": 4}, {"width": 4, "norm": "group"}, {"width": 4, "norm": "none"}, {"width": 4, "residual": 1},
    {"width": 4, "skips": True}, {"width": 4, "latent_skips": True}, {"width": 4, "features": 20},
], ids=str)  # fmt: skip
def test_every_network_stays_near_itself_and_exact_where_exactness_is_wanted(network, images):
    spec = TINY.model.model_copy(update={"network": ConvSpec.parse(network)})
    model = spec.build((1, 32, 32), 0).eval()
    low = lowered(model)
    with torch.inference_mode():
        x = torch.nn.functional.interpolate(model.pictures(images[:8]).float(), (32, 32))
        ours, theirs = Observation(low, x), Observation(model, x)
        assert ours.reconstruction.dtype == ours.code.dtype == torch.float32
        gap = (ours.reconstruction - theirs.reconstruction).abs().max()
        assert 0 < gap < 0.05
        np.testing.assert_allclose(ours.exact.reconstruction, theirs.exact.reconstruction, rtol=1e-9)


def test_a_precision_that_is_none_is_named_by_the_settings_of_the_service():
    assert ServiceSettings.load(None, [], {}).precision == "float32"
    with pytest.raises(ConfigError, match="precision"):
        ServiceSettings.load(None, ["precision=float16"], {})

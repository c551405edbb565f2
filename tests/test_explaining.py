"""Explanations: percentiles are ranks among normals, the latents that moved come first, neighbours are the nearest."""

import numpy as np
import pytest
import torch

from anomaly_vae import BundleError, Detector
from anomaly_vae.data import open_pictures
from anomaly_vae.member import Batch
from anomaly_vae.normals import Normals, codes_of
from anomaly_vae.training import train


@pytest.fixture(scope="module")
def opened(digits_folder, tiny_bundle):
    detector = Detector.load(tiny_bundle)
    return open_pictures(digits_folder, detector.spec.data, detector.image)


def pictures(opened, label, count=8):
    return opened.images([i for i, item in enumerate(opened.items) if item.label == label][:count])


def test_percentiles_are_ranks_among_the_normals_that_calibrate(tiny_detector, opened):
    normals = tiny_detector.normals
    assert len(normals.parts) == tiny_detector.calibration.n
    odd = pictures(opened, "7")
    judged = tiny_detector.judge(odd)
    explained = tiny_detector.explain(odd, judged.parts)
    for i, one in enumerate(explained):
        assert set(one["percentiles"]) == set(tiny_detector.spec.parts)
        for column, (name, percentile) in zip(normals.parts.T, one["percentiles"].items(), strict=True):
            assert percentile == pytest.approx(100 * np.mean(column <= judged.parts[name][i]))
    fine = pictures(opened, "good", 60)
    typical = [
        one["percentiles"]["relative_error"] for one in tiny_detector.explain(fine, tiny_detector.judge(fine).parts)
    ]
    assert 30 < np.mean(typical) < 70
    assert np.mean([one["percentiles"]["relative_error"] for one in explained]) > 90


def test_a_normal_is_its_own_nearest_and_goes_by_its_name(tiny_detector, opened):
    names = tiny_detector.normals.names
    keys = {item.key: i for i, item in enumerate(opened.items)}
    chosen = opened.images([keys[name] for name in names[:5]])
    for name, one in zip(names, tiny_detector.explain(chosen, tiny_detector.judge(chosen).parts), strict=False):
        assert one["nearest_normal"]["name"] == name
        assert one["nearest_normal"]["distance"] < 0.01


def test_the_latents_that_moved_come_first():
    rng = np.random.default_rng(0)
    codes = rng.normal(2.0, 0.5, (200, 12)).astype(np.float32)
    codes[:, 3] = 1.0  # it never moves, and tells nothing
    normals = Normals(np.zeros((200, 1), np.float32), codes, tuple(f"{i}.png" for i in range(200)))
    code = codes[7].copy()
    code[5], code[9] = codes[:, 5].mean() + 4.0, codes[:, 9].mean() - 3.0
    found = normals.explanation({"kl": 1.0}, code)
    first, second = found["latents"][:2]
    assert (first["index"], second["index"]) == (5, 9)
    assert first["deviations"] == pytest.approx(4.0 / codes[:, 5].std(), rel=1e-4)
    assert second["deviations"] < -5
    assert all(np.isfinite(one["deviations"]) for one in found["latents"])
    assert found["percentiles"] == {"kl": 100.0}


def test_it_survives_the_disk_and_other_policies_and_calibrations(tiny_detector, opened, tmp_path):
    tiny_detector.save(tmp_path / "b")
    images = pictures(opened, "5")
    parts = tiny_detector.judge(images).parts
    expected = tiny_detector.explain(images, parts)
    scores = tiny_detector.calibration.scores[0]
    for other in (Detector.load(tmp_path / "b"), tiny_detector.with_policy(0.2), tiny_detector.recalibrated(scores)):
        assert other.explain(images, parts) == expected


def test_an_old_bundle_says_that_it_cannot(tiny_detector, opened):
    tiny_detector.normals = None
    with pytest.raises(BundleError, match="train it again"):
        tiny_detector.explain(pictures(opened, "5"), {})


@pytest.mark.parametrize("overrides", [
    ["calibration.few_normals=2000", "calibration.folds=2"],
    ["image={height: 16, width: 32, channels: 1}", "tiles={side: 16}"],
], ids=["folds", "tiles"])  # fmt: skip
def test_folds_and_tiles(digits_folder, tiny_spec, tmp_path, overrides):
    spec = tiny_spec.with_overrides(["training.steps=5", *overrides])
    detector = train(spec, digits_folder, tmp_path / "b", device="cpu").detector
    image = detector.image
    images = torch.zeros((2, 1, image.height, image.width), dtype=torch.uint8)
    found = detector.explain(images, detector.judge(images).parts)
    assert set(found[0]["percentiles"]) == set(spec.parts)
    if spec.tiles:
        assert found[0]["latents"] == []
        assert found[0]["nearest_normal"] is None
    else:
        codes = codes_of(detector.members[0], Batch(images))
        assert len(found[0]["latents"]) == min(5, codes.shape[1])


def test_a_normals_id_is_stable_and_tells_no_name():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(50, 4)).astype(np.float32)
    names = tuple(f"{i:04}.png" for i in range(50))
    ids = [Normals(np.zeros((50, 1), np.float32), codes, names)._id_of(i) for i in range(50)]
    assert len(set(ids)) == 50
    again = Normals.unpacked(Normals(np.zeros((50, 1), np.float32), codes, names).packed())
    assert again.explanation({"kl": 0.0}, codes[7])["nearest_normal"] == {
        "id": ids[7],
        "name": "0007.png",
        "distance": 0.0,
    }
    # Of other codes the same names have other ids, so that guessing names proves nothing.
    other = Normals(np.zeros((50, 1), np.float32), codes + 1, names)
    assert not {other._id_of(i) for i in range(50)} & set(ids)

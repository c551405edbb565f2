"""One picture, one score: alone, in a batch, saved and loaded. And bundles that refuse to lie."""

import numpy as np
import pytest
import torch
import yaml

from anomaly_vae import BundleError, CalibrationError, Detector, Engine
from anomaly_vae.bundle import Bundle, read_bundle, write_bundle
from anomaly_vae.data import open_pictures
from anomaly_vae.evaluation import evaluate
from anomaly_vae.member import Batch

TOLERANCE = 1e-5
"""Of the calibration scores' quartile range: what a float32 score may move with its company."""


@pytest.fixture(scope="module")
def images(digits_folder, tiny_spec):
    pictures = open_pictures(digits_folder, tiny_spec.data, tiny_spec.image)
    return pictures.images(np.arange(0, len(pictures), 40))


def quartile_range(detector):
    low, high = np.quantile(np.concatenate(detector.calibration.scores), [0.25, 0.75])
    return high - low


def test_scores_do_not_depend_on_batch_mates(tiny_detector, images):
    together = tiny_detector.judge(images)
    scale = quartile_range(tiny_detector)
    for size in (1, 3, 16):
        apart = [s for batch in images.split(size) for s in tiny_detector.judge(batch).score]
        assert np.abs(np.array(apart) - together.score).max() <= TOLERANCE * scale
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    again = np.array(tiny_detector.judge(images[shuffled]).score)
    assert np.abs(again - np.array(together.score)[shuffled]).max() <= TOLERANCE * scale


@pytest.mark.parametrize("max_batch", [1, 5, 32])
def test_engine_scores_as_the_detector_does(tiny_bundle, images, max_batch):
    detector = Detector.load(tiny_bundle)
    plain = detector.judge(images, heat=True)
    engine = Engine(Detector.load(tiny_bundle), "cpu", max_batch)
    engine.warm()
    judged = engine.judge(images, heat=True)
    assert np.abs(np.array(judged.score) - plain.score).max() <= TOLERANCE * quartile_range(detector)
    assert judged.p_value == plain.p_value
    np.testing.assert_allclose(judged.heat, plain.heat, rtol=1e-3, atol=1e-4)
    assert len(judged) == len(images)
    assert set(judged.row(0)["parts"]) == set(detector.spec.parts)


def test_verdict_p_value_and_threshold_agree(tiny_detector, images):
    judged = tiny_detector.judge(images)
    assert 0 < sum(judged.outlier) < len(images)
    for score, p_value, outlier in zip(judged.score, judged.p_value, judged.outlier, strict=True):
        assert outlier == (score > tiny_detector.policy.threshold) == (p_value <= tiny_detector.policy.alpha)


def test_calibration_scores_come_from_judging(tiny_detector, tiny_bundle, tiny_spec, digits_folder):
    """A calibration image judged by the loaded bundle has the score that calibration ranked."""
    from anomaly_vae.dividing import divide

    pictures = open_pictures(digits_folder, tiny_spec.data, tiny_spec.image)
    (part,), crossed = divide(tiny_spec, pictures)
    assert not crossed
    again = np.sort(tiny_detector.judge(pictures.images(part.calibrate)).score)
    np.testing.assert_allclose(
        again, tiny_detector.calibration.scores[0], atol=TOLERANCE * quartile_range(tiny_detector)
    )


def test_saved_and_loaded_twice_is_bit_for_bit_the_same(tiny_detector, tiny_bundle, images, tmp_path):
    probes = Batch(images[:4])
    saved = tiny_detector.save(tmp_path / "copy", probes)
    loaded = Detector.load(tmp_path / "copy")
    assert loaded.version == saved.version
    assert loaded.judge(images).score == tiny_detector.judge(images).score
    assert loaded.spec == tiny_detector.spec
    np.testing.assert_array_equal(loaded.seen, tiny_detector.seen)
    again = loaded.save(tmp_path / "again", probes)
    assert again.version == saved.version


def test_another_alpha_is_another_threshold_and_an_impossible_one_is_refused(tiny_detector):
    strict, lax = tiny_detector.with_policy(0.02), tiny_detector.with_policy(0.2)
    assert strict.policy.threshold > lax.policy.threshold
    with pytest.raises(CalibrationError, match="needs 9999 calibration images"):
        tiny_detector.with_policy(0.0001)
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        tiny_detector.with_policy(0.0)


def test_heat_of_normals_is_mostly_below_one_and_a_defect_shows_where_it_is(tiny_detector, digits_folder, tiny_spec):
    pictures = open_pictures(digits_folder, tiny_spec.data, tiny_spec.image)
    normal = [i for i, item in enumerate(pictures.items) if item.normal][:40]
    images = pictures.images(normal)
    heat = tiny_detector.judge(images, heat=True).heat
    assert np.mean(heat > 1) < 0.02
    marked = images.clone()
    marked[:, :, 10:14, 0:4] = 255
    assert np.mean(tiny_detector.judge(marked).score) > np.mean(tiny_detector.judge(images).score)
    hot = tiny_detector.judge(marked, heat=True).heat.reshape(len(normal), -1).argmax(1)
    rows, columns = np.divmod(hot, 16)
    assert np.mean((rows >= 9) & (rows < 15) & (columns < 5)) > 0.8


def corrupt(path, name, change):
    data = bytearray((path / name).read_bytes())
    change(data)
    (path / name).write_bytes(data)


@pytest.fixture
def copy(tiny_detector, images, tmp_path):
    tiny_detector.save(tmp_path / "copy", Batch(images[:4]))
    return tmp_path / "copy"


@pytest.mark.parametrize("name", ["weights.safetensors", "reference.safetensors", "probes.safetensors"])
def test_a_flipped_bit_is_noticed(copy, name):
    corrupt(copy, name, lambda data: data.__setitem__(-1, data[-1] ^ 1))
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        Detector.load(copy)


def test_an_edited_description_is_noticed(copy):
    text = (copy / "bundle.yaml").read_text()
    (copy / "bundle.yaml").write_text(text.replace("alpha: 0.01", "alpha: 0.5"))
    assert text != (copy / "bundle.yaml").read_text()
    with pytest.raises(BundleError, match="changed after training"):
        Detector.load(copy)


@pytest.mark.parametrize("text", ["08", "1e3", "37e1755990159479", "1_000", "0x1f", "true", "2020-01-01", "ab: [c"])
def test_a_description_is_read_back_as_it_was_written(tmp_path, text):
    """YAML's readers disagree on which words are numbers; a bundle must not depend on it."""
    write_bundle(tmp_path / "b", Bundle({"word": text, "list": [text]}, {"data.safetensors": b"x"}, {}))
    assert read_bundle(tmp_path / "b").description == {"word": text, "list": [text]}


@pytest.mark.parametrize("change", [
    {"members": 0}, {"members": 2}, {"members": "x"}, {"alpha": "x"}, {"alpha": 2}, {"mode": "x"}, {"groups": -5},
    {"spec": {"image": None}}, {"spec": {"image": {"height": 512, "width": 512, "channels": 3}}},
    {"spec": {"model": {"latent": {"size": 4096}}}}, {"spec": 3}, {"torch": None}, {"surprise": 1},
], ids=str)  # fmt: skip
def test_a_bundle_that_contradicts_itself_is_refused_in_one_line(tiny_bundle, tmp_path, change):
    """Hashes tell damage from health, not sense from nonsense: these are rewritten consistently."""
    bundle = read_bundle(tiny_bundle)
    description = bundle.description | change
    if isinstance(change.get("spec"), dict):
        description["spec"] = bundle.description["spec"] | change["spec"]
    write_bundle(tmp_path / "odd", Bundle(description, bundle.files, {}))
    with pytest.raises(BundleError) as caught:
        Detector.load(tmp_path / "odd")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("manifest", [
    b"\0", b"format: -3\n", b"format: 1\nfiles: 3\ndescription: {}\n", b"format: 1\nfiles: {1: 2}\ndescription: {}\n",
    b"[" * 5000, b"a: &a [x]\nb: *a\n", b"x: " + b"y" * 2**21,
], ids=lambda manifest: repr(manifest[:12]))  # fmt: skip
def test_a_damaged_manifest_is_a_bundle_error(copy, manifest):
    (copy / "bundle.yaml").write_bytes(manifest)
    with pytest.raises(BundleError, match="damaged"):
        Detector.load(copy)


def test_a_link_in_a_bundle_is_not_followed(copy, tmp_path):
    (copy / "weights.safetensors").rename(tmp_path / "elsewhere")
    (copy / "weights.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="no plain file"):
        Detector.load(copy)


def test_a_newer_format_is_refused_by_name(copy):
    manifest = yaml.safe_load((copy / "bundle.yaml").read_text())
    (copy / "bundle.yaml").write_text(yaml.safe_dump(manifest | {"format": 99}))
    with pytest.raises(BundleError, match="format 99"):
        Detector.load(copy)


def test_a_file_name_that_leaves_the_bundle_is_refused(copy):
    manifest = yaml.safe_load((copy / "bundle.yaml").read_text())
    manifest["files"] = {"../weights.safetensors": manifest["files"]["weights.safetensors"]}
    (copy / "bundle.yaml").write_text(yaml.safe_dump(manifest))
    with pytest.raises(BundleError, match="outside the bundle"):
        Detector.load(copy)


@pytest.mark.parametrize("name", ["weights.safetensors", "bundle.yaml"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name):
        Detector.load(copy)


def test_probes_that_score_differently_are_refused(tiny_bundle, tmp_path):
    """A device (or torch) that computes something else must not pass; here the probes' stored scores are others."""
    import safetensors.numpy

    bundle = read_bundle(tiny_bundle)
    probes = safetensors.numpy.load(bundle.files["probes.safetensors"])
    probes["scores"] = probes["scores"] + 0.1
    files = bundle.files | {"probes.safetensors": safetensors.numpy.save(probes)}
    write_bundle(tmp_path / "other", Bundle(bundle.description, files, {}))
    with pytest.raises(BundleError, match="scores its own probe images differently"):
        Detector.load(tmp_path / "other")


def test_nothing_is_replaced_unless_told(copy, tiny_detector, tmp_path):
    with pytest.raises(BundleError, match="--overwrite"):
        tiny_detector.save(copy)
    tiny_detector.save(copy, replace=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(BundleError, match="is no bundle"):
        tiny_detector.save(tmp_path / "mine", replace=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "mine"]


def test_evaluation_leaves_out_what_was_seen_wherever_it_lies(tiny_bundle, digits_folder, tmp_path):
    engine = Engine(Detector.load(tiny_bundle), "cpu")
    evaluation = evaluate(engine, digits_folder)
    assert evaluation.quality.auroc > 0.9
    assert evaluation.excluded + evaluation.n_normal == 720
    assert evaluation.n_normal == 144
    assert evaluation.false_alarms == sum(
        engine.judge(picture[None]).outlier[0] for picture in unseen_normals(engine.detector, digits_folder)
    )
    moved = tmp_path / "renamed"
    moved.mkdir()
    for i, path in enumerate(sorted((digits_folder / "good").iterdir())):
        (moved / f"x{i}.png").write_bytes(path.read_bytes())
    assert evaluate(engine, moved).n_normal == 144


def unseen_normals(detector, folder):
    pictures = open_pictures(folder, detector.spec.data, detector.image)
    for i, item in enumerate(pictures.items):
        if item.normal and pictures.fingerprints[i] not in detector.seen:
            yield pictures.images([i])[0]


def test_references_of_few_pictures_do_not_flatter_themselves(tiny_detector, tiny_spec, digits_folder):
    """With 20 fit pictures for 12 latents, unseen normals must still lie around z = 0 on every fused scale."""
    from anomaly_vae.fusion import standardise
    from anomaly_vae.member import Member

    pictures = open_pictures(digits_folder, tiny_spec.data, tiny_spec.image)
    normal = [i for i, item in enumerate(pictures.items) if item.normal]
    few, others = pictures.images(normal[:20]), pictures.images(normal[20:220])
    member = Member.fit(tiny_spec, {"": [tiny_detector.members[0].model]}, lambda: map(Batch, few.split(8)))
    detector = Detector(tiny_spec, [member], tiny_detector.calibration)
    for kind in tiny_spec.fused:
        z = standardise(np.log(detector.judge(others).parts[kind]), member.experts[""][0].references.scales[kind])
        assert abs(np.median(z)) < 1.2, kind

"""An exported graph judges as its bundle does, or there is none."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
import torch
from conftest import ROOT, TINY, write_digits
from forked import command
from PIL import Image
from test_compiled import NARROW, SMALL, made, quartile_range, with_score
from test_scores import KINDS

from anomaly_vae import ConfigError, Detector, DetectorSpec, bundle, exporting
from anomaly_vae.bundle import read_bundle, write_bundle
from anomaly_vae.calibration import Calibration
from anomaly_vae.compiled import examples
from anomaly_vae.data import open_pictures
from anomaly_vae.exportable import Judging
from anomaly_vae.exporting import ExportError, export
from anomaly_vae.onnx_operators import Expressible
from anomaly_vae.presets import preset_names, read_preset

UNTRAINED = 0.01
"""Quartile ranges that a score of an untrained model may move: one that says nearly the same of all pictures has a
quartile range of not much more than float32's rounding."""
NAMES = ["score", "p_value", "outlier", "parts", "heat"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = write_digits(tmp_path_factory.mktemp("few"), normal="0123456789", count=100)
    return open_pictures(folder, TINY.data, TINY.image).images(np.arange(100))


@pytest.fixture(scope="module")
def tiny_graph(tiny_bundle, tmp_path_factory):
    """The tiny bundle, exported."""
    place = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    export(tiny_bundle, out=place)
    return place


def saved(detector: Detector, folder: Path) -> Path:
    detector.save(folder / "b", detector.probes)
    return folder / "b"


def drawn(detector: Detector, folder: Path) -> Path:
    """The graph of a detector that was never on disk: of an untrained one, even loading may move scores too far."""
    data = exporting._graph(detector, UNTRAINED)
    exporting.check(detector, detector._probe_scores(detector.probes), data, UNTRAINED)
    (folder / "b.onnx").write_bytes(data)
    return folder / "b.onnx"


def opened(place: Path) -> onnxruntime.InferenceSession:
    """onnxruntime takes longer to open a graph than to judge by it: whoever judges often opens once."""
    return onnxruntime.InferenceSession(place, providers=["CPUExecutionProvider"])


def judged(session: onnxruntime.InferenceSession, images: np.ndarray, **given) -> dict[str, np.ndarray]:
    return dict(zip(NAMES, session.run(None, {"images": images, **given}), strict=True))


def assert_same(session, detector, images, tolerance):
    found, expected = judged(session, images.numpy()), detector.judge(images, heat=True)
    assert np.abs(found["score"] - expected.score).max() <= tolerance * quartile_range(detector)
    np.testing.assert_array_equal(found["p_value"], expected.p_value)
    np.testing.assert_array_equal(found["outlier"], expected.outlier)
    for i, (name, column) in enumerate(expected.parts.items()):
        scale = float(np.abs(column).max())
        np.testing.assert_allclose(found["parts"][:, i], column, rtol=1e-4, atol=1e-5 * scale + 1e-6, err_msg=name)
    np.testing.assert_allclose(found["heat"], expected.heat, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in preset_names() if name != "hyperspherical-vae"])
def test_every_preset_judges_alike(name, digits, tmp_path):
    detector = made(read_preset(name, [*SMALL, *NARROW.get(name, [])]), digits)
    session = opened(drawn(detector, tmp_path))
    for count in (1, 2, 17):
        assert_same(session, detector, detector.probes.images[:count], UNTRAINED)


def test_a_code_on_a_sphere_is_refused_by_name(digits, tmp_path):
    path = saved(made(read_preset("hyperspherical-vae", SMALL), digits), tmp_path)
    with pytest.raises(ConfigError, match=r"sphere .*latent\.kind=gaussian"):
        export(path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_score_is_exported_or_refused_by_name(kind, digits, tmp_path):
    detector = made(with_score(kind), digits)
    if kind in exporting._REFUSED:
        path = saved(detector, tmp_path)
        with pytest.raises(ConfigError, match=f"score {kind} cannot be exported: .*; remove it from scores"):
            export(path)
        assert not (tmp_path / "b.onnx").exists()
        return
    assert_same(opened(drawn(detector, tmp_path)), detector, detector.probes.images[:5], UNTRAINED)


def test_a_trained_bundle_is_exported_within_the_stated_tolerance(tiny_bundle, tiny_detector, tiny_graph, digits):
    session = opened(tiny_graph)
    assert_same(session, tiny_detector, digits[:40], 1e-4)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["anomaly_vae"])
    assert facts["version"] == tiny_detector.version
    assert facts["parts"] == list(tiny_detector.spec.parts)
    assert facts["alpha"] == tiny_detector.policy.alpha
    assert facts["image"]["height"] == 16


def test_a_score_depends_on_no_batch_mates(tiny_graph, tiny_detector, digits):
    session = opened(tiny_graph)
    together, scale = judged(session, digits[:33].numpy()), quartile_range(tiny_detector)
    for i in range(0, 33, 4):
        alone = judged(session, digits[i : i + 1].numpy())
        assert abs(alone["score"][0] - together["score"][i]) <= 1e-4 * scale
        assert alone["p_value"][0] == together["p_value"][i]


def test_heat_is_left_out_where_nobody_wants_it(tiny_graph, digits):
    session, few = opened(tiny_graph), digits[:3].numpy()
    hot, cold = (judged(session, few, want_heat=np.array(wanted)) for wanted in (True, False))
    assert hot["heat"].shape == (3, 16, 16)
    assert cold["heat"].shape == (0, 0, 0)
    np.testing.assert_array_equal(hot["score"], cold["score"])


def test_ranks_and_ties_are_those_of_the_calibration(tiny_detector):
    ranks = Judging(tiny_detector)._ranks
    scores = tiny_detector.calibration.scores[0]
    near = scores + 0.5 * tiny_detector.calibration.ties[0]
    tried = np.concatenate([scores, near, scores - 1e-3, [-1e9, 1e9, np.nan]])
    p_values, outliers = ranks(torch.from_numpy(tried)[:, None])
    expected = tiny_detector.calibration.p_values(tried)
    np.testing.assert_array_equal(p_values.numpy(), expected)
    policy = tiny_detector.policy
    np.testing.assert_array_equal(
        outliers.numpy(), tiny_detector.calibration.outliers(expected, policy.alpha, policy.mode)
    )


def test_folds_are_ranked_member_by_member(digits, tmp_path):
    spec = DetectorSpec.parse({**TINY.model_dump(mode="json", exclude={"scores"}), "ensemble": 2})
    first, second = made(spec, digits), made(spec, digits.flip(0))
    detector = Detector(spec, [*first.members, *second.members],
                        Calibration.of([*first.calibration.scores, *second.calibration.scores]))  # fmt: skip
    detector.probes = first.probes
    assert_same(opened(drawn(detector, tmp_path)), detector, digits[:20], UNTRAINED)


@pytest.mark.parametrize("more", [{}, {"region": {"polygon": [[0.1, 0.1], [0.9, 0.1], [0.5, 0.95]]}}])
def test_tiles_and_regions_are_exported_too(more, digits, tmp_path):
    given = {**TINY.model_dump(mode="json", exclude={"scores"}), "image": {"height": 32, "width": 48, "channels": 1}}
    spec = DetectorSpec.parse({**given, "tiles": {"side": 16}, **more})
    if spec.region is not None:
        spec = spec.model_copy(update={"image": spec.region.within(spec.image), "region": None})
    sized = torch.nn.functional.interpolate(digits.float(), (32, 48), mode="bilinear").byte()
    detector = made(spec, sized)
    session = opened(drawn(detector, tmp_path))
    assert_same(session, detector, sized[:5], UNTRAINED)
    if more:
        assert (judged(session, sized[:1].numpy())["heat"][0] == 0).any()


def test_what_onnx_cannot_say_is_said_otherwise_to_within_rounding(digits):
    """The stand-ins themselves, without any graph."""
    detector = made(read_preset("default", [*SMALL, *NARROW["default"]]), digits)
    images = examples(detector, 5)
    with torch.no_grad():
        plain = Judging(detector).eval()(images)
        with Expressible():
            other = Judging(detector).eval()(images)
    for name, ours, theirs in zip(NAMES, plain, other, strict=True):
        np.testing.assert_allclose(theirs.double(), ours.double(), rtol=1e-4, atol=1e-4, err_msg=name)


def with_stored_scores(path: Path, place: Path, moved: float) -> Path:
    """A copy of a bundle whose probes have other scores, with hashes to match."""
    read = read_bundle(path)
    probes = safetensors.numpy.load(read.files["probes.safetensors"])
    probes["scores"] = probes["scores"] + moved
    files = {**read.files, "probes.safetensors": safetensors.numpy.save(probes)}
    write_bundle(place, replace(read, files=files))
    return place


def test_the_command_fails_where_probe_images_score_otherwise(tiny_bundle, tiny_detector, tmp_path):
    """Moved by less than loading allows on another device, but by more than was asked for."""
    other = with_stored_scores(tiny_bundle, tmp_path / "other", 5e-4 * quartile_range(tiny_detector))
    full = [sys.executable, "-m", "anomaly_vae", "export", other, "--to", "onnx", "--tolerance", "0.0002"]
    done = subprocess.run(full, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the exported graph moves scores of the bundle's probe images by 0.0005")
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    assert command("export", other, "--to", "onnx").returncode == 0
    assert (tmp_path / "other.onnx").is_file()


def test_the_command_fails_where_stored_scores_are_others_altogether(tiny_bundle, tiny_detector, tmp_path):
    other = with_stored_scores(tiny_bundle, tmp_path / "other", quartile_range(tiny_detector))
    done = command("export", other)
    assert done.returncode == 2
    assert "scores its own probe images differently" in done.stderr
    assert not (tmp_path / "other.onnx").exists()


BROKEN = {
    "scores": ("score", "Mul", 1.01, "moves scores"),
    "p-values": ("p_value", "Mul", 0.99, "other p-values"),
    "parts": ("parts", "Mul", 1.01, "the part"),
    "heat": ("heat", "Mul", 1.01, "heat maps"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_graph_is_not_written(what, tiny_bundle, tmp_path, monkeypatch):
    """Each output by itself, moved behind the product's back."""
    output, operator, factor, told = BROKEN[what]
    right = exporting._graph

    def wrong(detector, tolerance):
        model = onnx.load_from_string(right(detector, tolerance))
        for node in model.graph.node:
            node.output[:] = [f"{name}.right" if name == output else name for name in node.output]
            node.input[:] = [f"{name}.right" if name == output else name for name in node.input]
        kind = np.float32 if output == "heat" else np.float64
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor, kind), "factor"))
        model.graph.node.append(onnx.helper.make_node(operator, [f"{output}.right", "factor"], [output]))
        return model.SerializeToString()

    monkeypatch.setattr(exporting, "_graph", wrong)
    with pytest.raises(ExportError, match=told):
        export(tiny_bundle, out=tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_write_that_failed(tiny_bundle, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle.os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        export(tiny_bundle, out=tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_mistakes_get_one_line_with_the_remedy(tiny_bundle, tmp_path, digits, monkeypatch):
    with pytest.raises(ConfigError, match="use --to onnx"):
        export(tiny_bundle, "tflite")
    with pytest.raises(ConfigError, match="give --out the name of a file"):
        export(tiny_bundle, out=tmp_path / "no" / "x.onnx")
    (tmp_path / "x.onnx").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        export(tiny_bundle, out=tmp_path / "x.onnx")
    assert (tmp_path / "x.onnx").read_bytes() == b"mine"
    told = ['model.condition.classes=["a", "b"]', "model.condition.scoring=given"]
    given = read_preset("conditional-vae", [*SMALL, *told])
    with pytest.raises(ConfigError, match="scoring=marginalised"):
        export(saved(made(given, digits), tmp_path))
    bare = made(with_score("squared_error"), digits)
    bare.probes = None
    bare.save(tmp_path / "bare")
    with pytest.raises(ConfigError, match="probes: 32"):
        export(tmp_path / "bare")
    monkeypatch.setattr(exporting, "_MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="an ONNX file 2 at most"):
        export(tiny_bundle, out=tmp_path / "y.onnx")
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'anomaly-vae\[onnx\]'"):
        export(tiny_bundle, out=tmp_path / "y.onnx")


BLOCKED = """
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "anomaly_vae", "service", "scipy", "sklearn", "simplejpeg"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def example(place: Path, pictures: list[Path], folder: Path) -> list[dict]:
    """What the example says of pictures where neither torch nor this package can be imported."""
    script = folder / "onnx_scoring.py"
    shutil.copy(ROOT / "examples" / "onnx_scoring.py", script)
    full = [sys.executable, "-I", "-c", BLOCKED, str(script), str(place), *map(str, pictures)]
    done = subprocess.run(full, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_example_agrees(place, detector, pictures, folder):
    rows, unit = example(place, pictures, folder), quartile_range(detector)
    for row, path in zip(rows, pictures, strict=True):
        expected = detector.judge(detector.prepare(path.read_bytes())[None]).row(0)
        assert abs(row["score"] - expected["score"]) <= 1e-3 * max(unit, abs(expected["score"])), path
        assert row["outlier"] == expected["outlier"], path
        assert abs(row["p_value"] - expected["p_value"]) <= 1.5 / (detector.calibration.n + 1), path
        assert set(row["parts"]) == set(expected["parts"])


def test_the_example_scores_files_without_torch_and_without_this_package(tiny_graph, tiny_detector, digits, tmp_path):
    pictures = []
    for i, (width, height, mode, suffix) in enumerate([
        (16, 16, "L", "png"), (61, 47, "L", "png"), (200, 150, "RGB", "png"), (333, 512, "RGB", "jpg"),
        (800, 603, "L", "jpg"), (40, 30, "RGBA", "png"), (50, 70, "RGB", "webp"), (90, 80, "P", "gif"),
    ]):  # fmt: skip
        picture = Image.fromarray(digits[i, 0].numpy()).resize((width, height), Image.Resampling.BICUBIC)
        pictures.append(tmp_path / f"{i}.{suffix}")
        picture.convert(mode).save(pictures[-1])
    deep = np.asarray(Image.fromarray(digits[9, 0].numpy()).resize((64, 64))).astype(np.uint16) * 257
    pictures.append(tmp_path / "deep.png")
    Image.fromarray(deep).save(pictures[-1])
    assert_example_agrees(tiny_graph, tiny_detector, pictures, tmp_path)


def test_a_turned_photograph_is_scored_upright(tiny_graph, tiny_detector, digits, tmp_path):
    pictures = []
    for orientation in range(1, 9):
        picture = Image.fromarray(digits[3, 0].numpy()).resize((300, 200), Image.Resampling.BICUBIC).convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = orientation
        pictures.append(tmp_path / f"{orientation}.jpg")
        picture.save(pictures[-1], exif=exif)
    rows, unit = example(tiny_graph, pictures, tmp_path), quartile_range(tiny_detector)
    for row, path in zip(rows, pictures, strict=True):
        expected = tiny_detector.judge(tiny_detector.prepare(path.read_bytes())[None]).score[0]
        # A turned picture is resized along its other side first: some pixels differ by one grey level.
        assert abs(row["score"] - expected) <= 0.05 * unit


KEPT = (("piped", "*.png"), ("faces_london", "*.jpg"))


def test_the_example_agrees_on_real_pictures(tiny_graph, tiny_detector, real_images, tmp_path):
    parts, faces = (sorted((real_images / name).rglob(kind))[:3] for name, kind in KEPT)
    assert parts
    assert faces
    found = [*parts, *faces]
    assert_example_agrees(tiny_graph, tiny_detector, found, tmp_path)

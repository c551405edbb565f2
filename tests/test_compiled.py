"""Scores by a native call are those that Python gives; where a recording would give others, Python goes on."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, write_digits
from test_scores import KINDS

from anomaly_vae import Detector, DetectorSpec, Engine
from anomaly_vae.calibration import Calibration
from anomaly_vae.compiled import AT_ONCE, examples, recorded
from anomaly_vae.data import open_pictures
from anomaly_vae.member import Batch, Member, member_scores
from anomaly_vae.presets import preset_names, read_preset
from anomaly_vae.scores import SquaredError

TOLERANCE = 1e-5
"""Of the calibration scores' quartile range, as for float32 anywhere."""

NARROW = {
    "default": ["image={height: 48, width: 48, channels: 3}"],  # smaller ones leave the second kind of models out
    "dfc-vae": ["model.network.channels=[8,16]"],
    "lecture-conv": ["model.network.channels=[8,16,16]"],
    "lecture-cifar": ["model.network.channels=[8,16]"],
    "conditional-vae": ['model.condition.classes=["a", "b"]'],
    "conditional-dcgan": ['model.condition.classes=["a", "b"]'],
}
SMALL = ["image={height: 16, width: 16, channels: 1}"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = write_digits(tmp_path_factory.mktemp("few"), normal="0123456789", count=100)
    pictures = open_pictures(folder, TINY.data, TINY.image)
    return pictures.images(np.arange(100))


def made(spec: DetectorSpec, digits: torch.Tensor) -> Detector:
    """A detector of untrained models that know normals all the same."""
    shape = (spec.image.channels, spec.image.height, spec.image.width)
    sized = torch.nn.functional.interpolate(digits.float(), shape[1:], mode="bilinear").byte()
    images = sized.expand(-1, shape[0], -1, -1)
    numbers = (
        torch.arange(len(images)) % 2 if spec.model.condition and spec.model.condition.scoring == "given" else None
    )
    models = {name: [own.model.build(spec.shape, i) for i in range(own.ensemble)] for name, own in spec.experts.items()}

    def batches(start, end):
        return lambda: iter([Batch(images[start:end], None if numbers is None else numbers[start:end])])

    member = Member.fit(spec, models, batches(0, 40))
    scores = [member_scores(spec, member, batches(40, 80)())]
    detector = Detector(spec, [member], Calibration.of(scores))
    detector.probes = Batch(images[80:], None if numbers is None else numbers[80:])
    return detector


def quartile_range(detector: Detector) -> float:
    low, high = np.quantile(np.concatenate(detector.calibration.scores), [0.25, 0.75])
    return float(high - low)


def assert_same(detector, native, images):
    # In the same parts: a float32 score moves a little with the size of its batch.
    plain, quick = Engine(detector, "cpu", AT_ONCE).judge(images), native.judge(images)
    assert np.abs(np.subtract(plain.score, quick.score)).max() <= TOLERANCE * quartile_range(detector)
    assert plain.p_value == quick.p_value
    assert plain.outlier == quick.outlier
    for name, column in plain.parts.items():
        np.testing.assert_allclose(quick.parts[name], column, rtol=1e-5, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_scores_alike_by_a_native_call(name, digits):
    detector = made(read_preset(name, [*SMALL, *NARROW.get(name, [])]), digits)
    native = recorded(detector)
    assert all(member.native is not None for member in native.members), "the recording was not trusted"
    pictures = examples(detector, 40)[19:]
    for size in (1, 5, AT_ONCE, 21):
        assert_same(detector, native, pictures[:size])


GRADIENTS = {"gradient", "likelihood_regret", "energy_projection"}
EXACT = {
    "simple_activation_path",
    "normalised_activation_path",
    "encoder_difference",
    "gaussian_mixture",
    "nearest_neighbours",
    "latent_path",
    "unfamiliar_features",
}
"""They copy the model in float64."""
PYTHON_ONLY = {"input_complexity", "inpainting", *GRADIENTS, *EXACT}
"""No recorder can follow these: a codec, a shuffle, gradients and copies of the model."""
BRIEF = {"likelihood_regret": {"steps": 2, "samples": 1}, "energy_projection": {"steps": 2}}


def with_score(kind: str) -> DetectorSpec:
    score = json.dumps({"kind": kind, **BRIEF.get(kind, {})})
    more = ["model.marker={width: 4}", "model.views={width: 4}", f"scores=[{score}]", "fusion={}", "offline=true"]
    more += ["objective.corruption=[{kind: masks}]"]
    return read_preset("vae-gan", [*SMALL, "model.network.width=8", "model.critic.network.width=8", *more])


@pytest.mark.parametrize("kind", KINDS)
def test_every_score_is_that_of_python(kind, digits):
    detector = made(with_score(kind), digits)
    native = recorded(detector)
    assert (native.members[0].native is None) == (kind in PYTHON_ONLY)
    assert_same(detector, native, examples(detector, 40)[19:36])


def test_a_decision_taken_by_the_pictures_is_not_recorded(digits, monkeypatch):
    """The recorder sees one branch and would repeat it for all: bright pictures would get the scores of dark ones."""
    measured = SquaredError.__call__

    def decided(self, seen, references):
        found = measured(self, seen, references)
        return 3 * found if seen.x[0].mean() > 0.6 else found

    detector = made(with_score("squared_error"), digits)
    assert recorded(detector).members[0].native is not None
    monkeypatch.setattr(SquaredError, "__call__", decided)
    detector.probes = Batch(torch.full_like(detector.probes.images, 255))
    assert recorded(detector).members[0].native is None


@pytest.mark.parametrize("scoring", ["given", "marginalised"])
def test_a_class_that_is_told_goes_by_python(scoring, digits):
    overrides = [*SMALL, 'model.condition.classes=["a", "b"]', f"model.condition.scoring={scoring}"]
    detector = made(read_preset("conditional-vae", overrides), digits)
    engine = Engine(detector, "cpu")
    engine.warm()
    assert (engine.detector.members[0].native is None) == (scoring == "given")
    images, classes = detector.probes.images[:AT_ONCE], ["a", "b"] * (AT_ONCE // 2)
    classes = classes if scoring == "given" else None
    assert engine.judge(images, classes=classes).score == pytest.approx(detector.judge(images, classes=classes).score)


def test_a_native_score_is_that_of_the_picture_alone_with_and_without_heat(tiny_detector, digits):
    engine = Engine(tiny_detector, "cpu", AT_ONCE)
    engine.warm()
    assert engine.detector.members[0].native is not None
    assert tiny_detector.members[0].native is None, "the detector that was handed in is left as it was"
    together, scale = engine.judge(digits[:30]), quartile_range(tiny_detector)
    alone = [engine.judge(image[None]).score[0] for image in digits[:30]]
    hot = engine.judge(digits[:30], heat=True)
    for other in (alone, hot.score):
        assert np.abs(np.subtract(together.score, other)).max() <= TOLERANCE * scale
    np.testing.assert_array_equal(hot.heat, Engine(tiny_detector, "cpu", AT_ONCE).judge(digits[:30], heat=True).heat)


def test_tiles_are_scored_by_the_native_call_too(digits):
    detector = made(DetectorSpec.parse({
        **TINY.model_dump(mode="json", exclude={"scores"}),
        "image": {"height": 32, "width": 48, "channels": 1}, "tiles": {"side": 16},
    }), digits)  # fmt: skip
    native = recorded(detector)
    assert native.members[0].native is not None
    assert_same(detector, native, detector.probes.images[:3])


def test_a_recording_plays_in_any_thread(tiny_detector, digits):
    """The thread that made it is not the one that serves, nor the only one."""
    native = recorded(tiny_detector)
    expected = tiny_detector.judge(digits[:8]).score
    found = []
    threads = [threading.Thread(target=lambda: found.append(native.judge(digits[:8]).score)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_a_recording_goes_with_its_weights() -> None:
    """In a process of its own, whose memory nobody else uses."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell a process its memory")
    program = """
import re
from pathlib import Path
import torch
from torch import nn
from anomaly_vae import compiled
from service.memory import release

class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.reference = nn.Parameter(torch.rand(1500, 1500)), torch.rand(1500, 1500)

    def forward(self, images):
        return images.float() @ self.weight @ self.reference

def memory():
    release()
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

pictures = torch.zeros((20, 1500), dtype=torch.uint8)
for round in range(6):
    with torch.inference_mode():
        traced = torch.jit.trace(Large().eval(), (pictures,), check_trace=False)
        playing = compiled._freed(torch.jit.freeze(traced, optimize_numerics=False), traced)
        playing(pictures)
        playing(pictures)
    del playing, traced
    if round == 1:
        before = memory()
print(memory() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    # Four of them, of 17 MiB each.
    assert int(done.stdout) < 20

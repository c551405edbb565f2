"""Conditional detectors: the class is given, or all are tried; verdicts are calibrated for the one that is used."""

import numpy as np
import pytest
import torch
from conftest import write_digits
from forked import command

from anomaly_vae import ConfigError, Detector
from anomaly_vae.data import open_pictures
from anomaly_vae.engine import Engine
from anomaly_vae.evaluation import evaluate
from anomaly_vae.model import normalise
from anomaly_vae.observations import Marginal, Observation, observe
from anomaly_vae.scores import NegativeElbo, SquaredError, measure
from anomaly_vae.training import train

CLASSES = ("0", "1", "2", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("classes"), normal="", count=1200)


def spec_of(tiny_spec, scoring):
    more = ['data.normal=["0", "1", "2", "3"]', "model.condition={size: 4}", f"model.condition.scoring={scoring}"]
    return tiny_spec.with_overrides([*more, "training.steps=300"])


@pytest.fixture(scope="module", params=["marginalised", "given"])
def bundle(request, folder, tiny_spec, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / request.param
    train(spec_of(tiny_spec, request.param), folder, path, device="cpu")
    return path


@pytest.fixture
def normals(folder, bundle):
    detector = Detector.load(bundle)
    pictures = open_pictures(folder, detector.spec.data, detector.image)
    chosen = [i for i, item in enumerate(pictures.items) if item.normal][::9]
    return pictures.images(chosen), [pictures.items[i].label for i in chosen]


def test_false_alarms_are_those_that_were_promised(bundle, folder):
    engine = Engine(Detector.load(bundle), "cpu")
    engine.warm()
    evaluation = evaluate(engine, folder)
    if bundle.name == "given":
        assert evaluation.n_abnormal == 0, "of what class another digit is, nobody can tell"
        assert evaluation.classless > 600
    else:
        assert evaluation.quality.auroc > 0.85
        assert evaluation.classless == 0
    low, high = evaluation.false_alarm_interval
    assert low - 3 <= evaluation.false_alarms <= high + 3


def test_the_class_is_told_or_not_as_it_was_calibrated(bundle, normals):
    detector, (images, labels) = Detector.load(bundle), normals
    if bundle.name == "given":
        with pytest.raises(ConfigError, match=r"must be told the class .*0, 1, 2, 3.*marginalised"):
            detector.judge(images)
        with pytest.raises(ConfigError, match="'9' is not among"):
            detector.judge(images[:1], classes=["9"])
        right = detector.judge(images, classes=labels)
        wrong = detector.judge(images, classes=[CLASSES[(int(label) + 1) % 4] for label in labels])
        assert np.mean(wrong.parts["reconstruction"]) > np.mean(right.parts["reconstruction"])
    else:
        with pytest.raises(ConfigError, match="without"):
            detector.judge(images, classes=labels)
        assert len(detector.judge(images)) == len(images)


def test_marginalising_finds_the_class_and_keeps_the_bound(bundle, normals):
    model, (images, labels) = Detector.load(bundle).members[0].model, normals
    x = normalise(images, torch.device("cpu"))
    with torch.inference_mode():
        seen = observe(model, x)
        assert isinstance(seen, Marginal)
        torch.testing.assert_close(seen.weights.sum(0), torch.ones(len(x), dtype=seen.weights.dtype))
        found = [CLASSES[i] for i in seen.weights.argmax(0)]
        assert np.mean([a == b for a, b in zip(found, labels, strict=True)]) > 0.7
        each = torch.stack([NegativeElbo()(one, {}) for one in seen.of_classes])
        mixed = measure(NegativeElbo(), seen, {})
        # log mean exp lies between the mean and the maximum.
        assert (mixed >= each.min(0).values - 1e-6).all()
        assert (mixed <= each.mean(0) + 1e-6).all()
        errors = torch.stack([SquaredError()(one, {}) for one in seen.of_classes])
        torch.testing.assert_close(measure(SquaredError(), seen, {}), (seen.weights * errors).sum(0))
        told = Observation(model, x, torch.tensor([CLASSES.index(label) for label in labels]))
        assert told.reconstruction.shape == x.shape


def test_batches_do_not_matter(bundle, normals):
    engine, (images, labels) = Engine(Detector.load(bundle), "cpu", 7), normals
    classes = labels if bundle.name == "given" else None
    together = engine.judge(images, classes=classes).score
    alone = [engine.judge(images[i][None], classes=classes and [labels[i]]).score[0] for i in range(5)]
    low, high = np.quantile(engine.detector.calibration.scores[0], [0.25, 0.75])
    assert np.abs(np.subtract(alone, together[:5])).max() < 1e-4 * (high - low)


def test_the_command_line_passes_the_class_on(bundle, folder):
    picture = sorted((folder / "2").iterdir())[0]
    words = ("score", bundle, picture, "--device", "cpu")
    plain, told = command(*words), command(*words, "--class", "2")
    wanted, refused = (told, plain) if bundle.name == "given" else (plain, told)
    assert wanted.returncode == 0, wanted.stderr
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1


def test_one_class_is_none(folder, tiny_spec, tmp_path):
    spec = spec_of(tiny_spec, "given").with_overrides(['data.normal=["0"]'])
    with pytest.raises(ConfigError, match="several classes"):
        train(spec, folder, tmp_path / "b", device="cpu")

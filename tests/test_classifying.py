"""Laws of few labels: what is drawn, that nothing labelled is tested, and the three classifiers themselves."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TINY, write_digits
from forked import command
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

from anomaly_vae import Detector
from anomaly_vae.classifying import (
    METHODS,
    Classifier,
    _codes,
    _hold_statistics,
    _regression,
    _scaling,
    _train,
    classify,
)
from anomaly_vae.console import classes_table
from anomaly_vae.data import open_pictures
from anomaly_vae.engine import Engine
from anomaly_vae.errors import ConfigError, DataError
from anomaly_vae.labelling import Pool, label_counts
from anomaly_vae.model import normalise

SIZES = (70, 20, 7, 3)


def pool_of(sizes=SIZES, *, known=(), unit=None, source=None, tested=None):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.arange(len(labels))
    return Pool(
        tuple("abcdefgh"[: len(sizes)]),
        labels,
        rows if unit is None else np.asarray(unit),
        np.isin(rows, known),
        rows if source is None else np.asarray(source),
        rows if tested is None else np.asarray(tested),
    )


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    return Engine(Detector.load(tiny_bundle), "cpu")


@pytest.fixture(scope="module")
def some(engine, digits_folder):
    """60 pictures of 7 classes, and their classes."""
    pictures = open_pictures(digits_folder, TINY.data, engine.detector.image)
    chosen = np.arange(0, 1797, 30)
    _, labels = np.unique([pictures.items[i].label for i in chosen], return_inverse=True)
    return pictures.images(chosen), torch.from_numpy(labels)


@pytest.mark.parametrize("seed", range(5))
def test_an_order_takes_each_class_once_and_then_in_proportion(seed):
    pool = pool_of()
    order = pool.order(np.random.default_rng(seed))
    assert sorted(order) == list(range(100))
    assert sorted(pool.labels[order[:4]]) == [0, 1, 2, 3]
    for n in range(4, 101):
        counts = np.bincount(pool.labels[order[:n]], minlength=4)
        fair = np.maximum(1, n * np.array(SIZES) / 100)
        assert (np.abs(counts - fair) <= 2).all(), (n, counts)
    assert list(order) != list(pool.order(np.random.default_rng(seed + 1)))


def test_nothing_that_shares_a_unit_with_a_labelled_picture_is_tested():
    unit = np.arange(100) // 2  # pairs that belong together
    pool = pool_of((60, 40), unit=unit)
    for draw in pool.draws([2, 10], range(5), "there"):
        assert len(draw.labelled) == 10
        assert not set(unit[draw.labelled]) & set(unit[draw.test])
        assert set(draw.test) == {i for i in range(100) if unit[i] not in set(unit[draw.labelled])}


def test_what_the_detector_was_made_from_is_not_tested_while_others_remain():
    (draw,) = pool_of((60, 40), known=range(50)).draws([10], [0], "there")
    assert draw.seen == 0
    assert not set(draw.test) & set(range(50))
    (draw,) = pool_of((60, 40), known=range(58)).draws([10], [0], "there")
    assert draw.seen == 58 - sum(draw.labelled < 58)
    assert len(draw.test) == 90


def test_the_largest_count_that_works_is_named_and_works():
    pool = pool_of((30, 9), unit=[*range(30), *(30 + np.arange(9) // 3)])
    with pytest.raises(DataError, match="--labels") as caught:
        pool.draws([39], range(4), "there")
    largest = int(str(caught.value).split("--labels ")[1].split()[0])
    assert all(len(np.unique(pool.labels[draw.test])) == 2 for draw in pool.draws([largest], range(4), "there"))
    with pytest.raises(DataError, match=f"--labels {largest} is"):
        pool.draws([largest + 1], range(4), "there")


@pytest.mark.parametrize(("pool", "counts", "says"), [
    (pool_of((9,)), [2], "one class"),
    (pool_of((9, 9, 9)), [2], "--labels 3"),
    (pool_of((9, 1)), [2], "rarest is 'b'"),
    (pool_of((9, 4), unit=[*range(9), 9, 9, 9, 9]), [2], "rarest is 'b'"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_said(pool, counts, says):
    with pytest.raises(DataError, match=says):
        pool.draws(counts, [0], "there")


@pytest.mark.parametrize("text", ["", "ten", "1", "10,", "-5", ",".join(map(str, range(2, 13)))])
def test_counts_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="10,50,200"):
        label_counts(text)
    assert label_counts("200, 10,50,10") == [10, 50, 200]


def write_listed(folder, test_of):
    """60 pictures in a list, odd ones good, every tenth the same picture; `test_of` says which are the test part."""
    rng = np.random.default_rng(0)
    rows = ["path,label,split"]
    for i in range(60):
        pixels = rng.integers(0, 256, (16, 16), np.uint8) if i % 10 else np.zeros((16, 16), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{'good' if i % 2 else 'bad'},{'test' if test_of(i) else 'train'}")
    manifest = folder / "list.csv"
    manifest.write_text("\n".join(rows))
    return manifest


@pytest.mark.parametrize("whole", [True, False])
def test_an_official_test_part_is_the_test_where_both_parts_have_all_classes(engine, tmp_path, whole):
    # Either half, or a training part of good ones alone.
    manifest = write_listed(tmp_path, (lambda i: i >= 30) if whole else (lambda i: i >= 30 or i % 2 == 0))
    pictures = open_pictures(manifest, TINY.data, engine.detector.image)
    pool = Pool.of(pictures, engine.detector.seen)
    keys = np.array([item.path.stem for item in pictures.items]).astype(int)
    assert pool.classes == ("bad", "good")
    if whole:
        assert (keys[pool.source] < 30).all()
        assert (keys[pool.tested] >= 30).all()
    else:
        assert set(pool.source) == set(pool.tested)
    assert len(np.union1d(pool.source, pool.tested)) == 55  # six of the sixty are one picture


def test_the_frozen_head_is_the_regression(engine, some):
    images, labels = some
    model = engine.detector.members[0].model
    for classes in (2, 7):
        own = labels % classes
        codes = _codes(model, images)
        mean, scale = _scaling(codes)
        z = ((codes - mean) / scale).double().numpy()
        wanted = LogisticRegression(C=0.1, max_iter=1000).fit(z, own).predict_proba(z)
        with torch.no_grad():
            logits = Classifier(model, codes, _regression(codes, own, classes))(normalise(images, engine.device))
        np.testing.assert_allclose(logits.softmax(1).numpy(), wanted, atol=1e-4)


def test_training_moves_all_weights_but_no_statistics_nor_the_bundle_s_model(engine, some):
    images, labels = some
    detector = engine.detector
    model = detector.spec.model.build(detector.members[0].model.shape, 0).eval()
    codes = _codes(model, images)
    classifier = Classifier(model, codes, _regression(codes, labels, 7))
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    chance = torch.get_rng_state()
    _train(classifier, images, labels, 20, seed=0)
    moved = {name for name, value in classifier.state_dict().items() if not torch.equal(value, before[name])}
    learned = {f"model.encoder.{name}" for name, _ in model.encoder.named_parameters()} | {"head.weight", "head.bias"}
    assert moved == learned
    assert torch.equal(torch.get_rng_state(), chance)
    assert not classifier.training


def test_dropout_stays_on_while_statistics_are_held():
    network = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.Dropout(), nn.GroupNorm(1, 3)).train()
    _hold_statistics(network)
    assert [part.training for part in network] == [False, False, True, True]


def test_training_overfits_its_labels(engine, some):
    images, labels = some
    model = engine.detector.spec.model.build(engine.detector.members[0].model.shape, 1).eval()
    codes = _codes(model, images)
    classifier = Classifier(model, codes, nn.Linear(codes.shape[1], 7))
    _train(classifier, images, labels, 300, seed=0)
    with torch.no_grad():
        assert (classifier(normalise(images, engine.device)).argmax(1) == labels).float().mean() > 0.95


def test_classes_are_told_apart_and_the_bundle_stays_as_it_was(engine, digits_folder):
    weights = engine.detector.members[0].model.state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    done = classify(engine, digits_folder, counts=[10, 100], draws=2, steps=60)
    assert all(
        torch.equal(value, before[name]) for name, value in engine.detector.members[0].model.state_dict().items()
    )
    assert [(row.labels, row.method) for row in done.rows] == [(n, method) for n in (10, 100) for method in METHODS]
    assert done.classes == ("4", "5", "6", "7", "8", "9", "good")
    assert done.seen == (0, 0)
    assert all(1221 - 100 <= n < 1221 for n in done.tested)  # 576 of 1,797 were used for the detector
    means = {(row.labels, row.method): row.mean for row in done.rows}
    for method in METHODS:
        assert means[100, method] > means[10, method]
    for method in ("frozen", "fine-tuned"):
        assert means[100, method] > done.majority + 0.3
    again = classify(engine, digits_folder, counts=[10, 100], draws=2, steps=60)
    assert again == done
    other = classify(engine, digits_folder, counts=[10], draws=2, steps=1, seed=1)
    assert other.rows[0].accuracies != done.rows[0].accuracies
    facts = json.loads(json.dumps(done.to_dict(), allow_nan=False))
    assert facts["rows"][0]["mean"] == done.rows[0].mean
    gain = facts["gains"][1]
    assert gain["mean"] == pytest.approx(means[100, "fine-tuned"] - means[100, "scratch"])
    assert gain["least"] <= gain["mean"] <= gain["most"]
    assert any(f"{done.tested[0]:,}" in line for line in done.lines())
    assert classes_table(done).row_count == 6
    single = classify(engine, digits_folder, counts=[10], draws=1, steps=1)
    assert single.rows[0].sd is None


def test_labels_without_meaning_cannot_be_found(engine, tmp_path):
    """Any test picture among the labelled ones would show here."""
    write_digits(tmp_path, count=400)
    rng = np.random.default_rng(0)
    for path in sorted(tmp_path.rglob("*.png")):
        place = tmp_path / ("good", "odd")[rng.integers(2)]
        place.mkdir(exist_ok=True)
        path.rename(place / path.name)
    data = TINY.data.model_copy(update={"normal": ("good",)})
    done = classify(engine, tmp_path, data, counts=[200], draws=2, steps=100)
    for row in done.rows:
        assert abs(row.mean - 0.5) < 0.12, row


def test_a_conditional_model_is_refused(engine, digits_folder):
    detector = engine.detector
    model = detector.spec.model.model_copy(update={"condition": object()})
    spec = detector.spec.model_copy(update={"model": model})
    conditional = Detector(spec, detector.members, detector.calibration, detector.policy, "x", detector.seen)
    with pytest.raises(ConfigError, match="conditional"):
        classify(Engine(conditional, "cpu"), digits_folder)


def test_the_command(tiny_bundle, digits_folder):
    def run(*words):
        return command("classify", tiny_bundle, "--data", digits_folder, *words)

    done = run("--labels", "7,20", "--seeds", "2", "--steps", "3", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert Counter(row["method"] for row in facts["rows"]) == dict.fromkeys(METHODS, 2)
    shown = run("--labels", "7", "--seeds", "1", "--steps", "3")
    assert "fine-tuned" in shown.stdout
    assert "none of them a labelled one" in shown.stdout
    wrong = run("--labels", "5")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: 5 labels are too few for 7 classes")

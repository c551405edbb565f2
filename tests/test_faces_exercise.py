"""The lecture's exercise runs as a whole, and its figures are what they are called."""

import json
import math
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from forked import command
from PIL import Image

sys.path.insert(0, str(ROOT / "benchmarks"))

import faces
import faces_framing
import faces_page

from anomaly_vae.likelihoods import GaussianSpec
from anomaly_vae.metrics import detection
from anomaly_vae.model import ModelSpec
from anomaly_vae.observations import Observation
from anomaly_vae.scores import KullbackLeibler, NegativeElbo, SquaredError

PEOPLE, IN_DETECTOR, LOWER = 44, 40, 2


def write_faces(folder: Path, people: int) -> Path:
    """Ovals of many colours with a mouth that is straight or bent, 32 px; the smiling stand `LOWER` rows lower."""
    rng = np.random.default_rng(0)
    up, across = np.mgrid[-1:1:32j, -1:1:32j]
    for person in range(people):
        skin, ground, width = rng.uniform(100, 250, 3), rng.uniform(0, 90), rng.uniform(0.5, 0.9)
        for kind, bend in (("neutral", 0.0), ("smiling", 0.8)):
            face = np.where(((across / width) ** 2 + up**2 < 0.8)[..., None], skin, ground)
            mouth = (np.abs(up - 0.4 + bend * across**2) < 0.08) & (np.abs(across) < 0.35)
            face[mouth] = (150, 20, 40)
            face = np.roll(face, LOWER if bend else 0, 0)
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(face.astype(np.uint8)).save(folder / kind / f"{person:03}.png")
    return folder


def run(*options: str) -> subprocess.CompletedProcess:
    return command(*options, "--device", "cpu", script=ROOT / "benchmarks" / "faces.py")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("exercise")
    options = ["--latents", "4", "--optimal", "4", "--first", "6", "--epochs", "6", "--split-epochs", "3"]
    done = run(
        str(write_faces(place / "faces", PEOPLE)), "--out", str(place / "out"), "--people", str(IN_DETECTOR), *options
    )
    assert done.returncode == 0, done.stderr
    assert all((place / "out" / name.strip()).is_file() for name in done.stdout.strip().split(": ")[-1].split(","))
    return place / "out"


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, float):
        yield value


def test_it_writes_what_it_says_and_all_figures_are_finite(written):
    found = json.loads((written / "faces.json").read_text())
    assert all(math.isfinite(value) for value in numbers(found))
    assert [one["run"] for one in found["learning"]] == ["4", "4-optimal"] == [one["run"] for one in found["by_person"]]
    for one in found["learning"]:
        assert [stage["epoch"] for stage in one["stages"]] == [2, 4, 6]
        assert len(one["history"]) == 6
    for one in found["by_person"]:
        assert one["normal"] == one["abnormal"] == PEOPLE - IN_DETECTOR
        assert sum(sum(of) for of in one["pictures"].values()) == IN_DETECTOR
    text = (written / "faces.md").read_text()
    assert faces_page.CREDIT in text
    for name in [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]:
        with Image.open(written / name) as picture:
            picture.load()


def test_stages_are_of_one_training(written):
    """Weights that move between the stages, and only forwards: the last are those that the losses end with."""
    with np.load(written / "faces.npz") as shown:
        rebuilt = [shown[f"rebuilt.4.{epoch}.learnt"].astype(float) for epoch in (2, 4, 6)]
        counts = shown["counts"].tolist()
    assert counts == [6, PEOPLE - 6] * 2
    assert not np.array_equal(rebuilt[0], rebuilt[1])
    assert not np.array_equal(rebuilt[1], rebuilt[2])
    stage = json.loads((written / "faces.json").read_text())["learning"][0]["stages"][-1]
    with np.load(written / "faces.npz") as shown:
        error = ((shown["faces.learnt"] - rebuilt[-1]) ** 2).mean() / 255**2
    assert stage["squared_error"]["learnt"] == pytest.approx(error, rel=1e-2)


def test_nobody_of_the_test_is_learnt(written):
    rows = [line.split(",") for line in (written / "split.csv").read_text().splitlines()[1:]]
    learnt = {Path(path).name for path, _, part in rows if part == "train"}
    tested = {Path(path).name for path, _, part in rows if part == "test"}
    assert len(learnt) == IN_DETECTOR
    assert len(tested) == PEOPLE - IN_DETECTOR
    assert not learnt & tested
    assert {label for _, label, part in rows if part == "train"} == {"neutral"}


@pytest.mark.parametrize(("kinds", "missing"), [((), "no neutral/ and no smiling/"), (("neutral",), "no smiling/")])
def test_missing_faces_are_told_in_one_line(tmp_path, kinds, missing):
    for kind in kinds:
        (tmp_path / kind).mkdir()
    done = run(str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert missing in done.stderr
    assert "make faces FACES=DIR" in done.stderr


def test_too_few_people_are_told_in_one_line(tmp_path):
    done = run(str(write_faces(tmp_path, 5)))
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "5 people" in done.stderr


def test_the_losses_in_nats_are_the_librarys():
    """From one model's squares and KL follow its ELBO under the lecture's sigma and under the best one."""
    parts = {"network": {"kind": "mlp", "hidden": [8]}, "latent": {"kind": "gaussian", "size": 3}}
    spec = ModelSpec.parse({**parts, "likelihood": {"kind": "gaussian", "sigma": 0.3}})
    model = spec.build((1, 16, 16), seed=1).eval()
    x = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(2))

    def columns(of):
        with torch.inference_mode():
            scores = (SquaredError(), NegativeElbo(), KullbackLeibler())
            return {score.kind: score(Observation(of, x), {}).double().numpy() for score in scores}

    figures = faces.elbo_figures(model, {"learnt": columns(model), "unseen": columns(model)})
    best = figures["sigma"]
    for how, sigma in (("fixed", math.sqrt(0.5)), ("optimal", best), (None, 1.01 * best), (None, 0.99 * best)):
        other = deepcopy(model)
        other.likelihood = GaussianSpec(sigma=sigma).build()
        wanted = columns(other)["negative_elbo"].mean()
        if how is not None:
            assert figures["learnt"][how] == pytest.approx(wanted, rel=1e-5)
        else:
            assert wanted > figures["learnt"]["optimal"]
    constant = 0.5 * 256 * math.log(math.pi)
    assert figures["learnt"]["fixed"] == pytest.approx(figures["learnt"]["lecture_loss"] + constant, rel=1e-6)


def test_separation_is_over_people():
    """AUROC as anywhere; where a smile adds the same to everybody, far less uncertain than between strangers."""
    rng = np.random.default_rng(3)
    normal = rng.normal(size=60)
    found = faces_framing.separation(normal, normal + 0.2)
    assert found["auroc"] == pytest.approx(detection(normal, normal + 0.2).auroc)
    assert found["pairs"] == 1.0
    low, high = detection(normal, normal + 0.2).auroc_interval
    assert found["interval"][1] - found["interval"][0] < 0.5 * (high - low)
    strangers = faces_framing.separation(normal, rng.normal(size=60) + 0.2)
    expected = detection(normal, rng.normal(size=60) + 0.2).auroc_interval
    width = strangers["interval"][1] - strangers["interval"][0]
    assert width == pytest.approx(expected[1] - expected[0], rel=0.4)
    assert faces_framing.separation(normal, normal)["auroc"] == 0.5 == faces_framing.separation(normal, normal)["pairs"]


def test_the_interval_covers():
    """Of 300 drawn sets of 40 paired people some 95% have the true AUROC in their interval."""
    rng, truth, inside = np.random.default_rng(4), 0.5 * (1 + math.erf(0.5 / math.sqrt(2 * 2))), 0
    for _ in range(300):
        person, noise = rng.normal(size=40) * math.sqrt(0.8), rng.normal(size=(2, 40)) * math.sqrt(0.2)
        low, high = faces_framing.separation(person + noise[0], person + noise[1] + 0.5)["interval"]
        inside += low <= truth <= high
    assert 0.90 <= inside / 300 <= 0.99


def test_faces_that_stand_lower_are_brought_to_one_height(tmp_path):
    """The tiny faces are shown four times as large; the control's crop leaves no shift, and less of the difference."""
    options = type("Options", (), {"first": 4, "people": 10})
    found = faces_framing.open_faces(write_faces(tmp_path / "faces", 20), options)
    lower = faces_framing.shifts(found, 10)
    assert len(lower) == 10
    assert np.median(lower) == pytest.approx(4 * LOWER, abs=1)
    place = faces_framing.write_aligned(found, round(float(np.median(lower))), tmp_path / "aligned")
    aligned = faces_framing.open_faces(place, options)
    assert aligned.names == [f"{Path(name).stem}.png" for name in found.names]
    assert abs(np.median(faces_framing.shifts(aligned, 20))) <= 1
    errors = [((one.pixels(one.neutral) - one.pixels(one.smiling)) ** 2).mean() for one in (found, aligned)]
    assert errors[1] < 0.5 * errors[0]


def test_real_faces_are_found_pair_by_pair(real_images):
    options = type("Options", (), {"first": 16, "people": 70})
    found = faces_framing.open_faces(real_images / "faces_london", options)
    assert len(found.names) == 102
    for name, neutral, smiling in zip(found.names, found.neutral, found.smiling, strict=True):
        keys = [found.pictures.items[row].key for row in (neutral, smiling)]
        assert keys == [f"neutral/{name}", f"smiling/{name}"]

"""The table of presets: nothing is dropped, nothing is run twice, and no test picture is ever trained on."""

import csv
import gzip
import json
import struct
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from anomaly_vae.errors import TrainingError

sys.path.insert(0, str(ROOT / "benchmarks"))

import benchmark_tasks
import seeds

OFFICIAL_TEST = 255


def write_idx(path, values: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder like the one that is asked for, with pictures of noise; MNIST's test part is all white."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "mnist").mkdir()
    rng, labels = np.random.default_rng(0), np.tile(np.arange(10), 160)
    pixels = rng.integers(0, 200, (len(labels), 28, 28))
    write_idx(folder / "mnist" / "train-images-idx3-ubyte.gz", pixels)
    write_idx(folder / "mnist" / "train-labels-idx1-ubyte.gz", labels)
    write_idx(folder / "mnist" / "t10k-images-idx3-ubyte.gz", np.full((10, 28, 28), OFFICIAL_TEST))
    write_idx(folder / "mnist" / "t10k-labels-idx1-ubyte.gz", np.arange(10))
    for label in ("neutral", "smiling"):
        write_pictures(folder / "faces_london" / label, [f"{i:03}.jpg" for i in range(80)], rng)
    crops = [f"A_{sheet:02}_{crop}.png" for sheet in range(6) for crop in range(8)]
    for paper in ("PA_B", "PA_A"):
        write_pictures(folder / "piped" / paper / "good", crops, rng)
        write_pictures(folder / "piped" / paper / "defect", [f"D_{crop}" for crop in crops], rng)
    return folder


def write_pictures(folder, names: list[str], rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (20, 20, 3)).astype(np.uint8)).save(folder / name)


def told(data, out, monkeypatch, capsys, *options: str) -> str:
    arguments = ["seeds.py", "--data", str(data), "--out", str(out / "rows.json"), "--quick", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    assert seeds.main() == 0
    assert "|" in capsys.readouterr().out
    return (out / "rows.md").read_text()


def never(*_, **__):
    raise AssertionError("trained again")


def lines(text: str, preset: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"| {preset} ")]


def test_a_row_is_run_once_and_absent_data_is_said(data, tmp_path, monkeypatch, capsys):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "mnist").symlink_to(data / "mnist")
    first = told(alone, tmp_path, monkeypatch, capsys, "--presets", "pca", "conditional-vae")
    assert first.count("not measured here") == 2
    assert len(lines(first, "pca")) == len(lines(first, "conditional-vae")) == 1
    rows = {row["preset"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["pca"]["status"] == rows["conditional-vae"]["status"] == "done", rows
    assert rows["conditional-vae"]["cost_name"] == "KL"
    assert rows["pca"]["latents"] == 32
    monkeypatch.setattr(seeds, "train", never)
    again = told(alone, tmp_path, monkeypatch, capsys, "--presets", "pca", "conditional-vae")
    assert lines(again, "pca") == lines(first, "pca")
    more = told(alone, tmp_path, monkeypatch, capsys, "--presets", "pca", "--seeds", "2")
    assert "1 of 2 seeds" in more, "the second seed is another row, and its failure stands beside the first"
    assert "failed: AssertionError: trained again" in more


def test_failures_and_losers_are_shown_and_failures_tried_again(data, tmp_path, monkeypatch, capsys):
    def diverging(*_, **__):
        raise TrainingError("the loss is no longer a number | lower the rate")

    options = ("--presets", "pca", "conditional-vae", "--data-sets", "faces_london")
    real = seeds.train
    monkeypatch.setattr(seeds, "train", diverging)
    text = told(data, tmp_path, monkeypatch, capsys, *options)
    assert lines(text, "pca") == ["| pca | failed: the loss is no longer a number / lower the rate | | | | | | | |"]
    assert seeds.NEEDS_CLASSES in lines(text, "conditional-vae")[0]
    monkeypatch.setattr(seeds, "train", real)
    assert "failed" not in told(data, tmp_path, monkeypatch, capsys, *options)


@pytest.mark.parametrize("name", list(benchmark_tasks.MAKERS))
def test_no_test_picture_is_trained_on(name, data, tmp_path):
    tasks = benchmark_tasks.tasks_of(name, data, tmp_path, True)
    for task in filter(None, tasks):
        with (task.folder / "manifest.csv").open() as file:
            rows = list(csv.DictReader(file))
        train, test = ([row for row in rows if row["split"] == part] for part in ("train", "test"))
        assert not {row["path"] for row in train} & {row["path"] for row in test}
        assert all(row["label"] in task.normal for row in train)
        assert {row["label"] in task.normal for row in test} == {True, False}
        paths = [row["path"] for row in rows]
        if name == "mnist":
            assert all(np.asarray(Image.open(path)).max() < OFFICIAL_TEST for path in paths)
        if name == "faces_london":
            people = [{path.split("/")[-1] for path in paths_of} for paths_of in
                      ([row["path"] for row in train], [row["path"] for row in test])]  # fmt: skip
            assert not people[0] & people[1]
            assert len(test) == 2 * len(people[1])
        if name == "piped":
            assert all("PA_A" in path for path in paths)
            assert (len(train), len(test), len({row["group"] for row in train})) == (32, 16 + 48, 4)


def test_several_seeds_are_told_as_mean_and_spread():
    rows = [
        seeds.Row(data_set="d", preset="p", seed=seed, settings="", status="done", parameters=1, steps=2, auroc=auroc)
        for seed, auroc in enumerate((0.5, 0.7, 0.9))
    ]
    assert "| 0.700 ± 0.200 |" in seeds.table(rows)
    one = rows[0].model_copy(update={"auroc_interval": (0.4, 0.6)})
    assert "| 0.500 (0.400-0.600) |" in seeds.table([one])


def test_a_slow_step_buys_fewer_steps():
    budget = seeds.Budget(400, 10.0, False)
    assert seeds.steps_within(budget, 0.001) == 400
    assert seeds.steps_within(budget, 0.1) == 100
    assert seeds.steps_within(budget, 60.0) == 40

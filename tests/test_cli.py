"""The commands as a user runs them: processes, exit codes, one-line errors, JSON that parses."""

import json

import numpy as np
import pytest
from bad_bytes import bad_bytes
from forked import command
from PIL import Image


def run(*arguments, code=0):
    done = command(*arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_train_says_what_it_does_and_the_bundle_serves_every_verb(digits_folder, tmp_path):
    bundle = tmp_path / "bundle"
    short = (
        "-o",
        "training.epochs=6",
        "-o",
        "model.network.width=8",
        "-o",
        "image={height: 16, width: 16, channels: 1}",
    )
    done = run("train", "--data", digits_folder, "--out", bundle, *short)
    assert "preset 'default'" in done.stderr
    assert "normals: 576 used" in done.stderr
    assert "epoch 6/6" in done.stderr
    assert "left out defect" in done.stderr
    assert "alpha 0.01 (average) from 144 calibration images" in done.stdout

    figures = json.loads(run("evaluate", bundle, "--data", digits_folder, "--json").stdout)
    assert {"auroc", "average_precision", "false_alarm_rate", "alpha", "n_normal", "n_abnormal"} <= figures.keys()
    assert (figures["n_normal"], figures["n_abnormal"], figures["excluded"]) == (144, 1077, 576)
    assert "left out 576 pictures" in run("evaluate", bundle, "--data", digits_folder).stderr

    facts = json.loads(run("info", bundle, "--json").stdout)
    assert facts["version"] == figures["version"]
    assert facts["spec"]["training"]["epochs"] == 6
    assert facts["version"] in run("info", bundle).stdout

    assert "--overwrite" in run("train", "--data", digits_folder, "--out", bundle, *short, code=2).stderr


def test_score_with_heat_maps_and_a_bad_picture(tiny_bundle, digits_folder, tmp_path):
    good = sorted((digits_folder / "7").iterdir())[:2]
    (tmp_path / "bad.png").write_bytes(bad_bytes()["half a png"])
    done = run("score", tiny_bundle, *good, tmp_path / "bad.png", tmp_path / "none.png", "--heatmap", tmp_path / "heat",
               "--json", code=4)  # fmt: skip
    rows = json.loads(done.stdout)["results"]
    assert [row["error"] is None for row in rows] == [True, True, False, False]
    assert rows[0].keys() >= {"score", "p_value", "outlier", "alpha", "threshold", "parts", "version"}
    for row in rows[:2]:
        with Image.open(row["heatmap"]) as picture:
            assert min(picture.size) >= 256
            assert np.asarray(picture).std() > 5
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / good[0].name).write_bytes(good[1].read_bytes())
    done = run(
        "score", tiny_bundle, good[0], tmp_path / "again" / good[0].name, "--heatmap", tmp_path / "two", "--json"
    )
    maps = {row["heatmap"] for row in json.loads(done.stdout)["results"]}
    assert len(maps) == len(list((tmp_path / "two").iterdir())) == 2
    (tmp_path / "[final]").mkdir()
    (tmp_path / "[final]" / "[b]x.png").write_bytes(good[0].read_bytes())
    assert "[final]/[b]x.png" in run("score", tiny_bundle, tmp_path / "[final]" / "[b]x.png").stdout.replace("\n", "")
    table = run("score", tiny_bundle, good[0], "--alpha", "0.5").stdout
    assert good[0].name in table


def test_scan_writes_the_table(tiny_bundle, digits_folder, tmp_path):
    done = run("scan", tiny_bundle, digits_folder / "7", "--out", tmp_path / "out.csv")
    assert "179 images" in done.stdout
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 180
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "empty.png").write_bytes(b"")
    assert (
        "1 files could not be read"
        in run("scan", tiny_bundle, tmp_path / "mixed", "--out", tmp_path / "m.csv", "--strict", code=4).stdout
    )
    tally = json.loads(run("scan", tiny_bundle, digits_folder / "7", "--out", tmp_path / "out.csv", "--json").stdout)
    assert tally["images"] == 179


def test_check_speaks_before_training(digits_folder):
    report = json.loads(run("check", digits_folder, "--json").stdout)
    assert report
    assert run("check", digits_folder).stdout


@pytest.mark.parametrize(("arguments", "says"), [
    (["train", "--data", "nowhere", "--out", "OUT"], "nowhere"),
    (["train", "no.yaml", "--data", "DIGITS", "--out", "OUT"], "cannot read the configuration no.yaml"),
    (["train", "--preset", "best", "--data", "DIGITS", "--out", "OUT"], "choose one of"),
    (["train", "--data", "DIGITS", "--out", "OUT", "-o", "training.epoch=3"], "training.epoch: no such setting"),
    (["train", "--data", "DIGITS", "--out", "OUT", "-o", "calibration.alpha=0.0001"], "needs 9999 calibration images"),
    (["train", "--data", "DIGITS", "--out", "OUT", "--device", "cuda:7"], "try --device cpu"),
    (["evaluate", "DIGITS", "--data", "DIGITS"], "is no bundle"),
    (["evaluate", "BUNDLE", "--data", "DIGITS", "-o", "seed=3"], "only data.* settings"),
    (["evaluate", "BUNDLE", "--data", "DIGITS", "-o", "data.normal=[blue]"], "blue"),
    (["score", "BUNDLE", "x.png", "--alpha", "2"], "between 0 and 1"),
    (["scan", "BUNDLE", "nowhere", "--out", "x.csv"], "nowhere does not exist; give a folder"),
    (["check", "nowhere"], "nowhere"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(tiny_bundle, digits_folder, tmp_path, arguments, says):
    places = {"DIGITS": digits_folder, "BUNDLE": tiny_bundle, "OUT": tmp_path / "out"}
    done = run(*(places.get(word, word) for word in arguments), code=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0] == done.stderr.splitlines()[-1]
    assert says in errors[0]


def test_help_and_version():
    assert "anomaly-vae" in run("--version").stdout
    for verb in ("train", "evaluate", "score", "scan", "serve", "info", "check", "demo"):
        assert verb in run("--help").stdout

"""The quality benchmark: nothing is measured twice or hidden, no test picture is trained on, no rate is flattered."""

import io
import json
import sys

import numpy as np
import pytest
from conftest import ROOT, write_digits
from PIL import Image
from test_seeds_table import OFFICIAL_TEST, never, write_idx, write_pictures

from anomaly_vae import Detector
from anomaly_vae.errors import ConfigError, TrainingError
from anomaly_vae.layouts import DataSpec

sys.path.insert(0, str(ROOT / "benchmarks"))

import baselines
import quality
import quality_figure
import quality_methods
import quality_tables
from quality import TASKS
from quality_rows import Book, Look, Row
from quality_tasks import AbsentError, Wanted

SMALL = ("-o", "image={height: 16, width: 16, channels: 1}", "-o", "model.latent.size=8")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("quality") / "digits", "0", 800)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise in the places of the real sets; MNIST's official test part is white, as nothing else is."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "mnist").mkdir()
    rng, labels = np.random.default_rng(0), np.tile(np.arange(10), 150)
    write_idx(folder / "mnist" / "train-images-idx3-ubyte.gz", rng.integers(0, 200, (len(labels), 28, 28)))
    write_idx(folder / "mnist" / "train-labels-idx1-ubyte.gz", labels)
    white = np.full((200, 28, 28), OFFICIAL_TEST)
    white[:, 0, 0] = np.arange(200)  # else they are copies, and copies are one test picture
    write_idx(folder / "mnist" / "t10k-images-idx3-ubyte.gz", white)
    write_idx(folder / "mnist" / "t10k-labels-idx1-ubyte.gz", np.tile(np.arange(10), 20))
    for label in ("neutral", "smiling"):
        write_pictures(folder / "faces_london" / label, [f"{i:03}.jpg" for i in range(80)], rng)
    crops = [f"A_{sheet:02}_{crop}.png" for sheet in range(6) for crop in range(8)]
    for paper in range(8):
        write_pictures(folder / "piped" / f"PA_{paper}" / "good", [f"N{crop}" for crop in crops], rng)
        write_pictures(folder / "piped" / f"PA_{paper}" / "defect", [f"D{crop}" for crop in crops], rng)
        write_pictures(folder / "piped" / f"PA_{paper}" / "mask", [f"D{crop}" for crop in crops], rng)
    return folder


def run(monkeypatch, capsys, out, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments, "--out", str(out)])
    assert quality.main() == 0
    return capsys.readouterr().out


def rows_of(out) -> dict[str, dict]:
    return {row["method"]: row for row in json.loads(out.read_text())["rows"]}


def row(**changes) -> Row:
    return Row.parse({"data_set": "d", "row": "r", "method": "m", "seed": 0, "split": "dev", "quick": False,
                      "product": True, **changes})  # fmt: skip


def test_a_folder_is_measured_once_by_every_method(digits, tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "rows.json", tmp_path / "page.md"
    arguments = ("folder", str(digits), "--quick", "--presets", "pca", "--seeds", "2", "--device", "cpu", *SMALL)
    run(monkeypatch, capsys, out, *arguments)
    rows = json.loads(out.read_text())["rows"]
    failed = [one for one in rows if one["status"] == "failed"]
    assert not failed
    done = [one for one in rows if one["status"] == "done"]
    assert len({one["method"] for one in done}) >= 7
    assert {one["seed"] for one in done if one["method"] == "pixel-pca"} == {0}, "no chance, no second seed"
    assert all(one["n_normal"] == done[0]["n_normal"] for one in done), "all are tested on the same pictures"
    for one in done:
        assert 0 <= one["auroc_interval"][0] <= one["auroc"] <= one["auroc_interval"][1] <= 1
        assert one["product"] == (one["alpha"] is not None)
        assert {one["train_seconds"] is None, one["ms_an_image"] is None, one["versions"] == ""} == {False}
    ours = [one for one in done if one["method"].startswith("default")]
    assert {one["seed"] for one in ours} == {0, 1}
    assert ours[0]["parts"]
    assert ours[0]["n_train"] + ours[0]["n_calibrate"] == next(r["n_train"] for r in done if r["method"] == "pixel-pca")

    monkeypatch.setattr(quality, "measure", never)
    arguments = tuple(text for text in arguments if text not in ("--presets", "pca"))
    again = run(monkeypatch, capsys, out, *arguments, "--methods", "default,pixel-knn,plain-ae")
    assert "rows: 5, measured before: 5" in again
    assert json.loads(out.read_text())["rows"] == rows
    run(monkeypatch, capsys, out, "table", "--page", str(page), "--quick")
    text = page.read_text()
    assert "| pixel-pca |" in text
    assert " ± " in text
    assert "the figures mean nothing" in text


def test_a_failure_is_a_row_and_is_tried_again(digits, tmp_path, monkeypatch, capsys):
    def diverging(*_):
        raise TrainingError("the loss is no longer a number | lower the rate")

    out, page = tmp_path / "rows.json", tmp_path / "page.md"
    arguments = ("folder", str(digits), "--quick", "--methods", "pixel-pca,pixel-knn")
    real = quality.measure
    monkeypatch.setattr(quality, "measure", diverging)
    assert "measured: 2, failed: 2" in run(monkeypatch, capsys, out, *arguments)
    run(monkeypatch, capsys, out, "table", "--page", str(page), "--quick")
    assert "| digits | failed | failed |" in page.read_text()
    assert "pixel-knn, digits, seed 0: the loss is no longer a number" in page.read_text()
    monkeypatch.setattr(quality, "measure", real)
    assert "measured: 2, failed: 0" in run(monkeypatch, capsys, out, *arguments)
    assert all(one["status"] == "done" for one in rows_of(out).values())


def test_a_package_that_is_not_there_is_named(digits, tmp_path, monkeypatch, capsys):
    def gone(name):
        raise ImportError(name)

    monkeypatch.setattr(baselines, "import_module", gone)
    out, page = tmp_path / "rows.json", tmp_path / "page.md"
    arguments = ("folder", str(digits), "--quick", "--methods", "pyod-iforest", "--seeds", "1")
    assert "not measured here: pip install pyod" in run(monkeypatch, capsys, out, *arguments)
    run(monkeypatch, capsys, out, "table", "--page", str(page), "--quick")
    assert "| digits | not measured here |" in page.read_text()


def test_settings_and_code_make_a_row_another_one(tmp_path):
    book = Book(tmp_path / "rows.json")
    book.put(row(settings="a", code="1"))
    assert book.standing(row(settings="a", code="1"))
    assert not book.standing(row(settings="b", code="1"))
    assert not book.standing(row(settings="a", code="2"))
    Book(tmp_path / "rows.json").put(row(row="other"))
    book.put(row(settings="a", code="2"))
    assert [(one.row, one.code) for one in book.rows] == [("other", ""), ("r", "2")], "of two processes, both stay"
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ConfigError, match="choose another --out"):
        Book(tmp_path / "rows.json")


def test_a_look_at_test_images_is_recorded(data, tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "rows.json", tmp_path / "page.md"
    arguments = ("mnist-one-class", "--data", str(data), "--classes", "3", "--methods", "pixel-pca", "--quick")
    run(monkeypatch, capsys, out, *arguments)
    assert not Book(out).looks
    run(monkeypatch, capsys, out, *arguments, "--split", "test")
    run(monkeypatch, capsys, out, *arguments, "--split", "test")
    assert len(Book(out).looks) == 1, "a run that measures nothing looks at nothing"
    run(monkeypatch, capsys, out, "table", "--page", str(page), "--quick")
    text = page.read_text()
    assert "--split test" in text.partition("## Looks at the test images")[2]
    assert "## MNIST one-class, dev" in text
    assert "## MNIST one-class, test" in text


def test_absent_data_are_said(tmp_path, monkeypatch, capsys):
    for command in set(TASKS) - {"folder"}:
        said = run(monkeypatch, capsys, tmp_path / "rows.json", command, "--data", str(tmp_path))
        assert f"{command}: not measured here" in said


@pytest.mark.parametrize("name", sorted({*TASKS} - {"folder", "fashion-mnist", "cifar10", "mvtec"}))
@pytest.mark.parametrize("part", ["dev", "test"])
def test_no_test_picture_is_trained_on(name, part, data, tmp_path):
    tasks = list(TASKS[name](Wanted(data, tmp_path, part, group_sheets=True)))
    assert tasks
    for task in tasks:
        train, test, known = ([e for e in task.entries if e.part == which] for which in ("train", "test", "known"))
        assert not {entry.path for entry in [*train, *known]} & {entry.path for entry in test}
        assert not any(entry.label in task.normal for entry in known)
        assert all(entry.label in task.normal for entry in train)
        assert {entry.label in task.normal for entry in test} == {True, False}
        official = [bool(entry.pixels is not None and entry.pixels.max() == OFFICIAL_TEST) for entry in test]
        assert all(official) if part == "test" and test[0].pixels is not None else not any(official)
        assert not any(e.pixels is not None and e.pixels.max() == OFFICIAL_TEST for e in [*train, *known])
        groups = {entry.group for entry in train if entry.group}
        assert not groups & {entry.group for entry in test}
        papers = {entry.path.parts[-3] for entry in task.entries if entry.mask}
        assert papers <= {f"PA_{i}" for i in (range(4) if part == "dev" else range(4, 8))}
    if name == "piped":
        assert [task.n_train for task in tasks] == [32] * 4
        assert all(len(task.entries) - task.n_train == 16 + 48 for task in tasks)
    if name == "known-anomalies":
        assert [sum(entry.known for entry in task.entries) for task in tasks] == [0, 0, 20, 20]
        kinds = [{e.label for e in task.entries if e.part == "test"} - {"8"} for task in tasks]
        assert kinds[0] == kinds[2] == {"3"}
        assert kinds[1] == kinds[3] == set("01245679")
    if name == "contaminated":
        hidden = [sum("D" in entry.path.name for entry in task.entries if entry.train) for task in tasks]
        assert hidden[-4:] == [0, 1, 2, 4]
        assert len({len([e for e in task.entries if not e.train]) for task in tasks[-4:]}) == 1, (
            "one test for all levels"
        )


def test_a_set_by_name_keeps_its_test_part_for_the_test(data, tmp_path):
    for part in ("dev", "test"):
        wanted = Wanted(data, tmp_path, part, root=f"mnist:{data / 'mnist'}", spec=DataSpec(normal=("3",)))
        (task,) = TASKS["folder"](wanted)
        white = [entry.pixels.max() == OFFICIAL_TEST for entry in task.entries]
        assert task.split == part
        assert any(white) == (part == "test")


def test_papers_of_the_test_are_not_for_development(data, tmp_path):
    chosen = list(TASKS["piped"](Wanted(data, tmp_path, papers="1:3")))
    assert [task.row for task in chosen] == ["PA_1", "PA_2"]
    for papers, part in (("3:5", "dev"), ("0:4", "test"), ("7", "dev"), ("x", "dev")):
        with pytest.raises(ConfigError, match="--papers"):
            list(TASKS["piped"](Wanted(data, tmp_path, part, papers=papers)))


def test_real_crops_have_figures_of_pixels(real_images, tmp_path, monkeypatch, capsys):
    out, image = tmp_path / "rows.json", "image={height: 32, width: 32, channels: 3}"
    methods = "default,pixel-pca,pixel-knn"
    run(monkeypatch, capsys, out, "piped", "--data", str(real_images), "--papers", "0:1", "--methods", methods,
        "--quick", "--group-sheets", "-o", image)  # fmt: skip
    rows = {name.split()[0]: one for name, one in rows_of(out).items()}
    assert {one["status"] for one in rows.values()} == {"done"}
    assert rows["pixel-pca"]["pro"] is not None
    assert rows["default"]["pixel_average_precision"] is not None
    assert rows["pixel-knn"]["pixel_auroc"] is None


def test_real_digits_are_found_by_their_pixels(real_images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    run(monkeypatch, capsys, out, "mnist-one-class", "--data", str(real_images), "--classes", "1", "--quick",
        "--methods", "pixel-pca,pixel-knn")  # fmt: skip
    assert all(one["auroc"] > 0.9 for one in rows_of(out).values())


def test_redrawn_calibration_keeps_the_rate_of_exchangeable_scores():
    rng, means, inside = np.random.default_rng(1), {}, []
    for _ in range(30):
        scores = rng.normal(size=1500)
        for one in quality_methods.achieved_rates(scores[:200], scores[200:500], scores[500:], redraws=20):
            assert one.low <= one.mean <= one.high
            means.setdefault(one.alpha, []).append(one.mean)
            inside.append(one.interval[0] <= one.mean <= one.interval[1])
    assert set(means) == {0.01, 0.05, 0.1}
    for alpha, rates in means.items():
        expected = np.floor(201 * alpha + 1e-9) / 201
        assert np.mean(rates) == pytest.approx(expected, abs=4 * np.std(rates) / np.sqrt(30))
    assert np.mean(inside) > 0.8
    shifted = quality_methods.achieved_rates(scores[:200], scores[200:500], scores[500:] + 1, redraws=20)
    assert shifted[1].mean > 2 * shifted[1].interval[1], "a shift of the test normals shows"
    assert [one.alpha for one in quality_methods.achieved_rates(scores[:30], scores, scores)] == [0.05, 0.1]


@pytest.mark.parametrize("name", sorted({*baselines.BASELINES} - {"pyod-iforest"}))
def test_baselines_separate_an_easy_case_picture_by_picture(name):
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(3, 64))
    x = (rng.normal(size=(200, 3)) @ plane + 0.1 * rng.normal(size=(200, 64))).astype(np.float32)
    # Far from the others within their plane, which a projection sees, and off it, which the rest see.
    odd = ((rng.normal(size=(50, 3)) + 4) @ plane + rng.normal(size=(50, 64))).astype(np.float32)
    baseline = baselines.BASELINES[name](0)
    baseline.fit(x[:150])
    normal, abnormal = baseline.scores(x[150:]), baseline.scores(odd)
    assert quality_methods.detection(normal, abnormal).auroc > 0.8
    np.testing.assert_allclose(baseline.scores(odd[3:4])[0], abnormal[3], rtol=1e-4)
    errors = baseline.errors(odd)
    assert errors is None or errors.shape == odd.shape


def test_tables_keep_the_prose_around_them(tmp_path):
    book, page = Book(tmp_path / "rows.json"), tmp_path / "docs" / "quality.md"
    book.put(row(auroc=0.5))
    quality_tables.write_page(book, page)
    assert "| r | 50.00 |" in page.read_text()
    prose = page.read_text().replace(quality_tables.BEGIN, f"Before.\n\n{quality_tables.BEGIN}") + "\nAfter.\n"
    page.write_text(prose)
    quality_tables.write_page(book, page)
    assert page.read_text() == prose, "the same rows, the same page"
    book.put(row(auroc=0.75))
    quality_tables.write_page(book, page)
    assert page.read_text() == prose.replace("50.00", "75.00")
    page.write_text("Only prose.\n")
    quality_tables.write_page(book, page)
    assert page.read_text().startswith("Only prose.\n\n" + quality_tables.BEGIN)


def test_means_say_what_they_lack_and_bars_want_all_rows():
    def of(count, value, **changes):
        name = "MNIST one-class"
        return [row(data_set=name, row=str(digit), auroc=value, **changes) for digit in range(count)]

    assert "**passed**" in quality_tables.bars("MNIST one-class", of(10, 0.989))
    assert "| 98.70 | not passed |" in quality_tables.bars("MNIST one-class", of(10, 0.987))
    short = [*of(9, 1.0), row(data_set="MNIST one-class", row="9", status="failed", reason="why")]
    assert "not passed: measured on 9 of 10" in quality_tables.bars("MNIST one-class", short)
    text = quality_tables.section("MNIST one-class", short)
    assert "100.00 (9 of 10 rows)" in text
    assert "- m, 9, seed 0: why" in text
    seeds = [*of(2, 0.5), *of(2, 0.7, seed=1)]
    assert "| **mean** | 60.00 ± 14.14 |" in quality_tables.per_row(seeds)


def test_all_is_said_of_what_was_not_measured():
    text = quality_tables.all_tables([], [Look(date="2030-01-01", version="1", command="python x --split test")])
    assert text.count("not measured here") == len(quality_tables.KNOWN)
    assert "| 2030-01-01 | 1 | `python x --split test` |" in text


def test_absent_is_not_an_error_of_the_user(tmp_path):
    with pytest.raises(AbsentError):
        Wanted(tmp_path, tmp_path).place("mnist")


def test_a_figure_shows_picture_reconstruction_heat_and_verdict(
    tiny_bundle, digits_folder, tmp_path, capsys, monkeypatch
):
    files = [next((digits_folder / kind).glob("*.png")) for kind in ("good", "8")]
    out = tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", ["quality_figure.py", str(tiny_bundle), *map(str, files), "--out", str(out)])
    assert quality_figure.main() == 0
    assert "2 pictures drawn" in capsys.readouterr().out
    alone = quality_figure.figure(Detector.load(tiny_bundle), files[:1])
    two, one = Image.open(out), Image.open(io.BytesIO(alone))
    assert two.height == one.height
    assert two.height > 3 * 64
    assert 64 <= two.width - one.width <= 160 + 8

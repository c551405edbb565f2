"""A scan: every file one row, bad ones too, in a stable order, complete or absent."""

import csv
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bad_bytes import bad_bytes

from anomaly_vae import DataError, Engine
from anomaly_vae.scanning import scan


@pytest.fixture
def engine(tiny_detector):
    return Engine(tiny_detector, "cpu", max_batch=8)


@pytest.fixture
def folder(digits_folder, tmp_path):
    root = tmp_path / "pictures"
    for sub, source in (("b", "good"), ("a/deep", "7")):
        (root / sub).mkdir(parents=True)
        for path in sorted((digits_folder / source).iterdir())[:15]:
            (root / sub / path.name).write_bytes(path.read_bytes())
    (root / "b" / "broken.png").write_bytes(bad_bytes()["half a png"])
    (root / "b" / "empty.jpg").write_bytes(b"")
    (root / "b" / "notes.txt").write_text("no picture")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(b"")
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / os.fsdecode(b"caf\xe9.png")).write_bytes(sorted((digits_folder / "good").iterdir())[0].read_bytes())
    return root


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_every_picture_is_one_row_in_sorted_order(engine, folder, tmp_path, ending):
    tally = scan(engine, folder, tmp_path / f"out.{ending}")
    rows = read(tmp_path / f"out.{ending}")
    assert (tally.images, tally.errors) == (31, 2)
    assert len(rows) == 33
    names = [row["path"].removeprefix(f"{folder}/") for row in rows]
    assert len(set(names)) == 33
    assert [name for name in names if name.startswith("a/")] == names[:15]
    assert "caf\\xe9.png" in names
    errors = {name: row["error"] for name, row in zip(names, rows, strict=True) if row["error"]}
    assert set(errors) == {"b/broken.png", "b/empty.jpg"}
    assert "ends before its last pixel" in errors["b/broken.png"]
    assert tally.outliers == sum(str(row.get("outlier")) == "True" for row in rows)


def test_scores_are_those_of_single_judging(engine, folder, tmp_path):
    scan(engine, folder, tmp_path / "out.jsonl")
    for row in read(tmp_path / "out.jsonl")[::5]:
        if row["error"] is None:
            alone = engine.judge(engine.prepare(Path(row["path"]).read_bytes())[None]).row(0)
            assert row["score"] == pytest.approx(alone["score"], rel=1e-5)
            assert (row["p_value"], row["outlier"]) == (alone["p_value"], alone["outlier"])
            assert row["part_kl"] == pytest.approx(alone["parts"]["kl"], rel=1e-5)


def test_a_scan_that_breaks_off_leaves_nothing_behind(engine, folder, tmp_path):
    def report(tally):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(engine, folder, tmp_path / "out.csv", report)
    assert {path.name for path in tmp_path.iterdir()} == {"pictures"}


@pytest.mark.parametrize(("folder_name", "out", "says"), [
    ("missing", "out.csv", "is no folder"),
    ("empty", "out.csv", "holds no picture"),
    ("empty", "out.xlsx", "use .csv, .jsonl or .parquet"),
    ("empty", "missing/out.csv", "cannot write"),
])  # fmt: skip
def test_mistakes_name_the_remedy(engine, tmp_path, folder_name, out, says):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=says):
        scan(engine, tmp_path / folder_name, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]

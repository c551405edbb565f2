"""A scan: every file one row, bad ones too, in a stable order, complete or absent."""

import csv
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bad_bytes import bad_bytes
from PIL import Image

from anomaly_vae import CalibrationError, ConfigError, DataError, Engine, scan_rows
from anomaly_vae.calibration import benjamini_hochberg
from anomaly_vae.paths import order_of
from anomaly_vae.scanning import Scan, Wanted
from anomaly_vae.sources import Folder, source_of


def scan(engine, folder, out, wanted=Wanted(), **how):  # noqa: B008
    with Scan(engine, Folder(folder), out, wanted) as running:
        summary = running.run(**how)
        running.finish(summary)
    return summary


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
    if path.suffix in (".jsonl", ".ndjson"):
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_every_picture_is_one_row_in_sorted_order(engine, folder, tmp_path, ending):
    tally = scan(engine, folder, tmp_path / f"out.{ending}").counts
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
    assert tally.outliers == sum(str(row.get("outlier")).lower() == "true" for row in rows)


def test_scores_are_those_of_single_judging(engine, folder, tmp_path):
    scan(engine, folder, tmp_path / "out.jsonl")
    for row in read(tmp_path / "out.jsonl")[::5]:
        if row["error"] is None:
            alone = engine.judge(engine.prepare(Path(row["path"]).read_bytes())[None]).row(0)
            assert row["score"] == pytest.approx(alone["score"], rel=1e-5)
            assert (row["p_value"], row["outlier"]) == (alone["p_value"], alone["outlier"])
            assert row["part_kl"] == pytest.approx(alone["parts"]["kl"], rel=1e-5)


def test_a_scan_that_breaks_off_leaves_no_result_and_goes_on(engine, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("anomaly_vae.scan_ledger._ROWS", 8)
    out, whole = tmp_path / "out.csv", tmp_path / "whole.csv"
    scan(engine, folder, whole)
    seen = []

    def report(counts):
        seen.append(counts.images + counts.errors)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(engine, folder, out, report=report)
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", ".out.csv.scan", "whole.csv"}
    scan(engine, folder, out, report=lambda counts: seen.append(counts.images + counts.errors))
    assert seen[-1] == 33 - 16
    assert out.read_text() == whole.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "out.csv", "whole.csv"}


def test_files_that_came_meanwhile_are_in_order_too_and_what_changed_is_scored_anew_on_request(
    engine, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("anomaly_vae.scan_ledger._ROWS", 8)
    out = tmp_path / "out.jsonl"

    def stop(counts):
        if counts.images > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(engine, folder, out, report=stop)
    first = sorted((folder / "a" / "deep").iterdir())[0]
    (folder / "a" / "deep" / "new.png").write_bytes(first.read_bytes())
    first.write_bytes(sorted((folder / "b").iterdir())[3].read_bytes())
    scan(engine, folder, out)
    rows = {row["path"]: row for row in read(out)}
    assert list(rows) == sorted(rows, key=order_of)
    assert f"{folder}/a/deep/new.png" in rows
    assert rows[str(first)]["size"] != first.stat().st_size
    scored = []
    (folder / "a" / "deep" / "new.png").unlink()
    summary = scan(engine, folder, out, Wanted(update=True), score=noting(scored))
    # What could not be read may have been mended without a trace.
    assert [Path(path).name for path in scored] == [first.name, "broken.png", "empty.jpg"]
    after = {row["path"]: row for row in read(out)}
    assert list(after) == [path for path in rows if not path.endswith("new.png")]
    assert after[str(first)]["size"] == first.stat().st_size
    assert summary.counts.images == len(after) - 2
    assert [row for path, row in after.items() if path != str(first)] == [
        row for path, row in rows.items() if path in after and path != str(first)
    ]


def test_update_holds_for_every_format_and_not_for_another_model(engine, folder, tmp_path, tiny_detector):
    for ending in ("csv", "parquet", "ndjson"):
        out = tmp_path / f"out.{ending}"
        scan(engine, folder, out)
        before, scored = read(out), []
        scan(engine, folder, out, Wanted(update=True), score=noting(scored))
        assert [Path(path).name for path in scored] == ["broken.png", "empty.jpg"], ending
        assert read(out) == before


def noting(scored):
    def score(engine, entries):
        for entry in entries:
            scored.append(entry.path)
            yield from scan_rows.scored(engine, iter([entry]))

    return score


def test_two_scans_of_one_output_refuse_each_other_and_so_do_two_kinds(engine, folder, tmp_path):
    out = tmp_path / "out.csv"
    with Scan(engine, Folder(folder), out) as first:
        with pytest.raises(DataError, match="another scan is writing"), Scan(engine, Folder(folder), out):
            pass
        first.run()
    with pytest.raises(DataError, match=r"left unfinished, of another kind.*--fresh"):
        scan(engine, folder / "b", out)
    other = Engine(engine.detector.with_policy(0.2), "cpu")
    with pytest.raises(DataError, match=r"alpha was .*, now 0.2"):
        scan(other, folder, out)
    assert scan(other, folder, out, Wanted(fresh=True)).counts.images == 31
    assert not (tmp_path / ".out.csv.scan").exists()


def test_a_false_discovery_rate_is_that_of_the_whole_scan(engine, folder, tmp_path):
    n = engine.detector.calibration.n
    summary = scan(engine, folder, tmp_path / "out.parquet", Wanted(fdr=0.2))
    rows = [row for row in read(tmp_path / "out.parquet") if row["error"] is None]
    expected = benjamini_hochberg([row["p_value"] for row in rows], 0.2)
    assert [row["outlier"] for row in rows] == expected.tolist()
    assert summary.outliers == expected.sum() > 0
    with pytest.raises(CalibrationError, match=f"with {n} calibration pictures --fdr 0.001 .* at least 9999"):
        scan(engine, folder, tmp_path / "out.parquet", Wanted(fdr=0.001))


def test_a_folder_that_is_other_as_a_whole_is_told_from_one_with_defects(engine, digits_folder, tmp_path):
    good = sorted((digits_folder / "good").iterdir())[:160]
    odd = sorted((digits_folder / "7").iterdir())[:40]
    for name, change, shifted in (("same", None, False), ("dark", 0.4, True)):
        (tmp_path / name).mkdir()
        for path in good:
            with Image.open(path) as image:
                (image if change is None else image.point(lambda v: int(v * 0.4))).save(tmp_path / name / path.name)
        if not shifted:
            for path in odd:
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
        summary = scan(engine, tmp_path / name, tmp_path / f"{name}.csv")
        assert (summary.shift is not None) == shifted, name


def test_a_result_that_cannot_be_written_keeps_what_was_done(engine, folder, tmp_path):
    out = tmp_path / "out.csv"
    out.mkdir()
    (out / "x").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*mend that and repeat"):
        scan(engine, folder, out)
    (out / "x").unlink()
    out.rmdir()
    scored = []
    scan(engine, folder, out, score=noting(scored))
    assert scored == []
    assert len(read(out)) == 33


@pytest.mark.parametrize(("out", "says"), [
    ("out.csv", "holds no picture"),
    ("out.xlsx", "use one of .parquet, .csv, .jsonl, .ndjson"),
    ("missing/out.csv", "cannot write"),
])  # fmt: skip
def test_mistakes_name_the_remedy(engine, tmp_path, out, says):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=says):
        scan(engine, tmp_path / "empty", tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    with pytest.raises(ConfigError, match="a source with an order of its own"):
        Scan(engine, source_of("-", 1), tmp_path / "x.csv", Wanted(update=True))

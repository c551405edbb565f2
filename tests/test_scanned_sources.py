"""Scans of what is no folder: lists, standard input, archives; killed, they go on, and damage is a row."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from anomaly_vae import DataError, Engine
from anomaly_vae.scanning import Scan
from anomaly_vae.sources import source_of
from anomaly_vae.tables import reading

MOST = 1 << 20


@pytest.fixture
def engine(tiny_detector):
    return Engine(tiny_detector, "cpu", max_batch=8)


@pytest.fixture
def pictures(digits_folder):
    return sorted((digits_folder / "good").iterdir())[:40]


def sources(folder, pictures, kind):
    """A list, a list with NULs, a zip or a tar of the pictures, a file that is no picture in the middle."""
    (folder / "broken.png").write_bytes(b"no picture")
    files = [*pictures[:20], folder / "broken.png", *pictures[20:]]
    place = folder / f"in.{kind}"
    if kind in ("txt", "lst"):
        end = b"\n" if kind == "txt" else b"\0"
        place.write_bytes(end.join(os.fsencode(file) for file in files))
    elif kind == "zip":
        with zipfile.ZipFile(place, "w") as archive:
            for file in files:
                archive.write(file, file.name)
    else:
        with tarfile.open(place, "w:gz") as archive:
            for file in files:
                archive.add(file, file.name)
    return place


def run(engine, place, out, stop_after=None):
    """The rows, and how many pictures were scored in this go."""
    scored = []

    def report(counts):
        scored.append(counts.images)
        if stop_after is not None and counts.images > stop_after:
            raise KeyboardInterrupt

    with Scan(engine, source_of(str(place), MOST), out) as scan:
        scan.finish(scan.run(report))
    return [row for table in reading(out, scan.schema) for row in table.to_pylist()], max(scored, default=0)


@pytest.mark.parametrize("kind", ["txt", "lst", "zip", "tar.gz"])
def test_a_scan_that_was_killed_goes_on(engine, pictures, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("anomaly_vae.scan_ledger._ROWS", 8)
    place = sources(tmp_path, pictures, kind)
    whole, _ = run(engine, place, tmp_path / "whole.parquet")
    assert [Path(row["path"]).name for row in whole if row["error"]] == ["broken.png"]
    assert len({row["path"] for row in whole}) == len(whole) == 41
    with pytest.raises(KeyboardInterrupt):
        run(engine, place, tmp_path / "out.parquet", stop_after=20)
    rows, scored = run(engine, place, tmp_path / "out.parquet")
    assert rows == whole
    assert 0 < scored < 20


@pytest.mark.parametrize("kind", ["txt", "zip"])
def test_what_changed_since_is_not_gone_on_with(engine, pictures, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("anomaly_vae.scan_ledger._ROWS", 8)
    place = sources(tmp_path, pictures, kind)
    with pytest.raises(KeyboardInterrupt):
        run(engine, place, tmp_path / "out.csv", stop_after=20)
    sources(tmp_path, pictures[1:], kind)
    with pytest.raises(DataError, match=r"left unfinished, of another kind \(source was .*--fresh"):
        run(engine, place, tmp_path / "out.csv")


def test_a_path_that_a_list_has_twice_has_two_rows_of_the_same(engine, pictures, tmp_path):
    (tmp_path / "in.txt").write_text(f"{pictures[0]}\n{pictures[1]}\n{pictures[0]}\n{tmp_path}/gone.png\n")
    rows, _ = run(engine, tmp_path / "in.txt", tmp_path / "out.csv")
    assert [row["path"] for row in rows] == [
        str(pictures[0]),
        str(pictures[1]),
        str(pictures[0]),
        f"{tmp_path}/gone.png",
    ]
    assert rows[0] == rows[2] != rows[1]
    assert rows[3]["error"] == "cannot be read: No such file or directory"


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_damaged_archive_is_rows_with_errors(engine, pictures, tmp_path, kind):
    place = sources(tmp_path, pictures, kind)
    raw = bytearray(place.read_bytes())
    raw[raw.index(pictures[5].name.encode()) + 60 if kind == "zip" else len(raw) // 3] ^= 255
    place.write_bytes(raw)
    rows, _ = run(engine, place, tmp_path / "out.jsonl")
    errors = {row["path"].removeprefix(f"{place}"): row["error"] for row in rows if row["error"]}
    if kind == "zip":
        assert len(rows) == 41
        assert len(errors) == 2
        assert "Bad CRC-32" in errors[f"/{pictures[5].name}"]
    else:
        assert rows[-1]["path"] == str(place)
        assert errors[""].startswith("cannot be read: ")


def test_the_name_of_a_result_may_be_no_utf_8(engine, pictures, tmp_path):
    out = tmp_path / os.fsdecode(b"caf\xe9.csv")
    rows, _ = run(engine, sources(tmp_path, pictures, "zip"), out)
    assert len(rows) == 41


def test_find_print0_into_the_command_killed_and_gone_on_with(tiny_bundle, pictures, tmp_path):
    """The command as a user runs it."""
    listed = b"".join(os.fsencode(picture) + b"\0" for picture in pictures * 3)
    words = [sys.executable, "-m", "anomaly_vae", "scan", tiny_bundle, "-", "--out", tmp_path / "out.jsonl", "--json"]
    first = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert first.stdin is not None
    # Standard input stays open, so that the scan waits for more until it is killed.
    first.stdin.write(listed[: len(listed) // 2])
    first.stdin.flush()
    deadline = time.monotonic() + 100
    while not (tmp_path / ".out.jsonl.scan" / "scan.json").exists():
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (tmp_path / "out.jsonl").exists()
    done = subprocess.run(words, input=listed, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 120
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == [str(picture) for picture in pictures * 3]

"""A watch as a user has it: files come, are replaced, broken, slow or strangely named; each is scored once."""

import os
import shutil
import signal
import time
import urllib.request

import pytest
from bad_bytes import bad_bytes
from forked import command
from PIL import Image
from watches import SECONDS, fill, watching

from anomaly_vae import Engine
from anomaly_vae.scanning import Scan
from anomaly_vae.sources import Folder
from anomaly_vae.training import train


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "incoming"
    place.mkdir()
    return place


def names(rows):
    return sorted(row["path"].rsplit("/", 1)[1] for row in rows)


def test_every_file_there_and_to_come_is_one_line_with_the_verdict_of_a_scan(
    tiny_bundle, tiny_detector, folder, good, odd, tmp_path
):
    fill(folder / "a" / "deep", good[:9])
    fill(folder, odd[:4])
    fill(folder / ".hidden", good[:1])
    (folder / "notes.txt").write_text("no picture")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    strange = folder / os.fsdecode(b"caf\xe9.png")
    shutil.copyfile(good[20], strange)
    (folder / "broken.png").write_bytes(bad_bytes()["half a png"])
    with watching(tiny_bundle, folder) as watch:
        watch.wait_note("caught up; 15 files")
        fill(folder / "b", good[10:14])
        shutil.copyfile(good[21], folder / os.fsdecode(b"na\xefve.png"))
        rows = watch.wait_lines(20)
        assert watch.stop(signal.SIGINT) == 0
        last = watch.notes[-1]
    assert len(watch.lines) == 20
    assert last.startswith("stopped: 20 files scored: ")
    assert "1 unreadable" in last
    engine = Engine(tiny_detector, "cpu")
    with Scan(engine, Folder(folder), tmp_path / "out.jsonl") as scan:
        scan.run()
        wanted = {row["path"]: row for table in scan.ledger.tables() for row in table.to_pylist()}
    assert {row["path"] for row in rows} == set(wanted)
    for row in rows:
        same = wanted[row["path"]]
        for name in ("size", "mtime", "sha256", "p_value", "outlier", "error", "version"):
            assert row[name] == same[name], name
        if row["error"] is None:
            assert row["score"] == pytest.approx(same["score"], rel=1e-5)
            assert row["parts"]["kl"] == pytest.approx(same["part_kl"], rel=1e-5)
            assert set(row["parts"]) == set(tiny_detector.spec.parts)
    assert len({row["id"] for row in rows}) == 20
    assert sum(row["outlier"] is True for row in rows) == int(last.split(" outliers")[0].split()[-1])


def test_a_file_that_is_still_written_is_scored_when_it_is_whole_and_a_broken_one_is_told_of(tiny_bundle, folder, good):
    data = good[0].read_bytes()
    with watching(tiny_bundle, folder, "--patience", "60") as watch:
        watch.wait_note("caught up; 0 files")
        with (folder / "slow.png").open("wb") as file:
            for i in range(4):
                file.write(data[len(data) * i // 4 : len(data) * (i + 1) // 4])
                file.flush()
                time.sleep(0.35)  # longer than a file settles
        row = watch.wait_lines(1)[0]
        assert (row["error"], row["size"]) == (None, len(data))
        assert watch.stop() == 0
        assert len(watch.lines) == 1
    (folder / "broken.png").write_bytes(data[: len(data) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    with watching(tiny_bundle, folder) as watch:
        rows = watch.wait_lines(2)
        assert names(rows) == ["broken.png", "empty.jpg"]
        assert "ends before its last pixel" in next(row for row in rows if "broken" in row["path"])["error"]
        # Written on after it was given up, it is another file.
        (folder / "broken.png").write_bytes(data)
        assert watch.wait_lines(3)[2]["error"] is None
        assert watch.stop() == 0
        assert "3 files scored" in watch.notes[-1]


def test_a_file_that_is_replaced_is_scored_again_and_one_that_is_not_never(tiny_bundle, folder, good, odd):
    fill(folder, good[:3])
    with watching(tiny_bundle, folder) as watch:
        watch.wait_lines(3)
        shutil.copyfile(odd[0], folder / "000.png")
        new = folder / ".001.tmp"
        shutil.copyfile(odd[1], new)
        new.replace(folder / "001.png")
        rows = watch.wait_lines(5)[3:]
        assert names(rows) == ["000.png", "001.png"]
        before = {row["path"]: row["sha256"] for row in watch.lines[:3]}
        assert all(row["sha256"] != before[row["path"]] for row in rows)
        assert watch.stop() == 0
    shutil.copyfile(good[5], folder / "003.png")  # while nobody watches
    with watching(tiny_bundle, folder, "--only-new") as watch:
        assert names(watch.wait_lines(1)) == ["003.png"]
        watch.wait_note("caught up; 4 files")
        assert watch.stop() == 0
        assert len(watch.lines) == 1
    with watching(tiny_bundle, folder, "--fresh") as watch:
        watch.wait_lines(4)
        watch.wait_note("caught up; 4 files")
        assert watch.stop() == 0
        assert len(watch.lines) == 4


def test_only_new_files_on_request_and_a_second_watch_is_refused(tiny_bundle, folder, good, tmp_path):
    fill(folder, good[:3])
    with watching(tiny_bundle, folder, "--only-new") as watch:
        watch.wait_note("3 files that are there already are left out")
        watch.wait_note("caught up; 3 files")
        second = command("watch", tiny_bundle, folder, timeout=SECONDS)
        assert second.returncode == 2
        assert "another watch is using" in second.stderr
        assert "--state" in second.stderr
        fill(folder, good[5:6], start=9)
        assert names(watch.wait_lines(1)) == ["009.png"]
        assert watch.stop() == 0
        assert len(watch.lines) == 1


def test_another_bundle_goes_on_and_says_so(tiny_bundle, tiny_spec, digits_folder, folder, good, tmp_path):
    fill(folder, good[:3])
    state = tmp_path / "state.sqlite"
    with watching(tiny_bundle, folder, "--state", state) as watch:
        first = watch.wait_lines(3)[0]["version"]
        assert watch.stop() == 0
    other = tmp_path / "other"
    train(tiny_spec.with_overrides(["training.steps=20"]), digits_folder, other, device="cpu")
    with watching(other, folder, "--state", state) as watch:
        note = watch.wait_note(f"the bundle was {first} and is ")
        assert "the 3 files that were scored are not scored again (--fresh does that)" in note
        watch.wait_note("the alarms begin anew")
        fill(folder, good[3:4], start=7)
        assert watch.wait_lines(1)[0]["version"] != first
        assert watch.stop() == 0
        assert names(watch.lines) == ["007.png"]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    done = command("watch", tiny_bundle, tmp_path / "other", "--state", state, timeout=SECONDS)
    assert done.returncode == 2
    assert f"is the state of a watch of {folder}; give another --state" in done.stderr


@pytest.mark.parametrize("state_inside", [True, False])
def test_a_folder_that_goes_away_is_waited_for(tiny_bundle, folder, good, tmp_path, state_inside):
    fill(folder, good[:2])
    options = () if state_inside else ("--state", tmp_path / "state.sqlite")
    with watching(tiny_bundle, folder, *options) as watch:
        watch.wait_lines(2)
        folder.rename(tmp_path / "away")
        watch.wait_note("is gone; waiting until it is there again")
        fill(tmp_path / "away", good[4:6], start=5)
        (tmp_path / "away").rename(folder)
        assert names(watch.wait_lines(4)[2:]) == ["005.png", "006.png"]
        shutil.rmtree(folder)
        watch.wait(lambda one: sum("is gone" in note for note in one.notes) == 2)
        assert watch.stop() == 0
        assert len(watch.lines) == 4


def test_more_defects_and_another_camera_raise_alarms_that_are_told_apart(tiny_bundle, folder, good, odd, tmp_path):
    fill(folder / "odd", odd[:30])
    with watching(tiny_bundle, folder, "--metrics-port", "0", "--webhook-for", "all") as watch:
        told = watch.wait_note("ALARM (rate)")
        assert f"examples: {folder}/odd/0" in told
        watch.wait_note("caught up; 30 files")
        figures = scraped(watch)
        assert figures['anomaly_watch_alarm_raised{kind="rate"}'] == 1
        assert figures['anomaly_watch_alarm_raised{kind="shift"}'] == 0
        outliers = sum(row["outlier"] for row in watch.lines)
        assert figures['anomaly_watch_files_total{outcome="outlier"}'] == outliers == figures["anomaly_watch_outliers"]
        assert figures["anomaly_watch_pictures"] == 30
        assert figures["anomaly_watch_rate_alarm_evidence"] >= 200
        assert 0 < figures["anomaly_watch_expected_outlier_ratio"] < 0.05
        watch.stop(signal.SIGKILL)
    (folder / "dark").mkdir()
    for path in good[:160]:
        with Image.open(path) as image:
            image.point(lambda v: int(v * 0.4)).save(folder / "dark" / path.name)
    with watching(tiny_bundle, folder) as watch:
        assert "ALARM (rate)" in watch.wait_note("still raised (--alarms-anew begins anew)")
        told = watch.wait_note("ALARM (shift)")
        assert "look at camera, light, format and scale" in told
        assert f"{folder}/dark/0" in told
        watch.wait_note("caught up; 190 files")
        assert watch.stop() == 0
        assert sum("ALARM (shift)" in note for note in watch.notes) == 1
    with watching(tiny_bundle, folder, "--alarms-anew") as watch:
        watch.wait_note("caught up; 190 files")
        assert watch.stop() == 0
        assert "ALARM" not in watch.words


def scraped(watch):
    url = watch.wait_note("metrics at ").split()[-1]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    lines = opener.open(url, timeout=30).read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


@pytest.mark.parametrize(("words", "says"), [
    (["missing"], "does not exist; give the folder that pictures come into"),
    (["in/a.png"], "is no folder"),
    (["in", "--move"], "--move and --into DIR belong together"),
    (["in", "--move", "--into", "in/done"], "lies inside what is watched"),
    (["in/normal", "--move", "--into", "in"], "lies inside what is watched"),
    (["in", "--webhook", "ftp://x"], "is no address"),
    (["in", "--webhook", "http://127.0.0.1:9/x"], "ANOMALY_VAE_WEBHOOK_SECRET"),
    (["in", "--state", "nowhere/state"], "give another place by --state"),
    (["in", "--state", "in/a.png"], "cannot open the watch's state"),
    (["in", "--settle", "-1"], "--settle is a number of seconds"),
    (["in", "--base-rate", "2"], "--base-rate is a share"),
    (["in", "--alpha", "0.00001"], "alpha"),
    (["in", "--metrics-port", "0", "--metrics-host", "192.0.2.1"], "give another --metrics-port"),
])  # fmt: skip
def test_mistakes_are_one_line_with_a_remedy(tiny_bundle, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANOMALY_VAE_WEBHOOK_SECRET", raising=False)
    (tmp_path / "in" / "normal").mkdir(parents=True)
    (tmp_path / "in" / "a.png").write_bytes(b"no database, and no picture either")
    done = command("watch", tiny_bundle, *words, timeout=SECONDS)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")

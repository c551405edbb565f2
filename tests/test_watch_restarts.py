"""Moves, webhooks and kills: nothing is lost, whatever happens in between."""

import hashlib
import hmac
import os
import random
import shutil
import signal
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from watches import fill, receiving, watching

from anomaly_vae.moving import Clash, free_place, moved

SECRET = "a secret of both"


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("ANOMALY_VAE_WEBHOOK_SECRET", SECRET)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "incoming"
    place.mkdir()
    return place


def digests(folder):
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.png"))


def test_files_move_by_their_verdict_and_never_onto_another(tiny_bundle, folder, good, odd, tmp_path):
    into = tmp_path / "done"
    fill(folder / "line", good[:3])
    fill(folder, odd[:2])
    (folder / "broken.png").write_bytes(b"x")
    with watching(tiny_bundle, folder, "--move", "--into", into) as watch:
        rows = watch.wait_lines(6)
        for row in rows:
            kind = "unreadable" if row["error"] else "outlier" if row["outlier"] else "normal"
            below = Path(row["path"]).relative_to(folder)
            assert Path(row["moved_to"]) == into / kind / below
            assert hashlib.sha256(Path(row["moved_to"]).read_bytes()).hexdigest() == row["sha256"]
        # The same names again, each another file, and once even with the same size and time.
        first = Path(rows[0]["moved_to"]).stat()
        fill(folder / "line", good[10:13])
        again = watch.wait_lines(9)[6:]
        assert sorted(Path(row["moved_to"]).name for row in again if not row["outlier"]) == [
            f"{Path(row['path']).stem}-1.png" for row in sorted(again, key=lambda row: row["path"])
            if not row["outlier"]
        ]  # fmt: skip
        back = Path(rows[0]["path"])
        shutil.copy2(rows[0]["moved_to"], tmp_path / "same")
        os.utime(tmp_path / "same", ns=(first.st_atime_ns, first.st_mtime_ns))
        (tmp_path / "same").replace(back)
        assert watch.wait_lines(10)[9]["path"] == str(back)
        assert watch.stop() == 0
    assert not list(folder.rglob("*.png"))
    assert len(list(into.rglob("*.png"))) == 10


def test_moves_that_cannot_be_done_now_are_done_later(tiny_bundle, folder, good, tmp_path):
    into = tmp_path / "done"
    into.mkdir()
    (into / "normal").write_text("in the way")
    fill(folder, good[:2])
    with watching(tiny_bundle, folder, "--move", "--into", into) as watch:
        assert [row["moved_to"] for row in watch.wait_lines(2)] == [None, None]
        watch.wait_note("it is tried again and again")
        assert watch.stop() == 0
        assert "2 wait to be moved" in watch.notes[-1]
    with watching(tiny_bundle, folder, "--move", "--into", into) as watch:
        watch.wait_note("it is tried again and again")
        (into / "normal").unlink()
        watch.wait_note("files are moved now")
        fill(folder, good[2:3], start=2)
        watch.wait_lines(1)
        assert watch.stop() == 0
        assert len(watch.lines) == 1
    assert digests(into) == sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in good[:3])


def test_killed_at_any_moment_every_file_is_scored_once_told_moved_and_posted(tiny_bundle, folder, good, odd, tmp_path):
    into, chance, lines = tmp_path / "done", random.Random(7), []
    fill(folder, good[:70])
    fill(folder / "odd", odd[:20])
    before = digests(folder)
    with receiving() as receiver:
        options = ("--move", "--into", into, "--webhook", receiver.url, "--webhook-for", "all", "--batch-size", "3")
        for _ in range(7):
            with watching(tiny_bundle, folder, *options) as watch:
                watch.wait_note("watching")
                watch.wait(lambda one: bool(one.lines))
                # Any moment from here on, spread over some batches.
                threading.Event().wait(chance.uniform(0, 0.1))
                watch.stop(signal.SIGKILL)
                lines += watch.lines
        with watching(tiny_bundle, folder, *options) as watch:
            watch.wait(lambda one: len({row["path"] for row in lines + one.lines}) == 90)
            receiver.wait(lambda one: len(one.taken) == 90)
            assert watch.stop() == 0
            lines += watch.lines
    assert len({row["id"] for row in lines}) == 90
    assert {row["id"] for row in lines} == receiver.taken
    assert not list(folder.rglob("*.png"))
    assert digests(into) == before
    told = {row["id"]: row for row in lines}
    assert len(list(into.rglob("*"))) - len([one for one in into.rglob("*") if one.is_dir()]) == 90
    for row in told.values():
        assert hashlib.sha256(Path(row["moved_to"]).read_bytes()).hexdigest() == row["sha256"]


def test_webhooks_are_signed_and_posted_until_they_are_taken_or_refused(tiny_bundle, folder, odd, good):
    told = {"000.png": (500, {}), "001.png": (429, {"Retry-After": "1"}),
            "002.png": (503, {"Retry-After": formatdate(time.time() + 1, usegmt=True)}),
            "003.png": (400, {}), "004.png": (408, {})}  # fmt: skip

    def answer(post, times):
        return told.get(post.name, (200, {})) if times == 1 else (204, {})

    fill(folder, odd[:6])
    fill(folder / "good", good[:5], start=50)
    with (
        receiving(answer) as receiver,
        watching(tiny_bundle, folder, "--webhook", receiver.url, "--metrics-port", "0") as watch,
    ):
        rows = watch.wait_lines(11)
        outliers = {row["id"]: row for row in rows if row["outlier"]}
        assert {f"00{i}.png" for i in range(6)} <= {Path(row["path"]).name for row in outliers.values()}
        receiver.wait(lambda one: len(one.taken) == len(outliers) - 1)
        refused = watch.wait_note("for good")
        assert "003.png" in refused
        assert "answers 400" in refused
        watch.wait_note("takes verdicts again")
        assert watch.stop() == 0
        assert f"{len(outliers) - 1} posted, 1 given up" in watch.notes[-1]
    times = {}
    for post in receiver.posts:
        signed = hmac.new(SECRET.encode(), post.body, hashlib.sha256).hexdigest()
        assert post.headers["x-signature"] == f"sha256={signed}"
        row = post.row
        assert abs(row.pop("timestamp") - time.time()) < 600
        assert row == outliers[post.headers["x-id"]]
        times[post.name] = times.get(post.name, 0) + 1
    assert times["003.png"] == 1
    assert all(times[name] == 2 for name in told if name != "003.png")


def test_a_receiver_that_is_down_gets_everything_when_it_is_back_in_another_go(tiny_bundle, folder, odd):
    with receiving() as gone:
        url, port = gone.url, int(gone.url.split(":")[2].split("/")[0])
    fill(folder, odd[:3])
    with watching(tiny_bundle, folder, "--webhook", url, "--webhook-for", "all") as watch:
        rows = watch.wait_lines(3)
        watch.wait_note("verdicts wait and are posted again")
        assert watch.stop() == 0
        assert "3 wait to be posted" in watch.notes[-1]
    with watching(tiny_bundle, folder) as watch:
        watch.wait_note("3 verdicts wait to be posted; give --webhook")
        assert watch.stop() == 0
    with receiving(port=port) as back, watching(tiny_bundle, folder, "--webhook", url) as watch:
        back.wait(lambda one: len(one.taken) == 3)
        assert back.taken == {row["id"] for row in rows}
        assert watch.stop() == 0


def test_a_move_cut_short_anywhere_is_finished_by_the_next(tmp_path):
    source, place = tmp_path / "a.png", tmp_path / "in" / "a.png"

    def ready(content=b"picture"):
        shutil.rmtree(place.parent, ignore_errors=True)
        place.parent.mkdir()
        source.write_bytes(content)
        return source.stat().st_size, source.stat().st_mtime_ns

    known = ready()
    place.write_bytes(b"")  # reserved, then killed
    assert moved(source, place, *known)
    assert (source.exists(), place.read_bytes()) == (False, b"picture")
    assert moved(source, place, *known)  # done, then killed
    known = ready()
    place.write_bytes(b"picture")  # copied from another file system, then killed
    assert moved(source, place, *known)
    assert not source.exists()
    known = ready()
    place.write_bytes(b"another")
    with pytest.raises(Clash):
        moved(source, place, *known)
    assert (source.read_bytes(), place.read_bytes()) == (b"picture", b"another")
    known = ready()
    source.write_bytes(b"written anew")
    assert not moved(source, place, *known)
    assert source.exists()
    assert not place.exists()
    known = ready()
    source.unlink()
    place.write_bytes(b"")
    assert not moved(source, place, *known)
    assert not place.exists()


def test_a_move_to_another_file_system_keeps_content_and_time(tmp_path):
    other = Path("/dev/shm") / f"watch-{os.getpid()}"
    if not other.parent.is_dir() or other.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    source = tmp_path / "a.png"
    source.write_bytes(b"picture")
    known = source.stat()
    try:
        assert moved(source, other / "a.png", known.st_size, known.st_mtime_ns)
        assert (other / "a.png").read_bytes() == b"picture"
        assert (other / "a.png").stat().st_mtime_ns == known.st_mtime_ns
        assert [path.name for path in other.iterdir()] == ["a.png"]
        assert not source.exists()
    finally:
        shutil.rmtree(other)


def test_a_free_name_is_found_among_thousands(tmp_path):
    assert free_place(tmp_path / "a.png") == tmp_path / "a.png"
    for i in range(300):
        free_place(tmp_path / "a.png").touch()
        assert len(list(tmp_path.iterdir())) == i + 1
    assert free_place(tmp_path / "b.png", {tmp_path / "b.png"}) == tmp_path / "b-1.png"

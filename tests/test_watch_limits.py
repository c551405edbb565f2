"""What a watch does where the world is full, deaf or closed: in this process, with limits of the test's own."""

import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager

import pytest
from watches import QUICK, SECONDS, receiving

from anomaly_vae import Engine
from anomaly_vae.delivering import Standing, Told
from anomaly_vae.file_news import FileNews
from anomaly_vae.watch_alarms import WatchAlarms
from anomaly_vae.watching import Stop, Wanted, watch
from anomaly_vae.webhook import Webhook, checked_url

HASTY = {"settle": 0.05, "patience": 0.1, "every": 0.2}


class Inside:
    """A watch in a thread."""

    def __init__(self, detector, folder, place, webhook=None, **wanted):
        self.rows, self.notes, self.said, self.stop = [], [], threading.Condition(), Stop()
        self.standing = Standing.first(WatchAlarms(detector))

        def make(state, failed):
            return Webhook(checked_url(webhook), "s", state, self._note, failed, self.stop.wake, Counter())

        told = Told(self._say, self._note)
        self.thread = threading.Thread(target=watch, args=[
            Engine(detector, "cpu", max_batch=2), folder, place, Wanted(**HASTY, **wanted), told, self.stop,
            self.standing, None if webhook is None else make,
        ])  # fmt: skip

    def _say(self, lines):
        with self.said:
            self.rows += map(json.loads, lines)
            self.said.notify_all()

    def _note(self, line):
        with self.said:
            self.notes.append(line)
            self.said.notify_all()

    def wait(self, whether):
        with self.said:
            assert self.said.wait_for(lambda: whether(self), SECONDS), self.notes


@contextmanager
def inside(*arguments, **wanted):
    found = Inside(*arguments, **wanted)
    found.thread.start()
    try:
        yield found
    finally:
        found.stop()
        found.thread.join(SECONDS)
        assert not found.thread.is_alive()


@pytest.fixture
def folder(tmp_path, digits_folder):
    place = tmp_path / "incoming"
    place.mkdir()
    for path in sorted((digits_folder / "good").iterdir())[:12]:
        shutil.copyfile(path, place / path.name)
    return place


def test_with_too_many_to_post_nothing_more_is_scored_until_they_are_taken(
    tiny_detector, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("anomaly_vae.watching._MOST_WEBHOOKS", 4)
    let = threading.Event()

    def answer(post, times):
        assert let.wait(SECONDS)
        return 204, {}

    with (
        receiving(answer) as receiver,
        inside(tiny_detector, folder, tmp_path / "state", receiver.url, posted="all") as found,
    ):
        found.wait(lambda one: any("too many verdicts wait to be posted" in note for note in one.notes))
        assert len(found.rows) in (4, 5)  # in batches of one or two
        let.set()
        found.wait(lambda one: len(one.rows) == 12)
        receiver.wait(lambda one: len(one.taken) == 12)


def test_with_too_few_permits_all_files_are_scored_nevertheless(tiny_detector, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("anomaly_vae.file_news.MOST_WAITING", 3)
    with inside(tiny_detector, folder, tmp_path / "state") as found:
        found.wait(lambda one: len(one.rows) == 12)
        shutil.copyfile(sorted(folder.iterdir())[0], folder / "more.png")
        found.wait(lambda one: len(one.rows) == 13)
    assert len({row["path"] for row in found.rows}) == 13


def test_where_nothing_is_heard_listings_find_it(tiny_detector, folder, tmp_path, monkeypatch):
    def deaf(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileNews, "_hear_on", deaf)
    with inside(tiny_detector, folder, tmp_path / "state") as found:
        found.wait(lambda one: any("new files cannot be heard of (No space left" in note for note in one.notes))
        found.wait(lambda one: len(one.rows) == 12)
        shutil.copyfile(sorted(folder.iterdir())[0], folder / "more.png")
        found.wait(lambda one: len(one.rows) == 13)


def test_moved_files_that_are_seen_through_a_link_are_not_scored_again(tiny_detector, folder, tmp_path):
    into = tmp_path / "done"
    into.mkdir()
    (folder / "seen").symlink_to(into, target_is_directory=True)
    with inside(tiny_detector, folder, tmp_path / "state", into=into) as found:
        found.wait(lambda one: len(one.rows) == 12)
        (folder / "late").mkdir()
        shutil.copyfile(next(into.rglob("*.png")), folder / "late" / "late.png")
        found.wait(lambda one: any("late.png" in row["path"] for row in one.rows))
    assert len(found.rows) == 13
    assert len(list(into.rglob("*.png"))) == 13


def test_nobody_reads_any_more_and_the_next_go_prints_what_was_not_read(tiny_bundle, folder):
    words = [sys.executable, "-m", "anomaly_vae", "watch", tiny_bundle, folder, *QUICK, "--batch-size", "2"]
    ended = subprocess.run([*map(str, words)], stdout=open("/dev/full", "w"), stderr=subprocess.PIPE, text=True,  # noqa: PTH123, SIM115
                           timeout=SECONDS)  # fmt: skip
    assert ended.returncode != 0
    assert "error: " in ended.stderr.splitlines()[-1]
    assert "standard output" in ended.stderr.splitlines()[-1]
    from watches import watching

    with watching(tiny_bundle, folder) as found:
        rows = found.wait_lines(12)
        assert "finishing what an earlier watch was stopped in" in "\n".join(found.notes)
        assert len({row["id"] for row in rows}) == len({row["path"] for row in rows}) == 12
        assert found.stop() == 0

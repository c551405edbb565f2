"""The recorder: what was put is kept soon; with the store down nobody waits, losses are counted, and it catches up."""

import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from test_store import NOON, made, record

from service import ids
from service.recorder import Pending, Recorder
from service.store import Kept, Store, Wanted

FOREVER = Kept(picture_days=None, picture_bytes=None)


class Told:
    """What a recorder says of itself."""

    def __init__(self):
        self.writes, self.lost = 0, {"verdict": 0, "picture": 0}

    def store_wrote(self, seconds):
        self.writes += 1

    def store_lost(self, what, count):
        self.lost[what] += count

    def watch_store(self, waiting, up):
        self.waiting, self.up = waiting, up


@pytest.fixture
def told():
    return Told()


def kept(store):
    return sorted(row["id"] for row in store.verdicts(Wanted(), limit=10**6))


def test_what_was_put_is_kept_within_the_time_that_is_promised_and_in_few_writes(store_place, told):
    store = Store(store_place)
    recorder = Recorder(store, told, FOREVER, flush_seconds=0.2)
    records = made(900)
    for one in records:
        recorder.put(Pending(one))
    assert recorder.flush(30)
    assert kept(store) == [r.id for r in records]
    assert told.writes <= 5
    assert recorder.standing() == {"state": "ok", "waiting": 0, "lost_verdicts": 0, "lost_pictures": 0}
    late = record(ids.first_at(NOON + 5000))
    recorder.put(Pending(late))
    assert recorder.close(30), "what still waits is kept at the end"
    assert store.verdict(late.id) is not None
    store.close()


def test_pictures_are_drawn_off_the_request_path(store_place, told):
    store, threads = Store(store_place), []

    def draw():
        threads.append(threading.current_thread().name)
        return b"png"

    def fail():
        raise ValueError("no picture")

    recorder = Recorder(store, told, FOREVER)
    first, second = made(2)
    recorder.put(Pending(first, draw, 100))
    recorder.put(Pending(second, fail, 100))
    assert recorder.close(30)
    assert threads == ["recorder"]
    assert store.picture(first.id) == b"png"
    assert store.verdict(second.id) is not None
    assert told.lost == {"verdict": 0, "picture": 1}
    store.close()


def test_while_the_database_is_down_verdicts_wait_and_are_kept_when_it_returns(postgres_server, told):
    store = Store(postgres_server.url())
    recorder = Recorder(store, told, FOREVER, flush_seconds=0.05, most_waiting=300, most_picture_bytes=500)
    before, during, beyond = made(10), made(250, NOON + 1000), made(100, NOON + 5000)
    for one in before:
        recorder.put(Pending(one))
    assert recorder.flush(30)
    postgres_server.stop()
    try:
        started = time.monotonic()
        for one in during:
            recorder.put(Pending(one, lambda: b"p" * 100, 100))
        assert told.lost == {"verdict": 0, "picture": 245}, "pictures are given up first"
        for one in beyond:
            recorder.put(Pending(one))
        assert time.monotonic() - started < 5, "nobody waits for the store"
        assert told.lost["verdict"] == 50
        until = time.monotonic() + 30
        while recorder.standing()["state"] == "ok" and time.monotonic() < until:
            time.sleep(0.02)
        standing = recorder.standing()
        assert (standing["state"], standing["waiting"], standing["lost_verdicts"]) == ("behind", 300, 50)
        assert (told.up(), told.waiting()) == (0.0, 300)
    finally:
        postgres_server.start()
    assert recorder.flush(60)
    assert recorder.standing()["state"] == "ok"
    assert told.up() == 1.0
    assert kept(store) == sorted(r.id for r in [*before, *during, *beyond[:50]])
    assert sum(store.picture(r.id) is not None for r in during) == 5
    # There is room for pictures again.
    last = record(ids.first_at(NOON + 9000))
    recorder.put(Pending(last, lambda: b"p" * 400, 400))
    assert recorder.close(30)
    assert store.picture(last.id)
    store.close()


def test_ending_while_the_database_is_down_says_what_is_lost(postgres_server, told):
    store = Store(postgres_server.url())
    recorder = Recorder(store, told, FOREVER, flush_seconds=0.01)
    postgres_server.stop()
    try:
        for one in made(40):
            recorder.put(Pending(one))
        assert recorder.close(30)
        assert told.lost["verdict"] == 40
        assert recorder.standing()["lost_verdicts"] == 40
    finally:
        postgres_server.start()
    store.close()


def test_a_full_disk_is_survived(tmp_path):
    """A bound on the size of files stands for the disk: SQLite then fails in the same way, in the middle of a write."""
    code = """if True:
        import resource, signal, sys, time
        from service.recorder import Pending, Recorder
        from service.store import Kept, Store
        from test_recorder import Told, kept
        from test_store import made
        told, store = Told(), Store(sys.argv[1])
        recorder = Recorder(store, told, Kept(None, None, None), flush_seconds=0.05)
        records = made(60)
        recorder.put(Pending(records[0]))
        assert recorder.flush(30)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        for one in records[1:]:
            recorder.put(Pending(one, lambda: bytes(20_000), 20_000))
            time.sleep(0.01)
        until = time.monotonic() + 30
        while recorder.standing()["state"] == "ok" and time.monotonic() < until:
            time.sleep(0.02)
        assert recorder.standing()["state"] == "behind", recorder.standing()
        assert 0 < len(kept(store)) < 60
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert recorder.flush(30)
        assert kept(store) == [one.id for one in records]
        assert told.lost == {"verdict": 0, "picture": 0}
        assert recorder.close(30)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "s.sqlite"], cwd=Path(__file__).parent, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_one_verdict_that_the_store_refuses_does_not_keep_out_the_others(store_place, told):
    store = Store(store_place)
    there, *others = made(30)
    store.write([there])
    recorder = Recorder(store, told, FOREVER, flush_seconds=0.05)
    bad = record(ids.first_at(NOON + 7777), filename=None, model=None)
    for one in [*others[:10], bad, there, *others[10:]]:
        recorder.put(Pending(one))
    assert recorder.close(30)
    assert kept(store) == [there.id, *(r.id for r in others)]
    assert told.lost["verdict"] == 1, "one that is there already is not lost"
    store.close()


def test_old_pictures_go_without_anybody_asking(tmp_path, told):
    store = Store(str(tmp_path / "s.sqlite"))
    old, new = record(ids.first_at(time.time() - 2 * 86_400), png=b"old"), record(ids.first_at(time.time()), png=b"new")
    store.write([old, new])
    recorder = Recorder(store, told, Kept(picture_days=1.0), flush_seconds=0.01)
    recorder.put(Pending(record(ids.first_at(time.time() + 1))))
    assert recorder.close(30)
    assert (store.picture(old.id), store.picture(new.id)) == (None, b"new")
    store.close()


def noting(done: list[str], what: str, call, *arguments):
    done.append(what)
    return call(*arguments)


def test_tidying_goes_on_a_little_at_a_time_and_nothing_is_lost_meanwhile(tmp_path, told, monkeypatch):
    monkeypatch.setattr("service.recorder._TIDY_ROWS", 50)
    store = Store(str(tmp_path / "s.sqlite"))
    store.write(made(5000, time.time() - 10 * 86_400, 1.0))
    done: list[str] = []
    for what in ("write", "tidy"):
        monkeypatch.setattr(store, what, partial(noting, done, what, getattr(store, what)))
    recorder = Recorder(store, told, Kept(verdict_days=1.0), flush_seconds=0.01, most_waiting=120)
    new = made(600, time.time())
    for one in new:
        while recorder.standing()["waiting"] >= 60:
            time.sleep(0.001)
        recorder.put(Pending(one))
    assert recorder.flush(30)
    assert "tidy" in done[: len(done) - done[::-1].index("write")]
    assert told.lost["verdict"] == 0
    until = time.monotonic() + 60
    while len(kept(store)) > 600 and time.monotonic() < until:
        time.sleep(0.05)
    assert kept(store) == [one.id for one in new]
    assert done.count("tidy") >= 5000 / 50
    assert recorder.close(30)
    store.close()


def test_whatever_goes_wrong_the_recorder_goes_on_and_says_so(tmp_path, told, monkeypatch):
    store = Store(str(tmp_path / "s.sqlite"))
    recorder = Recorder(store, told, FOREVER, flush_seconds=0.01)
    first, second = made(2)
    write = store.write
    monkeypatch.setattr(store, "write", lambda records: 1 / 0)
    recorder.put(Pending(first))
    assert recorder.flush(30)
    assert (recorder.standing()["state"], recorder.standing()["lost_verdicts"]) == ("behind", 1)
    monkeypatch.setattr(store, "write", write)
    recorder.put(Pending(second))
    assert recorder.flush(30)
    assert recorder.standing()["state"] == "ok"
    assert kept(store) == [second.id]
    assert recorder.close(30)
    store.close()

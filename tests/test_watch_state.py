"""What a watch keeps, and when a file is whole: by a clock of the test's own."""

import pytest

from anomaly_vae.arrivals import Arrivals
from anomaly_vae.errors import DataError
from anomaly_vae.paths import order_of
from anomaly_vae.watch_alarms import WatchAlarms
from anomaly_vae.watch_state import Seen, Verdict, WatchState, key_of, path_of
from anomaly_vae.webhook import backoff, told_wait


@pytest.fixture
def state(tmp_path):
    with WatchState(tmp_path / "state.sqlite", tmp_path) as opened:
        yield opened


def test_keys_are_paths_in_the_order_of_listings(tmp_path):
    names = ["a", "a/b", "a-b", "a.png", "a/b.png", "ab", "A", "é"]
    paths = [tmp_path / name for name in names]
    assert [path_of(tmp_path, key_of(tmp_path, path)) for path in paths] == paths
    assert sorted(paths, key=lambda path: key_of(tmp_path, path)) == sorted(
        paths, key=lambda path: order_of(str(path.relative_to(tmp_path)))
    )


def test_files_that_are_gone_for_long_are_forgotten_and_those_that_come_back_are_not(state):
    state.leave_out(Seen(name, 1, 1) for name in (b"a", b"b", b"c"))
    state.mark([b"a", b"b"], [], now=100, forget_before=0)
    state.mark([b"a"], [b"b"], now=150, forget_before=0)
    state.mark([], [], now=200, forget_before=100)
    assert {one.key: gone for one, gone in state.files()} == {b"a": True, b"b": False, b"c": False}
    state.mark([], [], now=300, forget_before=101)
    assert [one.key for one, _ in state.files()] == [b"b", b"c"]


def test_more_files_than_a_page_are_listed_once_in_order(state):
    keys = [f"{i:05}".encode() for i in range(2500)]
    state.leave_out(Seen(key, 1, 1) for key in reversed(keys))
    assert [one.key for one, _ in state.files()] == keys


def test_verdicts_stay_until_they_are_finished(tmp_path):
    place = tmp_path / "state.sqlite"
    with WatchState(place, tmp_path) as state:
        kept = [Verdict(Seen(b"a", 1, 2), {"id": "1"}, None), Verdict(Seen(b"b", 1, 2), {"id": "2"}, b"/x")]
        state.keep(kept, {"alarms": 7})
    with WatchState(place, tmp_path) as state:
        assert state.unfinished() == kept
        assert (state.fact("alarms"), state.known(b"a")) == (7, Seen(b"a", 1, 2))
        state.finish(kept[:1], kept[1:], [{"id": "1"}], now=5)
        assert [(one.row["id"], one.said) for one in state.unfinished()] == [("2", True)]
        first = state.next_webhook()
        assert (first.body, first.tries) == ({"id": "1"}, 0)
        state.webhook_later(first.seq, due=9)
        assert (state.next_webhook().tries, state.next_webhook().due) == (1, 9)
        state.finish(kept[1:], [], [], now=5)
        # Moved away, its name is free; what stays is known.
        assert (state.known(b"a"), state.known(b"b")) == (Seen(b"a", 1, 2), None)


def test_a_lock_is_for_one_and_a_state_for_one_folder(tmp_path, state):
    with pytest.raises(DataError, match="another watch is using"), WatchState(tmp_path / "state.sqlite", tmp_path):
        pass
    (tmp_path / "other").mkdir()
    place = tmp_path / "other" / "state.sqlite"
    with WatchState(place, tmp_path / "other"):
        pass
    with pytest.raises(DataError, match="is the state of a watch of"), WatchState(place, tmp_path / "third"):
        pass


class Files(dict):
    def put(self, name, size):
        self[name] = Seen(name, size, 0)
        return self[name]


def test_a_file_is_whole_when_it_has_not_changed_and_a_doubtful_one_gets_its_patience_for_every_change():
    files = Files()
    arrivals = Arrivals(files.get, settle=1, patience=10)
    arrivals.saw(files.put(b"a", 1), now=0)
    assert arrivals.ready(0.9, 9) == []
    files.put(b"a", 2)
    assert arrivals.ready(1, 9) == []  # it grew unheard
    assert arrivals.next_due() == 2
    assert arrivals.ready(2, 9) == [(files[b"a"], False)]
    arrivals.doubt(files[b"a"], now=2)
    assert arrivals.ready(10.9, 9) == []
    arrivals.saw(files.put(b"a", 3), now=10.9)
    [(seen, had_its_time)] = arrivals.ready(11.9, 9)
    assert (seen.size, had_its_time) == (3, False)
    arrivals.doubt(seen, now=12)
    assert arrivals.ready(21, 9) == [(files[b"a"], True)]
    assert len(arrivals) == 0


def test_files_that_go_are_not_waited_for_and_a_batch_is_no_larger_than_wanted():
    files = Files()
    arrivals = Arrivals(files.get, settle=1, patience=1)
    for name in (b"a", b"b", b"c"):
        arrivals.saw(files.put(name, 1), now=0)
    del files[b"a"]
    assert [one.key for one, _ in arrivals.ready(5, 1)] == [b"b"]
    assert [one.key for one, _ in arrivals.ready(5, 9)] == [b"c"]
    assert (len(arrivals), arrivals.next_due()) == (0, None)


def test_alarms_go_on_as_if_they_had_never_stopped(tiny_detector, digits_folder):
    import json

    import torch

    paths = [*sorted((digits_folder / "good").iterdir())[:80], *sorted((digits_folder / "7").iterdir())[:10]]
    judged = [tiny_detector.judge(torch.stack([tiny_detector.prepare(path.read_bytes())])) for path in paths]
    whole, parts = WatchAlarms(tiny_detector), WatchAlarms(tiny_detector)
    raised = []
    for path, one in zip(paths, judged, strict=True):
        raised += whole.count([path.name], one)
        parts.count([path.name], one)
        packed = json.loads(json.dumps(parts.packed()))
        parts = WatchAlarms(tiny_detector)
        assert parts.go_on(packed)
    assert raised == ["rate"]
    assert parts.packed() == whole.packed()
    assert parts.message("rate") == whole.message("rate")
    assert not WatchAlarms(tiny_detector, base_rate=0.5).go_on(whole.packed())


def test_waits_grow_to_a_bound_and_the_receivers_word_counts():
    from httpx import Headers

    assert [backoff(n) for n in (1, 2, 3)] == [0.5, 1, 2]
    assert backoff(1000) == 60
    assert told_wait(Headers({"Retry-After": "7"}), 0) == 7
    assert told_wait(Headers({"Retry-After": "Thu, 01 Jan 1970 00:02:00 GMT"}), 100) == 20
    assert told_wait(Headers({"Retry-After": "Thu, 01 Jan 1970 00:02:00 GMT"}), 500) == 0
    assert told_wait(Headers({"Retry-After": "99999999"}), 0) == 3600
    assert [told_wait(Headers(one), 0) for one in ({}, {"Retry-After": "soon"})] == [None, None]

"""What comes slowly is taken as it comes, what comes quickly in full batches, and nothing is held without end."""

import threading
import time

import pytest

from anomaly_vae.trickling import Trickle


def test_what_comes_quickly_is_taken_in_full_batches_and_in_order():
    with Trickle(iter(range(10_000)), patience=60) as coming:
        batches = []
        while batch := coming.take(32):
            batches.append(batch)
    assert [one for batch in batches for one in batch] == list(range(10_000))
    assert [len(batch) for batch in batches] == [32] * 312 + [16]


def test_a_batch_does_not_wait_for_what_does_not_come():
    go = threading.Semaphore(0)

    def slow():
        for i in range(5):
            go.acquire()
            yield i

    with Trickle(slow(), patience=0.05) as coming:
        go.release(2)
        found = coming.take(32)
        while len(found) < 2:
            found += coming.take(32)
        assert found == [0, 1]
        go.release(3)
        while more := coming.take(32):
            found += more
        assert found == [0, 1, 2, 3, 4]


def test_no_more_is_held_than_there_is_room_for():
    listed = []
    with Trickle((listed.append(i) or i for i in range(1000)), patience=60, room=50) as coming:
        for _ in range(20):
            before = len(listed)
            assert len(coming.take(10)) == 10
            assert len(listed) - before <= 61
        assert len(listed) <= 200 + 51


def test_what_breaks_the_listing_is_raised_behind_what_was_listed():
    def breaking():
        yield from range(40)
        raise OSError("broken")

    with Trickle(breaking(), patience=60) as coming:
        assert coming.take(32) == list(range(32))
        assert coming.take(32) == list(range(32, 40))
        with pytest.raises(OSError, match="broken"):
            coming.take(32)


def test_who_leaves_is_not_kept_by_a_source_that_never_goes_on():
    never = threading.Event()

    def stuck():
        yield 1
        never.wait()

    got = []
    with Trickle(stuck(), patience=0.01) as coming:
        assert coming.take(32) == [1]
        waiting = threading.Thread(target=lambda: got.append(coming.take(32)))
        waiting.start()
        time.sleep(0.02)
    waiting.join(60)
    never.set()
    assert got == [[]]

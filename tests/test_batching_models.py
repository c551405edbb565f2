"""One thread for several models: whose batch is next, which of them is broken, and work between batches."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from judging import SOON, Judge, held_up, made, picture, put

from service.tickets import NotAccepted, NotScored, Target


def test_a_batch_is_for_one_model_and_pictures_for_others_keep_their_places() -> None:
    judge, other = Judge(open_=False), Judge()
    batcher = made(judge, max_batch=3)
    held = held_up(judge, batcher)
    to_other = Target(other, picture(0))
    tickets = []
    for value in range(2, 10):
        with batcher.reserve() as places:
            tickets.append(places.submit(picture(value), to_other if value % 2 else None))
    assert batcher.depth() == 8
    judge.gate.set()
    assert [ticket.result().row["score"] for ticket in [held, *tickets]] == list(range(1, 10))
    assert judge.batches == [[1], [2, 4, 6], [8]]
    assert other.batches == [[3, 5, 7], [9]]
    assert judge.threads == other.threads
    assert batcher.close(SOON)
    assert batcher.depth() == 0


def test_a_model_that_breaks_is_told_from_a_bad_picture_by_its_own_probe() -> None:
    judge, other = Judge(), Judge()
    other.broken = True
    lost: list[Exception] = []
    batcher = made(judge, on_lost=lost.append)
    with batcher.reserve() as places:
        failing = places.submit(picture(3), Target(other, picture(0)))
    with pytest.raises(NotScored) as failure:
        failing.result()
    assert failure.value.reason == "failed"
    assert lost


def test_work_is_done_on_the_models_thread_between_batches() -> None:
    judge = Judge(open_=False)
    batcher = made(judge)
    held = held_up(judge, batcher)
    done: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        called = pool.submit(batcher.run, lambda: done.append(threading.get_ident()))
        queued = put(batcher, 2)
        assert not done
        judge.gate.set()
        called.result(SOON)
    assert {held.result().row["score"], queued.result().row["score"]} == {1, 2}
    assert set(done) == judge.threads

    def fail() -> None:
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        batcher.run(fail)
    assert put(batcher, 5).result().row["score"] == 5
    assert batcher.close(SOON)
    with pytest.raises(NotAccepted):
        batcher.run(lambda: None)

"""Laws of the queue before the model: order, bounds, deadlines, isolation of bad pictures, draining, no starvation."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from judging import SOON, Clock, Judge, held_up, made, picture, put, slowed
from torch import Tensor

from service.batching import Batcher
from service.tickets import NotAccepted, NotScored, Scored, Ticket


def test_an_idle_model_starts_at_once_and_what_waited_goes_together_in_order() -> None:
    judge = Judge(open_=False)
    batcher = made(judge, max_batch=4)
    first = held_up(judge, batcher)
    rest = [put(batcher, value) for value in range(2, 9)]
    judge.gate.set()
    assert [ticket.result().row["score"] for ticket in [first, *rest]] == list(range(1, 9))
    assert judge.batches == [[1], [2, 3, 4, 5], [6, 7, 8]]
    assert batcher.close(SOON)


def test_the_model_lives_on_one_thread_from_its_start() -> None:
    judge = Judge()

    def start() -> tuple[Judge, Tensor]:
        judge(picture(0), False)
        return judge, picture(0)

    batcher = Batcher(start)
    batcher.until_started()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda value: put(batcher, value).result(), range(32)))
    assert len(judge.threads) == 1
    assert threading.get_ident() not in judge.threads
    assert batcher.close(SOON)


def test_a_model_that_cannot_start_says_why_and_accepts_nothing() -> None:
    lost: list[Exception] = []

    def start() -> tuple[Judge, Tensor]:
        raise RuntimeError("no device")

    batcher = Batcher(start, on_lost=lost.append)
    with pytest.raises(RuntimeError, match="no device"):
        batcher.until_started()
    with pytest.raises(NotAccepted) as refusal:
        batcher.reserve()
    assert refusal.value.reason == "failed"
    assert batcher.close(SOON)
    assert not lost


def test_who_bounds_himself_is_taken_beyond_a_full_queue_and_others_count_him() -> None:
    judge = Judge(open_=False)
    batcher = made(judge, max_batch=4, queue_size=2)
    first = held_up(judge, batcher)
    beyond = [put(batcher, value, bulk=True, beyond=True) for value in (2, 3, 4)]
    with pytest.raises(NotAccepted) as refusal:
        batcher.reserve()
    assert refusal.value.reason == "queue_full"
    assert not first.settled
    judge.gate.set()
    assert [ticket.result().row["score"] for ticket in [first, *beyond]] == [1, 2, 3, 4]
    assert all(ticket.settled for ticket in [first, *beyond])
    batcher.drain()
    with pytest.raises(NotAccepted) as refusal:
        batcher.reserve(beyond=True)
    assert refusal.value.reason == "draining"
    assert batcher.close(SOON)


def test_places_are_bounded_taken_all_or_none_and_given_back() -> None:
    judge = Judge(open_=False)
    batcher = made(judge, max_batch=4, queue_size=5)
    busy = held_up(judge, batcher)
    with batcher.reserve(4):
        assert batcher.depth() == 4
        with pytest.raises(NotAccepted) as refusal:
            batcher.reserve(2)
        assert refusal.value.reason == "queue_full"
        assert batcher.depth() == 4
        with batcher.reserve(1):
            assert batcher.depth() == 5
    assert batcher.depth() == 0
    with batcher.reserve(5) as places:
        places.skip()
        places.submit(picture(2))
        assert batcher.depth() == 4
    assert batcher.depth() == 1
    judge.gate.set()
    busy.result()
    assert batcher.close(SOON)
    assert batcher.depth() == 0


def test_the_wait_of_a_refusal_grows_with_the_queue() -> None:
    clock = Clock()
    judge = Judge()
    slow = slowed(judge, clock, 2.0)
    batcher = made(slow, max_batch=2, queue_size=6, clock=clock)
    put(batcher, 1).result()
    judge.gate.clear()
    assert judge.entered.acquire(timeout=SOON)
    held_up(judge, batcher)
    waits = []
    for value in (2, 3):
        with batcher.reserve(4), pytest.raises(NotAccepted) as refusal:
            batcher.reserve(3)
        waits.append(refusal.value.retry_after)
        put(batcher, value)
        put(batcher, value)
    assert waits[0] == pytest.approx(6.0)  # the running batch and two more of two seconds each
    assert waits[1] == pytest.approx(8.0)
    judge.gate.set()
    assert batcher.close(SOON)


def test_expired_pictures_are_never_judged() -> None:
    clock = Clock()
    judge = Judge(open_=False)
    batcher = made(judge, clock=clock)
    busy = held_up(judge, batcher)
    late = put(batcher, 2, deadline=clock.now + 5)
    patient = put(batcher, 3, deadline=clock.now + 50)
    clock.now += 10
    judge.gate.set()
    assert patient.result().row == {"score": 3}
    with pytest.raises(NotScored) as failure:
        late.result()
    assert failure.value.reason == "expired"
    assert busy.result().row == {"score": 1}
    assert judge.batches == [[1], [3]]
    assert batcher.close(SOON)


def test_who_waits_gives_up_at_the_deadline_and_frees_the_place() -> None:
    judge = Judge(open_=False)
    batcher = made(judge)
    held_up(judge, batcher)
    late = put(batcher, 2, deadline=time.monotonic() + 0.05)
    with pytest.raises(NotScored) as failure:
        late.result()
    assert failure.value.reason == "expired"
    assert batcher.depth() == 0
    judge.gate.set()
    assert batcher.close(SOON)
    assert judge.batches == [[1]]


def test_a_deadline_nearer_than_the_queue_is_long_is_refused_but_an_idle_model_takes_it() -> None:
    clock = Clock()
    judge = Judge()
    slow = slowed(judge, clock, 2.0)
    batcher = made(slow, clock=clock)
    put(batcher, 1).result()
    assert judge.entered.acquire(timeout=SOON)
    # The running flag falls a moment after the result is given.
    while batcher._running:
        time.sleep(0.001)
    judge.gate.clear()
    held_up(judge, batcher)
    with pytest.raises(NotAccepted) as refusal:
        batcher.reserve(deadline=clock.now + 1)
    assert refusal.value.reason == "deadline"
    assert refusal.value.retry_after == pytest.approx(4.0)
    accepted = put(batcher, 2, deadline=clock.now + 100)
    with pytest.raises(NotAccepted):
        batcher.reserve(deadline=clock.now)
    judge.gate.set()
    assert accepted.result().row == {"score": 2}
    assert batcher.close(SOON)


@pytest.mark.parametrize("bad", [{4}, {2, 9}, {2, 3, 4, 5, 6, 7, 8, 9}])
def test_only_the_bad_pictures_of_a_batch_fail(bad: set[int]) -> None:
    judge = Judge(frozenset(bad), open_=False)
    batcher = made(judge, max_batch=8)
    busy = held_up(judge, batcher)
    tickets = {value: put(batcher, value) for value in range(2, 10)}
    judge.gate.set()
    for value, ticket in tickets.items():
        if value in bad:
            with pytest.raises(NotScored) as failure:
                ticket.result()
            assert failure.value.reason == "unscorable"
        else:
            assert ticket.result().row == {"score": value}
    assert busy.result().row == {"score": 1}
    assert put(batcher, 1).result().row == {"score": 1}
    assert batcher.close(SOON)


def test_a_model_that_fails_its_probe_is_lost_and_nobody_is_left_waiting() -> None:
    lost: list[Exception] = []
    judge = Judge(open_=False)
    batcher = made(judge, max_batch=4, on_lost=lost.append)
    tickets = [held_up(judge, batcher), *(put(batcher, value) for value in range(2, 10))]
    with batcher.reserve(1) as places:
        judge.broken = True
        judge.gate.set()
        for ticket in tickets:
            with pytest.raises(NotScored) as failure:
                ticket.result()
            assert failure.value.reason == "failed"
        with pytest.raises(NotScored):
            places.submit(picture(3)).result()
    with pytest.raises(NotAccepted) as refusal:
        batcher.reserve()
    assert refusal.value.reason == "failed"
    assert batcher.close(SOON)
    assert batcher.depth() == 0
    assert [str(error) for error in lost] == ["cannot judge this"]


def test_draining_finishes_what_was_accepted_even_if_still_being_decoded() -> None:
    judge = Judge(open_=False)
    batcher = made(judge)
    busy = held_up(judge, batcher)
    queued = put(batcher, 2)
    with batcher.reserve(1) as places:
        batcher.drain()
        with pytest.raises(NotAccepted) as refusal:
            batcher.reserve()
        assert refusal.value.reason == "draining"
        judge.gate.set()
        assert busy.result().row == {"score": 1}
        assert queued.result().row == {"score": 2}
        assert not batcher.close(0.05)
        assert places.submit(picture(3)).result().row == {"score": 3}
    assert batcher.close(SOON)


def test_a_cancelled_picture_frees_its_place_and_never_wedges_a_batch() -> None:
    judge = Judge(open_=False)
    batcher = made(judge, queue_size=2)
    busy = held_up(judge, batcher)
    waiting, kept = put(batcher, 2), put(batcher, 3)
    waiting.cancel()
    assert batcher.depth() == 1
    busy.cancel()
    with pytest.raises(NotScored) as failure:
        busy.result()
    assert failure.value.reason == "cancelled"
    judge.gate.set()
    assert kept.result().row == {"score": 3}
    assert batcher.close(SOON)
    assert judge.batches == [[1], [3]]


def test_bulk_yields_to_single_pictures_but_never_starves() -> None:
    clock = Clock()
    judge = Judge(open_=False)
    batcher = made(judge, max_batch=2, bulk_patience=5.0, clock=clock)
    tickets = [held_up(judge, batcher)]
    tickets += [put(batcher, value, bulk=True) for value in (101, 102)]
    tickets += [put(batcher, value) for value in (2, 3, 4)]
    clock.now += 6
    tickets += [put(batcher, value) for value in (5, 6, 7)]
    judge.gate.set()
    for ticket in tickets:
        ticket.result()
    assert batcher.close(SOON)
    assert judge.batches == [[1], [2, 3], [4, 101], [102, 5], [6, 7]]


def test_the_extra_delay_gathers_a_batch_but_a_full_one_or_a_drain_does_not_wait() -> None:
    judge = Judge()
    batcher = made(judge, max_batch=3, extra_delay=0.5)
    pair = [put(batcher, 1), put(batcher, 2)]
    for ticket in pair:
        ticket.result()
    assert judge.batches == [[1, 2]]
    patient = made(judge, max_batch=3, extra_delay=3600.0)
    for ticket in [put(patient, value) for value in (3, 4, 5)]:
        ticket.result()
    last = put(patient, 6)
    assert patient.close(SOON)
    assert last.result().row == {"score": 6}
    assert batcher.close(SOON)


def test_heat_maps_go_to_those_who_asked_and_cost_nothing_otherwise() -> None:
    judge = Judge(open_=False)
    batcher = made(judge)
    busy = held_up(judge, batcher)
    plain, mapped = put(batcher, 2), put(batcher, 3, heatmap=True)
    judge.gate.set()
    assert busy.result().heat is None
    assert plain.result().heat is None
    heat = mapped.result().heat
    assert heat is not None
    assert heat.tolist() == [[3.0]]
    assert heat.base is None  # a copy, which does not keep its batch alive
    assert judge.maps == [False, True]
    assert batcher.close(SOON)


def test_the_oldest_wait_is_that_of_the_head_of_the_queue() -> None:
    clock = Clock()
    judge = Judge(open_=False)
    batcher = made(judge, clock=clock)
    assert batcher.oldest_seconds() == 0.0
    held_up(judge, batcher)
    put(batcher, 2, bulk=True)
    clock.now += 3
    put(batcher, 3)
    clock.now += 1
    assert batcher.oldest_seconds() == pytest.approx(4.0)
    judge.gate.set()
    assert batcher.close(SOON)


@pytest.mark.parametrize("seed", range(3))
def test_under_a_storm_everyone_gets_their_own_verdict_or_a_reason(seed: int) -> None:
    judge = Judge(bad=frozenset({13, 77}))
    batcher = made(judge, max_batch=8, queue_size=24)
    depths: list[int] = []

    def client(number: int) -> list[str]:
        dice = random.Random(f"{seed}-{number}")
        return [one_request(dice) for _ in range(60)]

    def one_request(dice: random.Random) -> str:
        values = [dice.randrange(2, 256) for _ in range(dice.choice([1, 1, 1, 5]))]
        deadline = time.monotonic() + dice.choice([0.0005, 5.0, 5.0, 5.0])
        try:
            with batcher.reserve(len(values), deadline=deadline, bulk=len(values) > 1) as places:
                depths.append(batcher.depth())
                tickets = [places.submit(picture(value)) for value in values]
        except NotAccepted as refusal:
            return refusal.reason
        if dice.random() < 0.1:
            tickets[0].cancel()
        outcomes = [outcome(ticket) for ticket in tickets]
        for value, found in zip(values, outcomes, strict=True):
            if isinstance(found, Scored):
                assert found.row == {"score": value}
                assert value not in judge.bad
            elif found.reason == "unscorable":
                assert value in judge.bad
            else:
                assert found.reason in {"expired", "cancelled"}
        return "answered"

    with ThreadPoolExecutor(32) as pool:
        answers = [answer for found in pool.map(client, range(32)) for answer in found]
    assert len(answers) == 32 * 60
    assert answers.count("answered") > 0
    assert set(answers) <= {"answered", "queue_full", "deadline"}
    assert max(depths) <= 24
    assert batcher.close(SOON)
    assert batcher.depth() == 0


def outcome(ticket: Ticket) -> Scored | NotScored:
    try:
        return ticket.result()
    except NotScored as failure:
        return failure

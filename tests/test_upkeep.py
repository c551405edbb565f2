"""Numbers of processes: no two living ones share one, whatever happened to others before them."""

import time

import pytest
from sqlalchemy import func, insert, select, text, update

from service import upkeep
from service.ids import WORKERS as NUMBERS
from service.ids import Ids
from service.schema import WORKERS
from service.store import Store
from service.upkeep import LENT_SECONDS, REST_SECONDS, Numbers, Upkeep


@pytest.fixture
def store(store_place):
    found = Store(store_place)
    yield found
    found.close()


def aged(store, seconds, *numbers):
    """As if so many seconds had gone by."""
    with store.database.writing() as connection:
        query = update(WORKERS).values(until=WORKERS.c.until - seconds)
        connection.execute(query.where(WORKERS.c.number.in_(numbers)) if numbers else query)


def test_every_living_process_has_a_number_of_its_own_however_many_started_before(store):
    mine = Numbers(store.database, "mine")
    first = mine.take()
    assert mine.renew(first)
    with store.database.writing() as connection:
        rest = [{"number": n, "holder": "gone", "until": time.time() - 2 * REST_SECONDS - n} for n in range(NUMBERS)]
        connection.execute(insert(WORKERS), [row for row in rest if row["number"] != first])
    others = [Numbers(store.database, f"other {k}") for k in range(50)]
    taken = [one.take() for one in others]
    assert len({first, *taken}) == 51
    assert taken == sorted(taken, reverse=True), "those that were free the longest go first"
    assert max(taken) < NUMBERS
    assert all(one.renew(number) for one, number in zip(others, taken, strict=True))
    assert mine.renew(first)


def test_a_number_is_lent_again_only_long_after_its_holder_stopped_using_it(store):
    holders = [Numbers(store.database, f"h{k}") for k in range(2)]
    with store.database.writing() as connection:
        living = [{"number": n, "holder": "living", "until": time.time() + 9e6} for n in range(1, NUMBERS)]
        connection.execute(insert(WORKERS), living)
    assert holders[0].take() == 0
    assert holders[1].take() is None
    aged(store, LENT_SECONDS + REST_SECONDS - 60, 0)
    assert holders[1].take() is None, "it is over, but not for long"
    aged(store, 90, 0)
    assert holders[1].take() == 0
    assert not holders[0].renew(0), "it is another's now"
    holders[1].give_back(0)
    assert holders[0].take() is None
    aged(store, REST_SECONDS + 1, 0)
    assert holders[0].take() == 0


def test_a_process_holds_its_number_while_it_lives_and_takes_another_where_it_lost_it(store, monkeypatch):
    monkeypatch.setattr(upkeep, "_TURN_SECONDS", 0.02)
    monkeypatch.setattr(upkeep, "_RENEW_SECONDS", 0.0)
    ids = Ids()
    kept = Upkeep(store, ids)
    assert (ids.next() >> 11) % 1024 == 0
    aged(store, LENT_SECONDS)

    def until(condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    def left():
        with store.database.reading() as connection:
            return connection.scalar(select(func.max(WORKERS.c.until))) - time.time()

    until(lambda: left() > LENT_SECONDS / 2)
    with store.database.writing() as connection:
        connection.execute(text("UPDATE worker_numbers SET holder = 'another'"))
    until(lambda: (ids.next() >> 11) % 1024 == 1)
    kept.close()
    assert left() > 0, "the other's is still lent"
    with store.database.reading() as connection:
        assert connection.scalar(select(WORKERS.c.until).where(WORKERS.c.number == 1)) < time.time() + 1

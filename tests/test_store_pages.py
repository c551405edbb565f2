"""No page of a store reads more than it shows, however much is kept; counts stay exact when old ones are folded."""

import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy import event, text
from test_store import NOON, PNG, made, record

from service import counting, ids
from service.auditing import changes, latest, note
from service.decisions import Decisions, Recalibration, Sample
from service.reviewing import Reviews
from service.schema import BINS, DAY, HOUR, MINUTE
from service.store import Kept, Store, Wanted

BIG = ("verdicts", "pictures", "reviews", "feedback", "audit", "outlier_rates", "p_value_counts")
FILTERS = [
    Wanted(since, until, model, source, outlier, p)
    for since, until, model, source, outlier, p in itertools.product(
        (None, NOON + 100), (None, NOON + 2500), (None, "n"), (None, "line-2"), (None, True, False), (None, 0.05, 0.013)
    )
]


def of_all_kinds(count=3000):
    """Verdicts of two models and three sources, one of them rare, with p-values of all sizes."""
    chance = random.Random(0)
    sources = ["line-1"] * 60 + ["line-2"] * 30 + ["line-3"]
    records = []
    for i in range(count):
        p = chance.choice((1e-7, 0.0004, 0.01, 0.013, 0.0131, 0.05, chance.random()))
        more = {"model": chance.choice("mn"), "source": chance.choice(sources), "outlier": chance.random() < 0.1}
        records.append(record(ids.first_at(NOON + i), p_value=p, drawn=i % 30 == 0, **more))
    return records


@pytest.fixture
def store(store_place):
    found = Store(store_place)
    yield found
    found.close()


@pytest.fixture
def filled(store):
    records = of_all_kinds()
    store.write(records)
    for one in records[: len(records) // 2]:
        if one.drawn:
            Reviews(store.database).say(one.id, "unclear", "", "ann")
    with store.database.writing() as connection:
        connection.execute(text("ANALYZE"))
    return store, records


def asked_of(store, work):
    """Every query that some work sends to the database."""
    found = []

    def hear(connection, cursor, statement, parameters, context, executemany):
        if statement.startswith(("SELECT", "(SELECT")):
            found.append((statement, parameters))

    event.listen(store.database.engine, "before_cursor_execute", hear)
    try:
        work()
    finally:
        event.remove(store.database.engine, "before_cursor_execute", hear)
    return found


def plan_of(store, statement, parameters):
    """The database's plan, a line a step."""
    with store.database.engine.connect() as connection:
        if store.database.is_sqlite:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            return "\n".join(row[-1] for row in plan)
        # A table that is small it would rather read whole.
        connection.execute(text("SET enable_seqscan = off"))
        return "\n".join(row[0] for row in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters))


def whole_reads(plan):
    """The tables that a plan reads from one end to the other; in `reviews_open` is only what waits for somebody."""
    tables = "|".join(BIG)
    return re.findall(rf"(?:SCAN|Seq Scan on) ({tables})(?! USING INDEX reviews_open)", plan)


def test_no_filter_reads_a_whole_table_or_sorts_it(filled):
    store, _ = filled
    for wanted in FILTERS:
        for statement, parameters in asked_of(store, lambda w=wanted: store.verdicts(w, ids.first_at(NOON + 2000), 5)):
            plan = plan_of(store, statement, parameters)
            assert not whole_reads(plan), (wanted, plan)
            if " IN " not in statement and "kinds" not in statement:
                # The newest of each kind come out of an index in their order, and nothing that is passed over is read.
                assert not re.search("TEMP B-TREE|Filter", plan), (wanted, plan)
                assert "verdicts_by_kind" in plan or wanted == Wanted(wanted.since, wanted.until), (wanted, plan)


def test_every_filter_finds_what_it_should(filled):
    store, records = filled
    for wanted in FILTERS:
        expected = [
            r.id for r in reversed(records)
            if (wanted.since is None or ids.seconds_of(r.id) >= wanted.since)
            and (wanted.until is None or ids.seconds_of(r.id) < wanted.until)
            and (wanted.model in (None, r.model)) and (wanted.source in (None, r.source))
            and (wanted.outlier in (None, r.outlier))
            and (wanted.p_value_at_most is None or r.p_value <= wanted.p_value_at_most)
        ]  # fmt: skip
        assert [row["id"] for row in store.verdicts(wanted, limit=5000)] == expected, wanted
        assert [row["id"] for row in store.verdicts(wanted, limit=3)] == expected[:3], wanted


def test_with_more_kinds_than_one_statement_takes_pages_are_the_same(store):
    records = [record(ids.first_at(NOON + i), source=f"s{i % 400}", p_value=(i % 9 + 1) / 9) for i in range(5000)]
    store.write(records)
    expected = [r.id for r in reversed(records) if r.p_value <= 0.7]
    assert [row["id"] for row in store.verdicts(Wanted(p_value_at_most=0.7), limit=300)] == expected[:300]


def test_the_last_verdicts_of_a_model_are_found_however_few_and_far_between(store):
    rare = [record(ids.first_at(NOON - k * 40 * 86_400), model="rare", score=float(k)) for k in range(9)]
    often = [record(ids.first_at(NOON - 7 * k) + 1, score=float(k)) for k in range(6000)]
    store.write(rare + often)
    assert [row[1] for row in store.ranks("rare", 5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(store.ranks("rare", 100)) == 9
    assert [row[1] for row in store.ranks("m", 2500)] == [float(k) for k in range(2500)]
    assert len(store.ranks("m", 100_000)) == 6000
    assert store.ranks("nobody", 10) == []


def test_reviews_rates_the_audit_and_decisions_are_read_from_indexes(filled):
    store, records = filled
    with store.database.writing() as connection:
        for action in ("policy", "activate", "forget"):
            note(connection, "ann", action, "m", None, None)
    reviews, work = Reviews(store.database), []
    work.append(lambda: reviews.to_review(None, 20))
    work.append(lambda: reviews.to_review("n", 20))
    work.append(lambda: store.rates(NOON - 30 * 86_400, NOON + 3000, 60))
    work.append(lambda: store.rates(NOON - 365 * 86_400, NOON + 3000, 1440, "m", "line-2"))
    work.append(lambda: store.histogram(NOON - 30 * 86_400, NOON + 3000, "m"))
    work.append(lambda: store.ranks("m", 50))
    work.append(lambda: changes(store.database, 50, 10))
    work.append(lambda: latest(store.database, ("policy", "activate", "recalibrate")))
    for ask in work:
        for statement, parameters in asked_of(store, ask):
            plan = plan_of(store, statement, parameters)
            assert not whole_reads(plan), plan
    drawn = [r for r in records[len(records) // 2 :] if r.drawn]
    assert [row["id"] for row in reviews.to_review(None, 20)] == [r.id for r in drawn[:20]]
    assert [row["id"] for row in reviews.to_review("n", 20)] == [r.id for r in drawn if r.model == "n"][:20]
    assert latest(store.database, ("policy", "activate", "recalibrate")) == changes(store.database)[1]["number"]


def test_a_year_is_read_from_days_and_a_month_from_hours(store):
    store.write(made(960, NOON - 40 * 86_400, 3600.0))
    for days, minutes, most in ((30, 60, 30 * 24 + 2), (40, 1440, 40 + 2 * 24), (40, 1, 960)):
        with store.database.reading() as connection:
            pieces = counting.pieces(connection, NOON - days * 86_400, NOON, minutes)
            count = "SELECT count(*) FROM outlier_rates WHERE span = {} AND start >= {} AND start < {}"
            read = sum(connection.scalar(text(count.format(*piece))) for piece in pieces)
        assert 0 < read <= most


def folded(store, kept, now):
    while store.tidy(kept, now):
        pass


def test_folding_keeps_every_count_exactly(store):
    records = made(4000, NOON - 20 * 86_400 + 1234, 431.0) + made(500, NOON - 3 * 86_400, 431.0, source="line-2")
    for start in range(0, len(records), 500):
        store.write(records[start : start + 500])

    def rows():
        with store.database.reading() as connection:
            found = connection.execute(text("SELECT span, count(*) FROM outlier_rates GROUP BY span"))
            return {row[0]: row[1] for row in found}

    def counted(minutes):
        found = store.rates(NOON - 30 * 86_400, NOON + 86_400, minutes)
        return [(row["bucket"], row["scored"], row["outliers"], pytest.approx(float(row["expected"]))) for row in found]

    before = {minutes: counted(minutes) for minutes in (60, 1440, 10_080)}
    bins, rows_before = store.histogram(NOON - 30 * 86_400, NOON + 86_400), rows()
    kept = Kept(None, None, None, minute_days=7, hour_days=None)
    folded(store, kept, NOON)
    assert rows()[MINUTE] < rows_before[MINUTE] / 2
    assert {minutes: counted(minutes) for minutes in before} == before
    folded(store, replace(kept, hour_days=14), NOON)
    assert rows()[HOUR] < rows_before[HOUR]
    assert rows()[DAY] == rows_before[DAY]
    assert {minutes: counted(minutes) for minutes in (1440, 10_080)} == {m: before[m] for m in (1440, 10_080)}
    assert store.histogram(NOON - 30 * 86_400, NOON + 86_400) == bins
    for minutes in (1, 5, 60):
        # What is older is told by the hour and the day that it was in; every picture counts once.
        assert sum(row[1] for row in counted(minutes)) == len(records)
    # One that comes late, after its minute was folded, is counted as well, and once.
    store.write([record(ids.first_at(NOON - 10 * 86_400 + 5))])
    for minutes in (1, 60, 1440):
        assert sum(row[1] for row in counted(minutes)) == len(records) + 1
    folded(store, replace(kept, hour_days=14), NOON)
    assert sum(row[1] for row in counted(5)) == len(records) + 1


def test_a_span_is_counted_once_wherever_it_begins_and_ends(store):
    records = made(1500, NOON - 3 * 86_400, 173.0)
    store.write(records)
    minutes = Counter(int(ids.seconds_of(r.id) // 60) for r in records)
    chance = random.Random(1)
    for _ in range(60):
        since, until = sorted(NOON - chance.random() * 4 * 86_400 for _ in range(2))
        expected = sum(n for minute, n in minutes.items() if since // 60 <= minute < -(-until // 60))
        for step in (1, 7, 60, 180, 1440, 4320):
            assert sum(row["scored"] for row in store.rates(since, until, step)) == expected
    assert store.rates(NOON, NOON, 60) == []
    assert store.histogram(NOON + 5, NOON - 5) == [0] * BINS


def test_room_for_pictures_is_kept_without_reading_them_all(store):
    """As many rows are read as there are hours, and the pictures of one hour."""
    records = [record(ids.first_at(NOON + 60 * i), png=PNG) for i in range(600)]
    store.write(records)
    kept = Kept(None, None, 100 * len(PNG) + 1, None, None)
    for statement, parameters in asked_of(store, lambda: store.tidy(kept, NOON, most=7)):
        if statement.startswith("SELECT pictures.id, pictures.bytes") and "FOR UPDATE" not in statement:
            with store.database.reading() as connection:
                assert len(list(connection.exec_driver_sql(statement, parameters))) <= 60
    folded(store, kept, NOON)
    assert [row["id"] for row in store.verdicts(Wanted(), limit=100)] == [r.id for r in records[:-101:-1]]
    with store.database.reading() as connection:
        assert connection.scalars(text("SELECT id FROM pictures ORDER BY id")).all() == [r.id for r in records[-100:]]
        assert connection.scalar(text("SELECT sum(bytes) FROM picture_bytes")) == 100 * len(PNG)


def test_of_all_calibrations_only_the_one_in_force_is_read(store):
    decisions, scores = Decisions(store.database), [np.arange(5.0) + k for k in range(4)]
    for k, base in enumerate(("one", "two", "one", "one")):
        given = None if k == 0 else Sample(scores[k], np.empty(0, np.uint64))
        decisions.recalibrate("m", Recalibration(base, f"v{k}", given), "ann", None, None)
    queries = asked_of(store, lambda: decisions.calibrations("m", "one"))
    assert ["scores" in query.partition("FROM")[0] for query, _ in queries] == [False, True]
    book = decisions.calibrations("m", "one")
    assert [one.choice.version for one in book] == ["v3", "v2", "v0"]
    assert np.array_equal(book[0].choice.sample.scores, scores[3])
    assert decisions.calibrations("m", "none") == []


def test_numbers_of_kinds_are_not_kept_of_what_was_not_written(store):
    """A write that fails takes its new kinds back with it; the next one makes them again."""
    store.write([record(ids.first_at(NOON))])
    with pytest.raises(Exception, match=r"(?i)unique"):
        store.write([record(ids.first_at(NOON), source="new")])
    store.write([record(ids.first_at(NOON + 1), source="new")])
    assert len(store.verdicts(Wanted(source="new"))) == 1, "of a single kind"

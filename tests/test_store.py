"""The store: what was written is read, counted and deleted alike in SQLite and PostgreSQL, whoever else writes."""

import math
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import IntegrityError

from anomaly_vae import ConfigError
from service import counting, first_schema, ids, migrations, schema
from service.ids import Ids
from service.looking import Look
from service.reviewing import Reviews
from service.store import Kept, Record, Store, Wanted
from service.upkeep import Upkeep

NOON = 1_800_000_000.0 // 86_400 * 86_400 + 43_200
PNG = b"\x89PNG" + bytes(1000)


@pytest.fixture
def store(store_place):
    found = Store(store_place)
    yield found
    found.close()


def record(number, **more):
    p = more.pop("p_value", 0.5)
    values = {
        "request": "r1", "filename": "a.png", "model": "m", "version": "v1", "source": "line-1", "score": 1.5,
        "p_value": p, "outlier": p <= 0.05, "alpha": 0.05, "policy": 0, "expected": 0.04, "parts": {"kl": 2.0},
    }  # fmt: skip
    return Record(number, **(values | more))


def counted(store):
    """What a store holds."""
    look = Look(str(store.database.url.render_as_string(hide_password=False)) if not store.database.is_sqlite
                else str(store.database.url.database))  # fmt: skip
    found = look.counts()
    look.close()
    return found


def made(count, start=NOON, step=1.0, **more):
    """Records with p-values spread evenly over (0, 1], one every `step` seconds."""
    return [record(ids.first_at(start + i * step) + i % 7, p_value=(i + 1) / count, **more) for i in range(count)]


def test_a_verdict_comes_back_as_it_went_in(store):
    awkward = "b\u00e4d \U0001f600.png"
    written = record(ids.first_at(NOON), filename=awkward, p_value=0.01, png=PNG, parts={"kl": 2.5, "elbo": None})
    store.write([written, record(ids.first_at(NOON + 1), filename=None)])
    found = store.verdict(written.id)
    assert {name: found[name] for name in ("filename", "score", "p_value", "outlier", "version", "source")} == {
        "filename": awkward, "score": 1.5, "p_value": 0.01, "outlier": True, "version": "v1", "source": "line-1",
    }  # fmt: skip
    assert found["parts"] == '{"kl": 2.5, "elbo": null}'
    assert found["has_picture"]
    assert found["label"] is None
    assert store.picture(written.id) == PNG
    other = store.verdicts(Wanted(), limit=1)[0]
    assert (other["filename"], bool(other["has_picture"])) == (None, False)
    assert store.picture(other["id"]) is None
    assert store.verdict(1) is None


def test_pages_of_any_filter_hold_every_verdict_once_the_newest_first(store):
    records = made(200) + made(50, NOON + 300, source="line-2", model="n")
    store.write(records)
    conditions = {
        Wanted(): lambda r: True,
        Wanted(outlier=True): lambda r: r.outlier,
        Wanted(outlier=False, source="line-2"): lambda r: not r.outlier and r.source == "line-2",
        Wanted(model="n"): lambda r: r.model == "n",
        Wanted(p_value_at_most=0.2): lambda r: r.p_value <= 0.2,
        Wanted(since=NOON + 20.5, until=NOON + 100): lambda r: NOON + 20.5 <= ids.seconds_of(r.id) < NOON + 100,
        Wanted(source="nowhere"): lambda r: False,
    }
    for wanted, condition in conditions.items():
        expected = sorted((r.id for r in records if condition(r)), reverse=True)
        found, before = [], None
        while page := store.verdicts(wanted, before, limit=17):
            found += [row["id"] for row in page]
            before = found[-1]
        assert found == expected, wanted
    assert len(records) > 17 * 3


def test_counts_by_the_minute_and_the_histogram_are_those_of_the_verdicts(store):
    records = made(600, step=1.0)
    for start in range(0, 600, 37):
        store.write(records[start : start + 37])
    store.write(made(60, NOON + 0.5, source="line-2"))
    for minutes in (1, 5, 60):
        found = store.rates(NOON, NOON + 600, minutes, source="line-1")
        assert sum(row["scored"] for row in found) == 600
        assert sum(row["outliers"] for row in found) == sum(r.outlier for r in records)
        assert sum(row["expected"] for row in found) == pytest.approx(600 * 0.04)
        assert len(found) == {1: 10, 5: 2, 60: 1}[minutes]
        assert found[0]["bucket"] == NOON // 60
    assert sum(row["scored"] for row in store.rates(NOON + 60, NOON + 180, 1)) == 120
    bins = store.histogram(NOON, NOON + 600, source="line-1")
    assert bins == [30] * 20, "p-values that are evenly spread fill all bins alike, upper ends included"
    assert sum(store.histogram(NOON - 7200, NOON)) == 0


def test_a_batch_is_kept_whole_or_not_at_all(store):
    store.write(made(3))
    with pytest.raises(IntegrityError):
        store.write([record(ids.first_at(NOON + 50)), record(ids.first_at(NOON))])
    assert len(store.verdicts(Wanted())) == 3
    assert store.rates(NOON, NOON + 60, 1)[0]["scored"] == 3


def test_many_writers_lose_and_double_nothing(store_place):
    stores = [Store(store_place) for _ in range(4)]
    written, lock = [], threading.Lock()

    def write(store):
        numbers = Ids()
        upkeep = Upkeep(store, numbers)
        for _ in range(15):
            records = [record(numbers.next()) for _ in range(20)]
            store.write(records)
            with lock:
                written.extend(r.id for r in records)
        upkeep.close()

    threads = [threading.Thread(target=write, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = [row["id"] for row in stores[0].verdicts(Wanted(), limit=5000)]
    assert found == sorted(written, reverse=True)
    assert len(set(found)) == 1200
    assert sum(row["scored"] for row in stores[0].rates(time.time() - 600, time.time() + 60, 1)) == 1200
    for store in stores:
        store.close()


def test_what_is_forgotten_is_gone_everywhere_but_from_the_counts(store):
    records = [record(ids.first_at(NOON + i), p_value=0.01, png=PNG, drawn=True) for i in range(5)]
    store.write(records)
    reviews = Reviews(store.database)
    for one in records[:4]:
        reviews.say(one.id, "confirmed", "", "ann")
    assert store.verdict(records[0].id)["label"] == "confirmed"
    assert store.forget([records[0].id, records[4].id, 7]) == 2
    assert store.forget([records[1].id], pictures_only=True) == 1
    assert store.verdict(records[0].id) is None
    assert store.picture(records[0].id) is store.picture(records[1].id) is None
    assert store.verdict(records[1].id)["label"] == "confirmed"
    with store.database.reading() as connection:
        for table, left in (("reviews", 5), ("feedback", 3), ("pictures", 2), ("verdicts", 3)):
            assert connection.scalar(text(f"SELECT count(*) FROM {table}")) == left
        # Of a review what was said stays: without its outliers a sample would be none.
        labels = connection.scalars(text("SELECT label FROM reviews ORDER BY id")).all()
        assert labels == ["confirmed"] * 4 + ["forgotten"]
    counts = counted(store)
    assert (counts.pictures, counts.picture_bytes) == (2, 2 * len(PNG))
    assert store.rates(NOON, NOON + 60, 1)[0]["scored"] == 5


def test_deleted_pictures_leave_no_trace_in_the_file(tmp_path):
    place, secret = tmp_path / "s.sqlite", b"\x89PNG" + b"a face nobody may see" * 400
    store = Store(str(place))
    store.write([record(ids.first_at(NOON + i), png=secret) for i in range(20)])
    files = [place, place.with_name("s.sqlite-wal")]
    assert any(b"a face nobody" in file.read_bytes() for file in files if file.exists())
    size = sum(file.stat().st_size for file in files if file.exists())
    reader = store.database.engine.connect()
    reader.execute(text("SELECT count(*) FROM pictures"))
    store.forget([ids.first_at(NOON + i) for i in range(20)])
    store.compact()
    assert store.uncompacted, "somebody still reads what was there before"
    reader.close()
    store.compact()
    assert not store.uncompacted
    assert not any(b"a face nobody" in file.read_bytes() for file in files if file.exists())
    assert sum(file.stat().st_size for file in files if file.exists()) < size / 2
    store.close()


def test_old_and_too_many_pictures_go_and_verdicts_stay_unless_told(store):
    store.write([record(ids.first_at(NOON - day * 86_400), png=PNG) for day in range(40)])
    forever = Kept(None, None, None, None, None)
    assert store.tidy(forever, NOON) == 0
    assert store.tidy(replace(forever, picture_days=30), NOON + 1) == 10
    assert store.tidy(replace(forever, picture_bytes=5 * len(PNG) + 1), NOON) == 25
    kept = [bool(row["has_picture"]) for row in store.verdicts(Wanted())]
    assert kept == [True] * 5 + [False] * 35
    assert store.tidy(replace(forever, verdict_days=3.5), NOON, most=30) == 30
    assert store.tidy(replace(forever, verdict_days=3.5), NOON, most=30) == 6
    assert store.tidy(replace(forever, verdict_days=3.5), NOON, most=30) == 0
    assert len(store.verdicts(Wanted())) == 4


def filled_as_at_first(store, records):
    """What the first version of the store wrote of these verdicts, two of them drawn for review, one of them judged."""
    names = [column.name for column in first_schema.VERDICTS.c if column.name != "parts"]
    with store.database.writing() as connection:
        rows = [{name: getattr(r, name) for name in names} for r in records]
        connection.execute(insert(first_schema.VERDICTS), [row | {"parts": '{"kl": 2.0}'} for row in rows])
        pictures = [{"id": r.id, "bytes": len(r.png), "png": r.png} for r in records if r.png]
        connection.execute(insert(schema.PICTURES), pictures)
        reviews = [{"id": r.id, "model": "m", "version": "v1", "score": r.score} for r in records[:2]]
        connection.execute(insert(schema.REVIEWS), reviews)
        said = {"id": records[0].id, "label": "normal", "note": "", "by": "ann", "at": NOON}
        connection.execute(insert(schema.FEEDBACK), said)
        rates, bins = Counter(), Counter()
        for r in records:
            minute, whose = int(ids.seconds_of(r.id) // 60), (r.model, r.version, r.source)
            rates[minute, *whose] += 1
            bins[minute // 60, *whose, counting.bin_of(r.p_value)] += 1
        odd = Counter((int(ids.seconds_of(r.id) // 60), r.model, r.version, r.source) for r in records if r.outlier)
        names = ("minute", "model", "version", "source", "scored", "outliers", "expected")
        found = [dict(zip(names, (*key, n, odd[key], 0.04 * n), strict=True)) for key, n in rates.items()]
        connection.execute(insert(first_schema.RATES), found)
        names = ("hour", "model", "version", "source", "bin", "n")
        found = [dict(zip(names, (*key, n), strict=True)) for key, n in bins.items()]
        connection.execute(insert(first_schema.HISTOGRAMS), found)


def test_an_older_store_is_brought_up_to_date_once_and_a_newer_one_is_refused(store_place, tmp_path, monkeypatch):
    steps = migrations.STEPS
    monkeypatch.setattr(migrations, "STEPS", steps[:2])
    old, records = Store(store_place), made(300) + made(40, NOON + 7000, source="line-2", model="n", png=PNG)
    filled_as_at_first(old, records)
    old.close()
    monkeypatch.setattr(migrations, "STEPS", steps)
    fresh = Store(str(tmp_path / "fresh.sqlite"))
    fresh.write(records)
    for _ in range(2):
        new = Store(store_place)
        for wanted in (Wanted(), Wanted(source="line-2", p_value_at_most=0.3), Wanted(outlier=True, model="m")):
            found = [[row["id"] for row in store.verdicts(wanted, limit=500)] for store in (new, fresh)]
            assert found[0] == found[1] != []
        for span in ((NOON, NOON + 600, 1), (NOON - 86_400, NOON + 86_400, 60), (NOON - 9e6, NOON + 9e6, 1440)):
            found = [[(r["bucket"], r["scored"], r["outliers"]) for r in store.rates(*span)] for store in (new, fresh)]
            assert found[0] == found[1] != []
            assert new.histogram(*span[:2], "m") == fresh.histogram(*span[:2], "m")
        assert replace(counted(new), feedback=0) == counted(fresh)
        assert [row["id"] for row in Reviews(new.database).to_review(None, 9)] == [records[1].id]
        with new.database.reading() as connection:
            numbers = connection.scalars(text("SELECT number FROM schema_version ORDER BY number")).all()
            assert numbers == [*range(1, len(steps) + 1)]
            assert connection.scalar(text("SELECT count(*) FROM policies")) == 0
        new.close()
    monkeypatch.setattr(migrations, "STEPS", steps[:1])
    with pytest.raises(ConfigError, match=f"version {len(steps)}, and this program knows up to 1; update the program"):
        Store(store_place)


def test_a_backup_made_in_use_is_a_whole_store(tmp_path):
    store = Store(str(tmp_path / "s.sqlite"))
    store.write(made(500, png=PNG))
    look = Look(str(tmp_path / "s.sqlite"))
    look.backup(tmp_path / "it's.sqlite")
    store.write(made(1, NOON + 5000))
    copy = Store(str(tmp_path / "it's.sqlite"))
    assert len(copy.verdicts(Wanted(), limit=1000)) == 500
    assert copy.picture(copy.verdicts(Wanted(), limit=1)[0]["id"]) == PNG
    with pytest.raises(ConfigError, match="exists already"):
        look.backup(tmp_path / "it's.sqlite")
    with pytest.raises(ConfigError, match="cannot be written"):
        look.backup(tmp_path / "nowhere" / "copy.sqlite")
    look.close()


def test_a_backup_by_a_newer_program_changes_nothing_in_the_source_and_is_of_the_same_version(tmp_path, monkeypatch):
    place, copy, steps = tmp_path / "s.sqlite", tmp_path / "copy.sqlite", migrations.STEPS
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "STEPS", steps[:2])
        old = Store(str(place))
        filled_as_at_first(old, made(40, png=PNG))
        old.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-m", "anomaly_vae", "store", str(place)]
    looked = subprocess.run(command, capture_output=True, text=True)
    assert f"{place}: 40 verdicts since 2027-01-15 12:00 UTC, 40 pictures" in looked.stdout, looked.stderr
    done = subprocess.run([*command, "--backup", str(copy)], capture_output=True, text=True)
    assert "wrote" in done.stdout, done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path != copy} == before
    with sqlite3.connect(place) as source, sqlite3.connect(copy) as target:
        assert list(source.iterdump()) == list(target.iterdump())
    restored = Store(str(copy))
    assert len(restored.verdicts(Wanted(outlier=True))) == 2
    restored.close()
    command[-1] = str(tmp_path / "letter.txt")
    (tmp_path / "letter.txt").write_text("Dear all, " * 500)
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, "cannot be read as a store: file is not a database" in refused.stderr) == (2, True)


@pytest.mark.parametrize(("place", "says"), [
    ("mysql://a/b", "give a path for SQLite, or postgresql://"),
    ("postgresql://u:secret@127.0.0.1:1/none", "cannot be opened"),
    ("nowhere/at/all.sqlite", "no folder"),
])  # fmt: skip
def test_what_cannot_be_opened_is_said_without_the_password(place, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says) as raised:
        Store(place)
    assert "secret" not in str(raised.value)


def test_a_file_that_is_no_store_is_left_alone(tmp_path):
    place = tmp_path / "s.sqlite"
    place.write_bytes(b"this is no database at all, but somebody's letter" * 50)
    with pytest.raises(ConfigError, match="cannot be opened"):
        Store(str(place))
    assert place.read_bytes().startswith(b"this is no database")


def test_killed_while_writing_it_is_whole(tmp_path):
    """The last batch that was acknowledged is there, and every batch is whole."""
    code = """if True:
        import sys
        from service.store import Store
        from test_store import made
        store = Store(sys.argv[1])
        for k in range(10_000):
            store.write(made(20, 1_800_000_000.0 + 100 * k))
            print(k, flush=True)
    """
    place = tmp_path / "s.sqlite"
    child = subprocess.Popen([sys.executable, "-c", code, place], stdout=subprocess.PIPE, cwd="tests", text=True)
    acknowledged = -1
    for line in child.stdout:
        acknowledged = int(line)
        if acknowledged >= 60:
            child.kill()
            break
    acknowledged = max([acknowledged, *(int(line) for line in child.stdout)])
    child.wait(60)
    with sqlite3.connect(place) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store = Store(str(place))
    count = len(store.verdicts(Wanted(), limit=10**6))
    assert count % 20 == 0
    assert count // 20 in (acknowledged + 1, acknowledged + 2)
    assert sum(row["scored"] for row in store.rates(0, 4e9, 1)) == count


def test_numbers_grow_name_their_time_and_are_nobody_elses():
    times = iter([NOON, NOON, NOON - 50, NOON + 1] + [NOON + 1] * 5000)
    first, second = Ids(lambda: next(times)), Ids(lambda: NOON)
    first.lend(3, math.inf)
    second.lend(4, math.inf)
    numbers = [first.next() for _ in range(5000)]
    assert numbers == sorted(set(numbers))
    assert ids.seconds_of(numbers[0]) == pytest.approx(NOON, abs=0.001)
    assert ids.seconds_of(numbers[3]) == pytest.approx(NOON + 1, abs=0.001)
    assert second.next() not in numbers
    assert ids.first_at(NOON) <= numbers[0] < ids.first_at(NOON + 0.001)
    assert ids.read(ids.shown(numbers[0])) == numbers[0]
    for text_ in ("", "zz", "F" * 16, "f" * 16, "0" * 17, "\u0661" * 16):
        assert ids.read(text_) is None


def test_without_a_number_of_their_own_processes_draw_by_chance_and_keep_clear_of_those_that_have_one():
    now, lent = [0.0], Ids(lambda: NOON, lambda: now[0])
    others = [Ids(lambda: NOON) for _ in range(4)]
    before = lent.next()
    lent.lend(ids.WORKERS - 1, 10.0)
    numbers = [before, *(lent.next() for _ in range(3000))]
    now[0] = 10.0
    numbers += [lent.next() for _ in range(100)]
    lent.lend(5, 20.0)
    numbers += [lent.next() for _ in range(100)]
    assert numbers == sorted(set(numbers)), "they grow whatever number is lent or no longer is"
    by_chance = [n for n in (*numbers, *(o.next() for o in others for _ in range(100))) if (n >> 18) % 8 == 7]
    assert len(by_chance) == 501
    assert len(set(by_chance)) > 490
    assert {n >> 11 & 1023 for n in numbers} - {n >> 11 & 1023 for n in by_chance} == {ids.WORKERS - 1, 5}
    assert len({n & 0x3FFFF for n in by_chance}) > 490

"""Alarms of a real service: raised by the right thing, kept over a restart, acknowledged, begun anew by changes."""

import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from serving import running
from sqlalchemy import func, select, update
from test_service_store import until
from test_store import NOON, made, record

from anomaly_vae import Client, Detector, ServiceError
from anomaly_vae.drift import Reference, Tolerated
from anomaly_vae.watch_answers import Alarm
from service import ids
from service.alarms import Alarms, NotRaised, UnknownAlarm, Watch, begin_anew, name_of
from service.alarms_api import AlarmPages
from service.decisions import Activation, Decisions, PolicyChoice, Recalibration
from service.keys import Role
from service.schema import ALARMS, AUDIT
from service.store import Store, Wanted


@pytest.fixture(scope="module")
def good(digits_folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((digits_folder / "good").iterdir())[:320]]


@pytest.fixture(scope="module")
def bad(good: list[bytes]) -> list[bytes]:
    """White where it should be black."""
    return [altered(one, lambda image: image.point(lambda value: 255 - value)) for one in good[:64]]


def altered(picture: bytes, change: Callable[[Image.Image], Image.Image]) -> bytes:
    """A picture that was changed."""
    buffer = io.BytesIO()
    change(Image.open(io.BytesIO(picture))).save(buffer, "PNG")
    return buffer.getvalue()


def darker(picture: bytes) -> bytes:
    """The same scene in less light."""
    return altered(picture, lambda image: ImageEnhance.Brightness(image).enhance(0.6))


@contextmanager
def served(bundle: Path, *settings: str) -> Iterator[tuple[Client, str]]:
    with running(bundle, "flush_ms=20", *settings) as server, Client(server.url) as client:
        yield client, server.health


def send(client: Client, pictures: list[bytes]) -> None:
    for start in range(0, len(pictures), 32):
        client.score(*((f"{i}.png", data) for i, data in enumerate(pictures[start : start + 32])))


def seen(client: Client, images: int, kind: str = "rate") -> Alarm:
    """The alarm once it has seen so many."""

    def found() -> Alarm | None:
        return next((one for one in client.alarms() if one.kind == kind and one.images >= images), None)

    return until(found)


def gauges(health: str, name: str) -> dict[str, float]:
    lines = [line for line in httpx.get(f"{health}/metrics").text.splitlines() if line.startswith(name + "{")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_defects_raise_the_rate_alarm_which_outlives_a_restart_until_it_is_acknowledged(
    tiny_bundle, tmp_path, good, bad
) -> None:
    settings = f"store={tmp_path / 's.sqlite'}", "source=line-9", "base_rates={line-9: 0.05}"
    with served(tiny_bundle, *settings) as (client, health):
        assert client.alarms() == []
        send(client, good)
        quiet = seen(client, len(good))
        assert (quiet.raised, quiet.since, quiet.source, quiet.limit) == (False, None, "line-9", 200)
        assert (quiet.expected_rate, quiet.tolerated_rate) == (0.05, 0.05)
        assert quiet.message.startswith("No alarm")
        with pytest.raises(ServiceError, match="not raised") as refused:
            client.acknowledge(quiet.id)
        assert refused.value.code == "not_raised"
        # A quarter are defective.
        send(client, [one for i, part in enumerate(bad) for one in (*good[3 * i : 3 * i + 3], part)])
        raised = seen(client, len(good) + 4 * len(bad))
        assert raised.raised
        assert raised.evidence >= 200
        assert raised.recent_rate > raised.tolerated_rate
        assert "more defects" in raised.message
        assert all(client.verdict(one).outlier for one in raised.examples)
        assert raised.examples
        shift = next(one for one in client.alarms() if one.kind == "shift")
        assert (shift.raised, shift.evidence) == (False, None)
        assert {one.id for one in client.alarms()} == {raised.id, shift.id}
        name = f'model="tiny",source="line-9",version="{raised.version}"'
        labels = f'{{kind="rate",{name}}}'
        until(lambda: gauges(health, "anomaly_alarm_raised").get("anomaly_alarm_raised" + labels) == 1)
        assert gauges(health, "anomaly_rate_alarm_evidence")[f"anomaly_rate_alarm_evidence{{{name}}}"] >= 200
        effects = gauges(health, "anomaly_shift_effect")
        assert {'part="score"', 'part="latent 0"'} <= {one.partition("{")[2].split(",")[1] for one in effects}
    with served(tiny_bundle, *settings) as (client, health):
        assert client.alarms() == [raised, shift]
        until(lambda: gauges(health, "anomaly_alarm_raised").get("anomaly_alarm_raised" + labels) == 1)
        anew = client.acknowledge(raised.id)
        assert (anew.id, anew.raised, anew.images, anew.evidence) == (raised.id, False, 0, 1.0)
        change = next(client.audit())
        assert (change.action, change.subject, change.before["source"]) == ("acknowledge", raised.id, "line-9")
        assert next(one for one in client.alarms() if one.kind == "shift").images == shift.images
        until(lambda: gauges(health, "anomaly_alarm_raised")["anomaly_alarm_raised" + labels] == 0)
        with pytest.raises(ServiceError) as refused:
            client.acknowledge("0" * 16)
        assert refused.value.code == "unknown_alarm"


def test_less_light_raises_the_shift_alarm_and_both_say_so(tiny_bundle, tmp_path, good) -> None:
    with served(tiny_bundle, f"store={tmp_path / 's.sqlite'}") as (client, _):
        send(client, good)
        assert not any(one.raised for one in client.alarms())
        send(client, [darker(one) for one in good])
        until(lambda: next(one for one in client.alarms() if one.kind == "shift").raised)
        seen(client, 2 * len(good))
        rate, shift = client.alarms()
        assert abs(shift.effect) >= shift.limit
        assert "camera, lighting" in shift.message
        assert shift.part in shift.message
        assert len(shift.examples) == 10
        if rate.raised:
            assert "Most pictures have changed as well" in rate.message


def test_a_change_of_policy_or_calibration_begins_alarms_anew(tiny_bundle, tmp_path, good, bad) -> None:
    with served(tiny_bundle, f"store={tmp_path / 's.sqlite'}", "review_share=1") as (client, health):
        send(client, [*good[:64], *bad])
        before = seen(client, 64 + len(bad))
        assert before.raised
        client.set_policy("tiny", alpha=0.05)
        assert client.alarms() == []
        until(lambda: not gauges(health, "anomaly_rate_alarm_evidence"))
        send(client, good[:32])
        after = seen(client, 32)
        assert (after.id, after.raised, after.images) == (before.id, False, 32)
        assert after.tolerated_rate > before.tolerated_rate
        threshold = client.set_policy("tiny", threshold=1e9).policy
        send(client, bad[:32])
        assert seen(client, 32).tolerated_rate == pytest.approx(1 - 0.005 ** (1 / client.model("tiny").n), rel=1e-6)
        assert threshold.mode == "threshold"


def test_an_older_bundle_says_what_it_cannot_watch(tiny_bundle, tmp_path, good) -> None:
    old = Detector.load(tiny_bundle)
    old.normals = None
    old.save(tmp_path / "old")
    assert Detector.load(tmp_path / "old").reference().names == ("score",)
    with served(tmp_path / "old", f"store={tmp_path / 's.sqlite'}") as (client, _):
        send(client, [darker(one) for one in good])
        seen(client, len(good))
        shift = next(one for one in client.alarms() if one.kind == "shift")
        assert shift.part == "score"
        assert "Only the score is watched" in shift.message


def test_recalibration_leaves_the_score_to_watch(tiny_detector) -> None:
    scores = np.sort(np.random.default_rng(0).normal(size=200))
    again = tiny_detector.recalibrated(scores)
    assert again.reference().names == ("score",)
    assert set(tiny_detector.spec.parts) <= {*tiny_detector.reference().names}


# --- the states in the store ----------------------------------------------------------------------------------------


REFERENCE = Reference({"score": np.linspace(0, 3, 100), "kl": np.linspace(0, 4, 100)})


def watching(store: Store, tolerated: float = 0.1, *policies: int) -> Alarms:
    alarms = Alarms(store.database)
    for policy in policies or (0,):
        alarms.in_force("m", "v1", policy, Watch(REFERENCE, (), Tolerated(tolerated, 0.01, True), {}))
    return alarms


@pytest.fixture
def store(store_place):
    found = Store(store_place)
    yield found
    found.close()


def state(alarms: Alarms) -> dict:
    (row,) = alarms.rows()
    return json.loads(row["rate"])


def test_two_processes_share_one_state(store, store_place) -> None:
    other = Store(store_place)
    first, second = watching(store), watching(other)
    for i, (place, alarms) in enumerate([(store, first), (other, second)] * 3):
        place.write(made(40, NOON + 100 * i), alarms.count)
    assert state(first) == state(second)
    assert (state(first)["images"], state(first)["outliers"]) == (240, 12)
    other.close()


def test_a_verdict_that_is_not_kept_does_not_count(store) -> None:
    alarms, records = watching(store), made(20)
    store.write(records, alarms.count)
    with pytest.raises(Exception, match=r"(?i)unique"):
        store.write(records, alarms.count)
    assert state(alarms)["images"] == 20


def test_each_source_has_its_own(store) -> None:
    alarms = watching(store)
    store.write([*made(30), *made(50, NOON + 100, source="line-2")], alarms.count)
    assert [(row["source"], json.loads(row["rate"])["images"]) for row in alarms.rows()] == [
        ("line-1", 30),
        ("line-2", 50),
    ]


def test_a_later_policy_begins_anew_and_an_earlier_one_no_longer_counts(store) -> None:
    alarms = watching(store, 0.1, 0, 1)
    store.write([*made(30), *made(20, NOON + 100, policy=1), *made(9, NOON + 200)], alarms.count)
    assert state(alarms)["images"] == 20
    store.write(made(9, NOON + 300), alarms.count)
    assert state(alarms)["images"] == 20
    with store.database.writing() as connection:
        begin_anew(connection, "m")
    assert alarms.rows() == []


@pytest.mark.parametrize("decide", [
    lambda book: book.set_policy("m", PolicyChoice(alpha=0.1), "me", None, None),
    lambda book: book.activate("m", Activation("b", "v1"), "me", None, None),
    lambda book: book.recalibrate("m", Recalibration("v1", "v2", None), "me", None, None),
], ids=["policy", "activation", "recalibration"])  # fmt: skip
def test_every_decision_on_a_model_begins_its_alarms_anew_and_no_others(store, decide) -> None:
    alarms = watching(store)
    alarms.in_force("other", "v1", 0, Watch(REFERENCE, (), Tolerated(0.1, 0.01, True), {}))
    store.write([*made(30), *made(20, NOON + 100, source="line-2"), *made(10, NOON + 200, model="other")], alarms.count)
    assert len(alarms.rows()) == 3
    decide(Decisions(store.database))
    assert [row["model"] for row in alarms.rows()] == ["other"]


def test_many_writers_at_once_lose_no_verdict(store, store_place) -> None:
    def write(worker: int) -> None:
        own = Store(store_place)
        alarms = watching(own)
        for i in range(8):
            own.write([record(ids.first_at(NOON + i) + 10 * worker + k) for k in range(5)], alarms.count)
        own.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert state(watching(store))["images"] == 4 * 8 * 5


def test_a_state_that_cannot_be_read_begins_anew(store, caplog) -> None:
    alarms = watching(store)
    store.write(made(30), alarms.count)
    with store.database.writing() as connection:
        connection.execute(update(ALARMS).values(sums=b"odd"))
    store.write(made(7, NOON + 100), alarms.count)
    assert state(alarms)["images"] == 7
    assert "cannot be read" in caplog.text


def test_who_may_see_and_who_may_acknowledge(store) -> None:
    assert {route.view.__name__: route.role for route in AlarmPages(watching(store)).routes()} == {
        "alarms": Role.READ, "acknowledge": Role.ADMIN,
    }  # fmt: skip


def test_another_base_rate_begins_anew(store) -> None:
    alarms = watching(store)
    store.write(made(30), alarms.count)
    alarms = watching(store, 0.2)
    store.write(made(10, NOON + 100), alarms.count)
    assert (state(alarms)["images"], state(alarms)["tolerated"]) == (10, 0.2)


def test_what_goes_wrong_in_counting_keeps_no_verdict_from_the_store(store, monkeypatch, caplog) -> None:
    alarms = watching(store)
    monkeypatch.setattr("service.alarms.State.count", lambda *_: 1 / 0)
    store.write(made(10), alarms.count)
    assert len(store.verdicts(Wanted())) == 10
    assert "did not count" in caplog.text


def test_an_unknown_version_and_verdicts_without_parts_are_passed_over(store) -> None:
    alarms = watching(store)
    store.write(
        [record(ids.first_at(NOON), version="v9"), record(ids.first_at(NOON) + 1, parts={"kl": None})], alarms.count
    )
    assert state(alarms)["images"] == 1


def test_only_what_is_raised_is_acknowledged_and_that_once(store) -> None:
    alarms = watching(store)
    store.write([record(ids.first_at(NOON) + i, p_value=0.01) for i in range(60)], alarms.count)
    with pytest.raises(UnknownAlarm):
        alarms.acknowledge("0" * 16, "me")
    (row,) = alarms.rows()
    assert row["rate_raised"] == pytest.approx(NOON, abs=1)
    after, kind = alarms.acknowledge(name_of(row, "rate"), "me")
    assert (after["rate_raised"], kind) == (None, "rate")
    assert json.loads(after["shift"])["images"] == 60
    assert after["begun"] == pytest.approx(time.time(), abs=60)
    with pytest.raises(NotRaised):
        alarms.acknowledge(name_of(row, "rate"), "me")
    with store.database.reading() as connection:
        assert connection.scalar(select(func.count()).select_from(AUDIT)) == 1

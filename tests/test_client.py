"""The client against real services: what it returns, what it tries again, and what it never does twice."""

import asyncio
import inspect
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from archiving import tarred, zipped
from serving import Server, running

from anomaly_vae import AsyncClient, Client, ConfigError, DataError, Detector, Retries, ServiceError
from anomaly_vae.answers import Retired, Scored, Unscored
from service.keys import KeyFile, Role, made

ONCE = Retries(times=0)


def public(kind: type) -> dict[str, inspect.Signature]:
    return {name: inspect.signature(value) for name, value in vars(kind).items() if not name.startswith("_")}


@pytest.fixture(scope="module")
def pictures(digits_folder: Path) -> list[Path]:
    return [*sorted((digits_folder / "good").iterdir())[:12], *sorted((digits_folder / "8").iterdir())[:12]]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    found = {role.name: made(role.name.lower(), role) for role in Role}
    KeyFile(keys=tuple(key for key, _ in found.values())).write(path)
    return path, {name: secret for name, (_, secret) in found.items()}


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, keys) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("service")
    settings = f"store={folder / 's.sqlite'}", f"models={tiny_bundle.parent}", "review_share=1", f"keys={keys[0]}"
    with running(tiny_bundle, *settings, "flush_ms=1") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server, keys) -> Iterator[Client]:
    with Client(server.url, keys[1]["ADMIN"]) as found:
        yield found


def kept(client: Client, name: str):
    end = time.monotonic() + 30
    while True:
        try:
            return client.verdict(name)
        except ServiceError as error:
            if error.code != "unknown_verdict" or time.monotonic() > end:
                raise
            time.sleep(0.02)


def test_a_picture_has_the_librarys_score_whatever_way_it_is_given(client, pictures, tiny_bundle):
    detector = Detector.load(tiny_bundle)
    path, data = pictures[-1], pictures[-1].read_bytes()
    expected = detector.judge(detector.prepare(data)[None]).row(0)
    found = client.score(path, str(path), data, ("mine.png", data)).results
    assert [one.filename for one in found] == [path.name, path.name, "picture", "mine.png"]
    for one in (*found, client.score_one(path), client.score_one(data)):
        assert one.score == pytest.approx(expected["score"], rel=1e-4)
        assert (one.outlier, one.alpha) == (expected["outlier"], expected["alpha"])
        assert one.parts.keys() == expected["parts"].keys()
    other = client.score_one(path, alpha=0.5, parts=False, heatmap="png", model=tiny_bundle.name)
    assert (other.alpha, other.parts) == (0.5, None)
    assert other.heatmap_png
    assert all(0 < region.area <= 1 for region in other.regions)


def test_a_bad_picture_is_an_outcome_beside_others_and_an_error_alone(client, pictures):
    good, bad = client.score(pictures[0], ("notes.txt", b"hello")).results
    assert isinstance(good, Scored)
    assert isinstance(bad, Unscored)
    assert (bad.filename, bad.error.code) == ("notes.txt", "not_an_image")
    with pytest.raises(ServiceError, match=r"text.*\[not_an_image, request \w+\]") as caught:
        client.score_one(b"hello")
    assert (caught.value.status, caught.value.code) == (422, "not_an_image")
    with pytest.raises(ServiceError) as caught:
        client.score(b"hello", ("cut.png", pictures[0].read_bytes()[:60]))
    assert caught.value.code == "no_usable_image"
    assert [one.error.code for one in caught.value.results] == ["not_an_image", "truncated"]


def test_mistakes_are_told_before_anything_is_sent(client, tmp_path):
    with pytest.raises(ConfigError, match="at least one"):
        client.score()
    with pytest.raises(ConfigError, match="seconds that it may take"):
        client.score(b"", deadline=0)
    with pytest.raises(DataError, match="give the path of a file"):
        client.score(tmp_path / "none.png")
    with pytest.raises(DataError, match="give the path of a zip"):
        next(client.score_archive(tmp_path / "none.zip"))
    with pytest.raises(ConfigError, match="http://127"):
        Client("127.0.0.1:8765")
    with pytest.raises(ConfigError, match="at least 0"):
        Retries(times=-1)


def test_the_whole_interface(client, pictures, tiny_bundle):
    name = tiny_bundle.name
    sent = [one for one in client.score(*pictures).results if isinstance(one, Scored)]
    odd = next(one for one in sent if one.outlier)
    assert kept(client, sent[-1].id).score == sent[-1].score
    assert [model.name for model in client.models().models] == [name]
    assert name in client.models().bundles
    version = client.model(name).version
    loaded = client.load("second", name, activate=True)
    assert loaded.version == version
    assert client.activate("second", version).name == "second"
    assert client.retire("second") == Retired(name="second", retired=[version], loaded=[])
    with pytest.raises(ServiceError, match="not loaded"):
        client.retire(name, "0123456789ab")
    with pytest.raises(ServiceError) as caught:
        client.rollback(name)
    assert (caught.value.code, caught.value.status) == ("nothing_before", 409)

    assert client.set_policy(name, alpha=0.1).policy.alpha == 0.1
    assert client.set_policy(name, threshold=1.5).policy.mode == "threshold"
    assert client.preview(name, alpha=0.2, last=10).verdicts == 10
    assert client.rollback_policy(name).policy.alpha == 0.1
    assert client.policy(name).revisions[0].by == "admin"
    with pytest.raises(ServiceError, match="review more") as caught:
        client.recalibrate(name, minimum=1000)

    assert client.image(odd.id).startswith(b"\x89PNG")
    assert client.heatmap(odd.id).startswith(b"\x89PNG")
    assert client.feedback(odd.id, "confirmed", "a crack").feedback.note == "a crack"
    assert odd.id not in {one.id for one in client.review(limit=500)}
    assert sum(bucket.scored for bucket in client.rates(minutes=1440).buckets) >= len(sent)
    assert next(client.audit()).action == "feedback"
    assert len(list(client.audit(limit=2))) == 2
    assert client.ready().store.state == "ok"
    assert client.forget(odd.id, picture_only=True) == 1
    assert client.forget(odd.id) == 1
    soon = datetime.now() + timedelta(days=1)
    assert client.forget_many(since=soon) == 0
    assert client.forget_many(until=soon, outlier=False) >= len(sent) - sum(one.outlier for one in sent)


def test_verdicts_are_fetched_page_by_page_to_the_last(client, pictures, monkeypatch):
    client.score(*pictures)
    last = client.score_one(pictures[0])
    kept(client, last.id)
    everything = [one.id for one in client.verdicts()]
    assert everything[0] == last.id
    assert everything == sorted(set(everything), reverse=True)
    monkeypatch.setattr("anomaly_vae.asking._PAGE", 5)
    assert [one.id for one in client.verdicts()] == everything
    assert [one.id for one in client.verdicts(limit=12)] == everything[:12]
    assert list(client.verdicts(limit=0)) == []
    flagged = list(client.verdicts(outlier=True, p_value_at_most=1))
    assert {one.outlier for one in flagged} == {True}


def test_keys_say_what_one_may(server, client, keys, pictures):
    with Client(server.url, retries=ONCE) as nobody, pytest.raises(ServiceError) as caught:
        nobody.models()
    assert (caught.value.status, caught.value.code) == (401, "no_key")
    with Client(server.url, keys[1]["SCORE"]) as scoring:
        assert scoring.score_one(pictures[0]).id
        with pytest.raises(ServiceError, match="ask for another key") as caught:
            next(scoring.verdicts())
    assert (caught.value.status, caught.value.code) == (403, "forbidden")


def test_archives_come_row_by_row_in_their_order(client, pictures, tmp_path):
    names = [(f"{i}.png", path.read_bytes()) for i, path in enumerate(pictures)]
    (tmp_path / "a.zip").write_bytes(zipped([*names, ("notes.txt", b"hello")]))
    rows = list(client.score_archive(tmp_path / "a.zip", parts=False))
    assert [row.filename for row in rows] == [*(name for name, _ in names), "notes.txt"]
    direct = client.score(*pictures).results
    assert [row.score for row in rows[:-1]] == pytest.approx([one.score for one in direct], rel=1e-4)
    assert {row.parts for row in rows[:-1]} == {None}
    assert rows[-1].error.code == "not_an_image"


def test_an_archive_that_cannot_be_finished_raises_after_what_was_scored(client, pictures, tmp_path):
    whole, rows = tarred([(f"{i}.png", path.read_bytes()) for i, path in enumerate(pictures)]), []
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ServiceError) as caught:
        rows.extend(client.score_archive(tmp_path / "cut.tar"))
    assert (caught.value.code, caught.value.status) == ("bad_archive", 200)
    (tmp_path / "empty.zip").write_bytes(zipped([]))
    with pytest.raises(ServiceError) as caught:
        next(client.score_archive(tmp_path / "empty.zip"))
    assert (caught.value.code, caught.value.status) == ("empty_archive", 422)
    with pytest.raises(ServiceError, match="score_archive"):
        client.score(zipped([("a.png", pictures[0].read_bytes())]))


def test_a_deadline_bounds_the_whole_call(client, pictures):
    begun = time.monotonic()
    with pytest.raises(ServiceError) as caught:
        client.score(*pictures, deadline=0.001)
    assert caught.value.code in {"deadline_exceeded", "deadline_too_short"}
    assert time.monotonic() - begun < 10
    for seconds in (30, 600, 3600):  # beyond ten minutes the service takes none
        assert client.score_one(pictures[0], deadline=seconds).id


def test_both_clients_have_the_same_methods():
    ours, theirs = public(Client), public(AsyncClient)
    assert list(ours) == list(theirs)
    for name, signature in ours.items():
        assert signature.parameters == theirs[name].parameters, name
        assert str(theirs[name].return_annotation).removeprefix("Async") in str(signature.return_annotation).replace(
            "collections.abc.Iterator", "collections.abc.AsyncIterator"
        )


def test_many_tasks_of_one_async_client(server, client, keys, pictures, tmp_path):
    (tmp_path / "a.tar").write_bytes(tarred([(path.name, path.read_bytes()) for path in pictures]))

    async def work():
        async with AsyncClient(server.url, keys[1]["ADMIN"]) as ours:
            scores = await asyncio.gather(*(ours.score_one(path) for path in pictures * 3))
            async with aclosing(ours.score_archive(tmp_path / "a.tar")) as rows:
                archived = [row async for row in rows]
            async with aclosing(ours.score_archive(tmp_path / "a.tar")) as rows:
                first = await anext(rows)
            verdicts = [one async for one in ours.verdicts(limit=5)]
            with pytest.raises(ServiceError, match="nobody"):
                await ours.model("nobody")
            return scores, archived, first, verdicts, await ours.ready()

    scores, archived, first, verdicts, ready = asyncio.run(work())
    direct = [one.score for one in client.score(*pictures).results]
    assert [one.score for one in scores] == pytest.approx(direct * 3, rel=1e-4)
    assert [row.score for row in archived] == pytest.approx(direct, rel=1e-4)
    assert first.filename == pictures[0].name
    assert len(verdicts) == 5
    assert ready.ready


def test_the_client_needs_no_torch():
    code = (
        "import sys; from anomaly_vae import Client, AsyncClient; Client('http://127.0.0.1:1').close(); "
        "heavy = {'torch', 'numpy', 'scipy', 'flask', 'yaml'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

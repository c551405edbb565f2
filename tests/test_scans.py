"""Scans of whole folders that a service was told of: kept, listed, shown with their reports, deleted, let go of."""

import asyncio
import json
import threading
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from prometheus_client import CollectorRegistry
from serving import Server, running
from sqlalchemy import text

from anomaly_vae import answers, watch_answers
from anomaly_vae.async_client import AsyncClient
from anomaly_vae.client import Client
from anomaly_vae.errors import DataError, ServiceError
from anomaly_vae.scan_calls import FinishedScan
from service import migrations
from service.ids import Ids, first_at
from service.keys import KeyFile, Role, made
from service.metrics import Metrics
from service.scans import KeptScans, Scans
from service.sent_rows import OfScan, Row, SentRows
from service.store import Store, Wanted

BEGAN = datetime(2026, 1, 31, 6, tzinfo=UTC)
TOLD = {
    "name": "monday", "model": "parts", "version": "858e1c0ce8f6", "started": "2026-01-31T06:00:00Z",
    "finished": 1769840000, "scored": 4000, "failed": 2, "outliers": 51, "expected_rate": 0.01, "alpha": 0.01,
}  # fmt: skip
HTML = "<!doctype html><title>Scan</title><p>\u00e4 report<script>document.title += 'ran'</script>".encode()


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A file of keys, and the secrets by name."""
    roles = {"line": Role.SCORE, "other": Role.SCORE, "reader": Role.READ, "boss": Role.ADMIN}
    path, found = (
        tmp_path_factory.mktemp("keys") / "keys.yaml",
        {name: made(name, role) for name, role in roles.items()},
    )
    KeyFile(keys=tuple(key for key, _ in found.values())).write(path)
    return path, {name: secret for name, (_, secret) in found.items()}


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory, keys):
    place = tmp_path_factory.mktemp("store") / "s.sqlite"
    settings = f"store={place}", f"keys={keys[0]}", "source=line-9", "max_report_bytes=4096", "max_scans=20"
    with running(tiny_bundle, *settings) as found:
        yield found


def client_of(server: Server, key: str) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {key}"})


@pytest.fixture
def clients(server, keys):
    found = {name: client_of(server, key) for name, key in keys[1].items()}
    yield found
    for client in found.values():
        client.close()


def put(client, scan, html=HTML, kind="text/html"):
    return client.put(f"/v1/scans/{scan}/report", content=html, headers={"Content-Type": kind})


def test_a_scan_is_kept_as_it_was_told_and_its_report_as_it_was_sent(clients):
    line, reader = clients["line"], clients["reader"]
    scan = watch_answers.Scan.model_validate(line.post("/v1/scans", json=TOLD).json())
    assert (scan.name, scan.started, scan.scored, scan.outliers) == ("monday", BEGAN, 4000, 51)
    assert scan.finished == datetime.fromtimestamp(1769840000, UTC)
    assert (scan.source, scan.by, scan.has_report) == ("line-9", "line", False)
    missing = reader.get(f"/v1/scans/{scan.id}/report")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "no_report")
    assert watch_answers.Scan.model_validate(put(line, scan.id).json()).has_report
    assert watch_answers.Scan.model_validate(reader.get(f"/v1/scans/{scan.id}").json()).has_report
    reply = reader.get(f"/v1/scans/{scan.id}/report")
    assert reply.content == HTML
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert put(line, scan.id, b"<p>another").status_code == 200
    assert reader.get(f"/v1/scans/{scan.id}/report").content == b"<p>another"


def test_a_report_runs_in_an_origin_that_is_nobodys_and_reaches_nothing(clients):
    scan = clients["line"].post("/v1/scans", json=TOLD).json()["id"]
    put(clients["line"], scan)
    headers = clients["reader"].get(f"/v1/scans/{scan}/report").headers
    rules = dict(rule.strip().partition(" ")[::2] for rule in headers["content-security-policy"].split(";"))
    assert rules["sandbox"] == "allow-scripts"
    assert rules["default-src"] == "'none'"
    assert not any("'self'" in rule or "http" in rule for name, rule in rules.items() if name != "frame-ancestors")
    assert headers["x-content-type-options"] == "nosniff"


def test_pages_hold_every_scan_once_the_newest_first_and_the_oldest_go(clients):
    line, reader = clients["line"], clients["reader"]
    sent = [line.post("/v1/scans", json={**TOLD, "name": f"scan {k}", "source": f"s{k}"}).json() for k in range(25)]
    found, cursor = [], None
    while True:
        page = reader.get("/v1/scans", params={"limit": 6, **({"cursor": cursor} if cursor else {})}).json()
        watch_answers.ScanPage.model_validate(page)
        found += page["scans"]
        cursor = page["next"]
        if cursor is None:
            break
    assert found == sent[:4:-1]
    gone = reader.get(f"/v1/scans/{sent[0]['id']}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "unknown_scan")


def test_who_may_do_what(clients):
    scan = clients["line"].post("/v1/scans", json=TOLD).json()["id"]
    assert clients["line"].get("/v1/scans").status_code == 403
    assert clients["line"].get(f"/v1/scans/{scan}/report").status_code == 403
    refused = put(clients["other"], scan)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_yours")
    assert put(clients["boss"], scan).status_code == 200
    assert clients["reader"].delete(f"/v1/scans/{scan}").status_code == 403
    assert clients["boss"].delete(f"/v1/scans/{scan}").json() == {"forgotten": 1}
    for path in ("", "/report"):
        assert clients["boss"].get(f"/v1/scans/{scan}{path}").status_code == 404
    change = clients["boss"].get("/v1/audit?limit=1").json()["changes"][0]
    assert (change["action"], change["subject"], change["by"]) == ("forget_scan", scan, "boss")
    assert change["before"]["name"] == "monday"


@pytest.mark.parametrize(("change", "says"), [
    ({"started": "2026-02-01"}, "finished before it started"),
    ({"outliers": 4001}, "4001 outliers of 4000 pictures"),
    ({"started": "yesterday"}, "a moment is written like"),
    ({"started": True}, "a moment is"),
    ({"started": "1769840000"}, "as a text a moment"),
    ({"scored": -1}, "scored"),
    ({"scored": 10**16}, "scored"),
    ({"name": ""}, "name"),
    ({"name": "a\nb"}, "name"),
    ({"expected_rate": 1.5}, "expected_rate"),
    ({"source": "a b"}, "source"),
    ({"colour": "red"}, "colour"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(clients, change, says):
    reply = clients["line"].post("/v1/scans", json={**TOLD, **change})
    error = answers.Refusal.model_validate(reply.json()).error
    assert (reply.status_code, error.code, says in error.message) == (400, "bad_parameter", True), error.message
    assert "\n" not in error.message


def test_what_is_no_report_is_refused(clients):
    scan = clients["line"].post("/v1/scans", json=TOLD).json()["id"]
    for html, kind, code in (
        (b"", "text/html", "empty"), (b"x" * 4097, "text/html", "too_large"),
        (b"%PDF", "application/pdf", "unsupported_media_type"),
    ):  # fmt: skip
        assert put(clients["line"], scan, html, kind).json()["error"]["code"] == code
    assert put(clients["line"], "0" * 16).json()["error"]["code"] == "unknown_scan"
    assert put(clients["line"], scan, b"x" * 4096).status_code == 200


def test_both_clients_do_it(server, keys, tmp_path):
    told = {name: value for name, value in TOLD.items() if name not in ("name", "started", "finished")}
    (tmp_path / "report.html").write_bytes(HTML)
    with Client(server.url, keys[1]["boss"]) as client:
        first = client.add_scan(FinishedScan(name="one", started=BEGAN, finished=BEGAN + timedelta(minutes=9), **told))
        assert client.set_report(first.id, tmp_path / "report.html").has_report
        assert client.report(first.id) == HTML
        written = {"started": "2026-01-31T06:00:00Z", "finished": "2026-01-31T07:00:00Z"}
        second = client.add_scan(FinishedScan(name="two", **written, **told))
        assert [one.id for one in client.scans(limit=2)] == [second.id, first.id]
        assert client.scan(first.id).name == "one"
        with pytest.raises(DataError, match="give the path of a file"):
            client.set_report(first.id, tmp_path / "none.html")

    async def the_same():
        async with AsyncClient(server.url, keys[1]["boss"]) as client:
            third = await client.add_scan(FinishedScan(name="three", started=BEGAN, finished=BEGAN, **told))
            assert (await client.set_report(third.id, HTML)).has_report
            assert await client.report(third.id) == HTML
            row = {"path": "a.png", "score": 1.0, "p_value": 0.5, "outlier": False, "version": TOLD["version"]}
            for _ in range(2):
                assert (await client.add_rows(third.id, 0, json.dumps(row).encode())).rows == 1
            assert [one.id async for one in client.scans(limit=3)] == [third.id, second.id, first.id]
            assert (await client.scan(third.id)).name == "three"
            assert [await client.forget_scan(one) for one in (first.id, second.id, third.id)] == [1, 1, 1]
            with pytest.raises(ServiceError, match="there is no scan"):
                await client.scan(third.id)

    asyncio.run(the_same())


def test_old_scans_go_and_reports_with_them(store_place):
    store = Store(store_place)
    row = {name: value for name, value in TOLD.items() if name not in ("started", "finished")}
    row |= {"started": 0.0, "finished": 1.0, "source": "s"}
    forever, now = Scans(store.database, KeptScans(None, None)), datetime.now(UTC).timestamp()
    numbers = [first_at(now - days * 86_400) for days in (40, 20, 10, 1)]
    for number in numbers:
        forever.add(number, "ann", row)
        assert forever.set_report(number, HTML * 1000)
    assert [one["id"] for one in forever.scans(None, 10)] == numbers[::-1]
    Scans(store.database, KeptScans(None, 15.0)).add(first_at(now), "ann", row)
    assert [one["id"] for one in forever.scans(None, 10)] == [first_at(now), numbers[3], numbers[2]]
    assert forever.report(numbers[0]) is None
    assert forever.report(numbers[2]) == HTML * 1000
    assert not forever.set_report(numbers[0], HTML)
    assert not forever.forget(numbers[0], "ann")
    store.close()


def test_rows_are_kept_once_whoever_sends_them_in_both_databases(store_place):
    store, names = Store(store_place), Ids()
    metrics = Metrics(CollectorRegistry())
    metrics.in_force("parts", TOLD["version"], 0.01, 100, None)
    scans = Scans(store.database, KeptScans())
    row = {**TOLD, "started": 0.0, "finished": 1.0, "source": "s", "scored": 190, "failed": 10, "token": "a" * 32}
    number = scans.add_once(names.next(), "ann", row)
    assert scans.add_once(names.next(), "ann", row) == number
    of, sent = OfScan.of(scans.scan(number)), SentRows(scans, store, names, metrics)
    verdict, bad = {"score": 1.0, "p_value": 0.25, "outlier": False}, {"error": "broken"}
    rows = [Row(path=f"{i}.png", version=TOLD["version"], **(bad if i % 20 == 0 else verdict)) for i in range(200)]
    gate, told = threading.Barrier(4), []

    def send():
        gate.wait()
        told.extend(sent.add(of, first, rows[first : first + 25]) for first in range(0, 200, 25))

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 32
    assert scans.scan(number)["rows"] == 200
    found = store.verdicts(Wanted(source="s"), limit=1000)
    assert [one["filename"] for one in found][::-1] == [f"{i}.png" for i in range(200) if i % 20]
    assert sum(int(one["scored"]) for one in store.rates(0, 4e9, 1_000_000)) == 190
    labels = {"model": "parts", "version": TOLD["version"], "source": "s"}
    assert metrics.registry.get_sample_value("anomaly_images_scored_total", labels) == 190
    assert metrics.registry.get_sample_value("anomaly_rejected_total", {"reason": "bad_image"}) == 10
    assert metrics.verdicts() == 0, "this process scored none of them"
    scans.forget(number, "ann")
    assert sent.add(of, 0, rows[:5]) is None
    store.close()


def test_a_store_of_scans_that_sent_no_rows_is_brought_up_to_date(store_place, monkeypatch):
    steps = migrations.STEPS
    monkeypatch.setattr(migrations, "STEPS", steps[:9])
    old = Store(store_place)
    with old.database.writing() as connection:
        for statement in ("DROP INDEX scans_by_token", "ALTER TABLE scans DROP COLUMN token",
                          'ALTER TABLE scans DROP COLUMN "rows"'):  # fmt: skip
            connection.execute(text(statement))
    old.close()
    monkeypatch.setattr(migrations, "STEPS", steps)
    for _ in range(2):
        store = Store(store_place)
        scans = Scans(store.database, KeptScans())
        row = {**TOLD, "started": 0.0, "finished": 1.0, "source": "s"}
        scans.add(Ids().next(), "ann", row)
        assert scans.scans(None, 1)[0]["rows"] is None
        again = [scans.add_once(Ids().next(), "ann", {**row, "token": "b" * 32}) for _ in range(2)]
        assert again[0] == again[1]
        store.close()

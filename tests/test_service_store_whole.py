"""A real service's store as a whole: who may read it, what no store means, backups, outages and crashes."""

import json
import os
import re
import signal
import threading
from pathlib import Path

import httpx
import pytest
from forked import command
from serving import running, started
from test_service_store import form, kept, until

from service import ids
from service.store import Store, Wanted


@pytest.fixture(scope="module")
def pictures(digits_folder: Path) -> dict[str, bytes]:
    chosen = [*sorted((digits_folder / "good").iterdir())[:12], *sorted((digits_folder / "8").iterdir())[:12]]
    return {f"{path.parent.name}-{path.name}": path.read_bytes() for path in chosen}


def test_nobody_else_on_the_machine_may_read_what_is_kept(tiny_bundle, pictures, tmp_path):
    with running(tiny_bundle, f"store={tmp_path / 's.sqlite'}") as server:
        httpx.post(server.url + "/v1/score", files=form(pictures), timeout=60).raise_for_status()
        assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}
        assert len(list(tmp_path.iterdir())) == 3


def test_without_a_store_pictures_are_scored_and_nothing_else_is_promised(tiny_bundle, pictures):
    with running(tiny_bundle, "store=none") as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.post("/v1/score", content=pictures["good-0000.png"]).status_code == 200
        assert client.get("/v1/verdicts").status_code == 404
        changed = client.put(f"/v1/models/{tiny_bundle.name}/policy", json={"alpha": 0.1})
        assert (changed.status_code, changed.json()["error"]["code"]) == (409, "no_store")
        assert "store" not in httpx.get(server.health + "/ready").json()
        assert "verdicts are not kept" in server.output


def test_no_pixels_are_kept_where_none_shall_be(tiny_bundle, pictures, tmp_path):
    place = tmp_path / "s.sqlite"
    with running(tiny_bundle, f"store={place}", "images=none", "review_share=1") as server:
        httpx.post(server.url + "/v1/score", files=form(pictures), timeout=60).raise_for_status()
    store = Store(str(place))
    rows = store.verdicts(Wanted())
    assert len(rows) == len(pictures)
    assert not any(row["has_picture"] for row in rows)
    store.close()
    assert b"PNG" not in place.read_bytes()


def test_a_backup_taken_in_use_is_served_as_it_was(tiny_bundle, pictures, tmp_path):
    place, copy = tmp_path / "s.sqlite", tmp_path / "copy.sqlite"
    with running(tiny_bundle, f"store={place}") as server, httpx.Client(base_url=server.url, timeout=60) as client:
        sent = client.post("/v1/score", files=form(pictures)).json()["results"]
        client.put(f"/v1/models/{tiny_bundle.name}/policy", json={"alpha": 0.2}).raise_for_status()
        before = kept(client, sent[-1]["id"])
        assert f"{len(pictures)} verdicts since" in command("store", place, "--backup", copy).stdout
        again = command("store", place, "--backup", copy)
        assert (again.returncode, "exists already" in again.stderr) == (2, True), again.stderr
        client.delete(f"/v1/verdicts/{sent[-1]['id']}").raise_for_status()
    with running(tiny_bundle, f"store={copy}") as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert kept(client, sent[-1]["id"]) == before
        assert client.get(f"/v1/models/{tiny_bundle.name}/policy").json()["policy"]["alpha"] == 0.2
    assert ": 0 verdicts since none" in command("store", copy, "--forget-before", "0").stdout
    assert "there is no store" in command("store", tmp_path / "none").stderr


def test_while_the_database_is_down_scoring_goes_on_and_it_is_said(tiny_bundle, pictures, postgres_server):
    url = postgres_server.url()
    with running(tiny_bundle, f"store={url}") as server, httpx.Client(base_url=server.url, timeout=60) as client:

        def standing():
            return httpx.get(server.health + "/ready").json()["store"]

        def metric(name):
            return float(re.search(rf"^{name} (\S+)$", httpx.get(server.health + "/metrics").text, re.MULTILINE)[1])

        first = client.post("/v1/score", files=form(pictures)).json()["results"]
        kept(client, first[-1]["id"])
        postgres_server.stop()
        try:
            second = client.post("/v1/score", files=form(pictures)).json()["results"]
            assert len(second) == len(pictures)
            until(lambda: standing()["state"] == "behind")
            assert standing()["waiting"] == len(pictures)
            assert httpx.get(server.health + "/ready").status_code == 200
            assert (metric("anomaly_store_up"), metric("anomaly_store_waiting")) == (0, len(pictures))
            refused = client.get("/v1/verdicts")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_down")
            for form_of in ("csv", "ndjson"):
                assert client.get(f"/v1/verdicts?format={form_of}").status_code == 503
            refused = client.delete("/v1/verdicts?until=2100-01-01")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_down")
            refused = client.put(f"/v1/models/{tiny_bundle.name}/policy", json={"alpha": 0.1})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_down")
        finally:
            postgres_server.start()
        until(lambda: standing()["state"] == "ok", 60)
        for result in second:
            assert client.get(f"/v1/verdicts/{result['id']}").status_code == 200
        assert metric("anomaly_store_up") == 1
        assert metric('anomaly_store_lost_total{what="verdict"}') == 0


def test_killed_under_load_nothing_that_was_kept_is_lost_and_the_store_is_whole(tiny_bundle, pictures, tmp_path):
    place, answers, lock = tmp_path / "s.sqlite", [], threading.Lock()
    picture = pictures["good-0000.png"]

    def post(url, stop):
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                try:
                    name = client.post("/v1/score", content=picture).json()["results"][0]["id"]
                except (httpx.HTTPError, KeyError, ValueError):
                    return
                with lock:
                    answers.append(name)

    def listed(client):
        return {json.loads(line)["id"] for line in client.get("/v1/verdicts?format=ndjson").text.splitlines()}

    server, stop = started(tiny_bundle, "-o", f"store={place}"), threading.Event()
    assert server.ready.wait(120)
    threads = [threading.Thread(target=post, args=(server.url, stop)) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(answers) > 60, 60)
    with lock:
        due = set(answers)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        until(lambda: due <= listed(client))
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(60)
    stop.set()
    for thread in threads:
        thread.join(90)
    with running(tiny_bundle, f"store={place}") as again, httpx.Client(base_url=again.url, timeout=60) as client:
        found = listed(client)
        assert due <= found
        assert len(found - set(answers)) <= len(threads), "one each whose answer did not arrive"
        counted = sum(bucket["scored"] for bucket in client.get("/v1/rates").json()["buckets"])
        assert counted == len(found)
        assert ids.read(next(iter(found)))

"""A service that starts while its PostgreSQL is down scores at once, and catches up when it returns."""

import re
import shutil
import time

import httpx
import numpy as np
import pytest
from conftest import write_digits
from forked import command
from serving import running

from anomaly_vae import Detector
from service import migrations
from service.decisions import Decisions, Recalibration, Sample
from service.store import Store, Wanted


def until(condition, seconds=60.0):
    """Wait for something that comes soon; what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return found


def standing(server):
    return httpx.get(server.health + "/ready").json()["store"]


def metric(server, name):
    return float(re.search(rf"^{name} (\S+)$", httpx.get(server.health + "/metrics").text, re.MULTILINE)[1])


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    folder = write_digits(tmp_path_factory.mktemp("pictures"), count=40)
    return next((folder / "good").iterdir()).read_bytes()


def test_a_new_store_is_made_when_the_database_comes(tiny_bundle, postgres_server, picture):
    url = postgres_server.url()
    postgres_server.stop()
    try:
        with running(tiny_bundle, f"store={url}") as server, httpx.Client(base_url=server.url, timeout=60) as client:
            assert "cannot be reached yet: verdicts wait in memory" in server.output
            sent = [client.post("/v1/score", content=picture).json()["results"][0]["id"] for _ in range(30)]
            assert standing(server) == {"state": "behind", "waiting": 30, "lost_verdicts": 0, "lost_pictures": 0}
            assert httpx.get(server.health + "/ready").status_code == 200
            assert (metric(server, "anomaly_store_up"), metric(server, "anomaly_store_waiting")) == (0, 30)
            for path in ("/v1/verdicts", "/v1/rates", f"/v1/models/{tiny_bundle.name}/policy", "/v1/audit"):
                refused = client.get(path)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_down")
            postgres_server.start()
            until(lambda: standing(server) == {"state": "ok", "waiting": 0, "lost_verdicts": 0, "lost_pictures": 0})
            assert [row["id"] for row in client.get("/v1/verdicts").json()["verdicts"]] == sent[::-1]
            assert metric(server, "anomaly_store_up") == 1
            later = client.post("/v1/score", content=picture).json()["results"][0]["id"]
            assert int(later, 16) >> 11 & 1023 == 0, "it has a number of its own now"
            assert later > sent[-1]
            started = until(lambda: client.get("/v1/audit").json()["changes"])
            assert [(one["action"], one["by"]) for one in started] == [("activate", "command line")]
    finally:
        postgres_server.start_again()


def test_what_was_decided_before_is_in_force_when_the_database_returns(tiny_bundle, tmp_path, postgres_server, picture):
    url, folder = postgres_server.url(), tmp_path / "models"
    for name in ("first", "other"):
        shutil.copytree(tiny_bundle, folder / name)
    settings = (f"store={url}", f"models={folder}")
    detector = Detector.load(folder / "first")
    scores = detector.calibration.scores[0][: len(detector.calibration.scores[0]) // 2 * 2]
    with running(folder / "first", *settings) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        client.put("/v1/models/first/policy", json={"alpha": 0.2}).raise_for_status()
        body = {"bundle": "other", "activate": True}
        client.post("/v1/models/second:load", json=body).raise_for_status()
        store = Store(url)
        sample = Sample(scores * 1.01, np.empty(0, np.uint64))
        made = detector.recalibrated(sample.scores, sample.seen, sample.independent)
        choice = Recalibration(detector.version, made.version, sample)
        Decisions(store.database).recalibrate("first", choice, "ann", None, None)
        store.close()
        until(lambda: client.get("/v1/models/first").json()["version"] != detector.version)
        before = client.get("/v1/models").json()["models"]
    postgres_server.stop()
    try:
        with running(folder / "first", *settings) as server, httpx.Client(base_url=server.url, timeout=60) as client:
            alone = client.get("/v1/models").json()["models"]
            assert [(one["name"], one["version"]) for one in alone] == [("first", detector.version)]
            first = client.post("/v1/score", content=picture).json()["results"][0]
            assert first["alpha"] == alone[0]["policy"]["alpha"] != 0.2
            postgres_server.start()
            until(lambda: client.get("/v1/models").json()["models"] == before)
            second = client.post("/v1/score", content=picture).json()["results"][0]
            assert second["alpha"] == 0.2
            assert client.post("/v1/score?model=second", content=picture).status_code == 200
            until(lambda: standing(server)["waiting"] == 0)
            found = client.get(f"/v1/verdicts/{first['id']}").json()
            assert (found["version"], found["policy_revision"]) == (detector.version, 0)
    finally:
        postgres_server.start_again()


def test_an_older_store_is_brought_up_to_date_when_the_database_returns(postgres_server, monkeypatch):
    url = postgres_server.url()
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "STEPS", migrations.STEPS[:2])
        Store(url).close()
    postgres_server.stop()
    try:
        store = Store(url, patient=True)
        assert not store.database.opened
    finally:
        postgres_server.start_again()
    store.open()
    assert store.verdicts(Wanted(outlier=True)) == []
    store.close()


@pytest.mark.parametrize(("place", "says"), [
    ("{folder}", "is a folder"),
    ("{folder}/none/s.sqlite", "there is no folder"),
    ("{folder}/letter.txt", "cannot be opened: file is not a database"),
    ("/proc/s.sqlite", "cannot be written"),
    ("{postgres}_not_there", "does not exist"),
])  # fmt: skip
def test_a_place_that_can_never_be_a_store_is_one_line_at_the_start(
    place, says, tiny_bundle, tmp_path, postgres_server
):
    (tmp_path / "letter.txt").write_text("Dear all, " * 500)
    place = place.format(folder=tmp_path, postgres=postgres_server.url())
    done = command("serve", tiny_bundle, "--port", "0", "-o", f"store={place}", timeout=120)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("starting: ")]
    assert (len(lines), says in lines[0]) == (1, True), done.stderr

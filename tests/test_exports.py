"""Answers of all verdicts at once: whole, a few at a time, and nobody who scores waits for them."""

import csv
import io
import json
import time

import httpx
import pytest
from serving import running
from test_store import NOON, made

from service import ids
from service.store import Store


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A store of so many verdicts that an export fills all buffers on its way, and their ids."""
    place = tmp_path_factory.mktemp("store") / "s.sqlite"
    store, records = Store(str(place)), made(40_000)
    for start in range(0, len(records), 10_000):
        store.write(records[start : start + 10_000])
    store.close()
    return place, [ids.shown(r.id) for r in reversed(records)], records


@pytest.fixture(scope="module")
def client(tiny_bundle, filled):
    with (
        running(tiny_bundle, f"store={filled[0]}", "max_exports=1") as server,
        httpx.Client(base_url=server.url, timeout=120) as found,
    ):
        yield found


def test_an_export_holds_every_verdict_once(client, filled):
    _, names, records = filled
    lines = client.get("/v1/verdicts?format=ndjson").text.splitlines()
    assert [json.loads(line)["id"] for line in lines] == names
    rows = list(csv.DictReader(io.StringIO(client.get("/v1/verdicts?format=csv&outlier=true").text)))
    assert [row["id"] for row in rows] == [ids.shown(r.id) for r in reversed(records) if r.outlier]
    few = client.get("/v1/verdicts", params={"format": "csv", "limit": 700, "cursor": names[600]}).text
    assert [row["id"] for row in csv.DictReader(io.StringIO(few))] == names[601:1301]
    none = client.get("/v1/verdicts?format=csv&source=nowhere").text
    assert none.splitlines() == [",".join(rows[0])]
    assert client.get("/v1/verdicts?format=ndjson&source=nowhere").text == ""


def test_one_more_than_may_run_is_refused_and_scoring_goes_on(client, digits_folder, filled):
    picture = next((digits_folder / "good").iterdir()).read_bytes()
    with client.stream("GET", "/v1/verdicts?format=ndjson") as held:
        assert held.status_code == 200
        refused = client.get("/v1/verdicts?format=csv")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_exports")
        assert int(refused.headers["retry-after"]) >= 1
        assert "max_exports" in refused.json()["error"]["message"]
        assert len(client.get("/v1/verdicts?limit=10").json()["verdicts"]) == 10
        assert client.post("/v1/score", content=picture).status_code == 200
    end = time.monotonic() + 60
    while client.get("/v1/verdicts?format=csv&limit=5").status_code == 429:
        assert time.monotonic() < end, "who goes away gives the place back"
        time.sleep(0.05)
    assert client.get(f"/v1/verdicts?format=csv&limit=5&until={int(NOON)}").status_code == 200

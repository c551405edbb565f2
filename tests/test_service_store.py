"""What a real service keeps of what it answered, and what becomes of it: pages, pictures, feedback, deletion."""

import csv
import io
import json
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from archiving import tarred
from PIL import Image, ImageChops
from serving import Server, running

from anomaly_vae import Detector
from anomaly_vae import answers as answered


@pytest.fixture(scope="module")
def pictures(digits_folder: Path) -> dict[str, bytes]:
    chosen = [*sorted((digits_folder / "good").iterdir())[:12], *sorted((digits_folder / "8").iterdir())[:12]]
    return {f"{path.parent.name}-{path.name}": path.read_bytes() for path in chosen}


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("store") / "s.sqlite"
    with running(tiny_bundle, f"store={place}", "review_share=0.5", "source=line-9") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as found:
        yield found


def until(condition, seconds=30.0):
    """Wait for something that comes soon; what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return found


def altered(data, number):
    """Another file of nearly the same picture."""
    image = Image.open(io.BytesIO(data))
    image.putpixel((number % image.width, image.height - 1 - number // image.width), 3 + number % 5)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def form(pictures):
    return [("file", (name, data)) for name, data in pictures.items()]


def kept(client, name):
    """A verdict once it is kept."""

    def asked():
        reply = client.get(f"/v1/verdicts/{name}")
        return reply if reply.status_code == 200 else None

    return answered.Verdict.model_validate(until(asked).json())


def test_every_answered_verdict_is_kept_as_it_was_answered(client, pictures):
    body = client.post("/v1/score", files=form(pictures), headers={"X-Request-Id": "tray-1"}).json()
    assert answered.Scores.model_validate(body)
    results = body["results"]
    single = client.post("/v1/score", content=pictures[next(iter(pictures))]).json()["results"][0]
    lines = client.post("/v1/score", content=tarred(list(pictures.items())[:5])).text.splitlines()
    results += [single, *(json.loads(line) for line in lines[:-1])]
    for result in results:
        found = kept(client, result["id"])
        for name in ("score", "p_value", "outlier", "alpha", "parts"):
            assert getattr(found, name) == result[name]
        assert found.filename == result.get("filename")
        assert (found.source, found.model, found.version) == ("line-9", body["model"]["name"], body["model"]["version"])
    assert kept(client, results[0]["id"]).request_id == "tray-1"
    assert len({result["id"] for result in results}) == len(results)


def test_another_alpha_for_one_reply_is_not_what_is_kept(client, pictures):
    result = client.post("/v1/score?alpha=0.9&parts=false", content=pictures["good-0000.png"]).json()["results"][0]
    assert result["alpha"] == 0.9
    found = kept(client, result["id"])
    assert found.alpha != 0.9
    assert found.parts


def test_pages_and_exports_hold_the_same_verdicts(client, pictures):
    sent = client.post("/v1/score", files=form(pictures)).json()["results"]
    kept(client, sent[-1]["id"])
    found, cursor = [], None
    while True:
        page = client.get("/v1/verdicts", params={"limit": 7, **({"cursor": cursor} if cursor else {})}).json()
        answered.VerdictPage.model_validate(page)
        found += page["verdicts"]
        cursor = page["next"]
        if cursor is None:
            break
        assert len(page["verdicts"]) == 7
    assert [row["id"] for row in found] == sorted((row["id"] for row in found), reverse=True)
    assert {result["id"] for result in sent} <= {row["id"] for row in found}
    reply = client.get("/v1/verdicts?format=ndjson")
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    assert [json.loads(line) for line in reply.text.splitlines()] == found
    lines = list(csv.DictReader(io.StringIO(client.get("/v1/verdicts?format=csv&limit=9").text)))
    assert [line["id"] for line in lines] == [row["id"] for row in found[:9]]
    assert float(lines[0]["score"]) == found[0]["score"]
    outliers = client.get("/v1/verdicts?outlier=true&limit=1000").json()["verdicts"]
    assert [row["id"] for row in outliers] == [row["id"] for row in found if row["outlier"]]
    middle = found[len(found) // 2]["at"]
    later = client.get("/v1/verdicts", params={"since": middle, "limit": 1000}).json()["verdicts"]
    assert [row["id"] for row in later] == [row["id"] for row in found if row["at"] >= middle]


def test_a_name_that_a_spreadsheet_would_run_is_made_harmless(client, pictures):
    name = '=HYPERLINK("http://evil")'
    (result,) = client.post("/v1/score", files=[("file", (name, pictures["good-0000.png"]))]).json()["results"]
    assert kept(client, result["id"]).filename == result["filename"]
    line = next(csv.DictReader(io.StringIO(client.get("/v1/verdicts?format=csv&limit=1").text)))
    assert line["filename"].startswith("'=")


def test_pictures_of_outliers_and_of_drawn_ones_are_kept_and_heat_maps_drawn_again(client, pictures, tiny_bundle):
    sent = client.post("/v1/score?heatmap=png", files=form(pictures)).json()["results"]
    rows = {result["id"]: kept(client, result["id"]) for result in sent}
    assert all(row.has_picture for row in rows.values() if row.outlier)
    assert {row.has_picture for row in rows.values() if not row.outlier} == {True, False}
    detector = Detector.load(tiny_bundle)
    for result in sent:
        place = f"/v1/verdicts/{result['id']}"
        reply = client.get(f"{place}/image")
        if not rows[result["id"]].has_picture:
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "no_picture")
            continue
        assert reply.headers["content-type"] == "image/png"
        score = detector.judge(detector.prepare(reply.content)[None]).score[0]
        assert score == pytest.approx(result["score"], abs=1e-4)
        heat = client.get(f"{place}/heatmap")
        assert heat.headers["content-type"] == "image/png"
        ours, theirs = (Image.open(io.BytesIO(data)) for data in (heat.content, b64decode(result["heatmap_png"])))
        assert max(high for _, high in ImageChops.difference(ours, theirs).getextrema()) <= 2


def test_rates_count_every_verdict_with_its_band_and_what_is_expected(client, pictures):
    def counted():
        return answered.Rates.model_validate(client.get("/v1/rates?minutes=1440&source=line-9").json())

    before = counted()
    sent = client.post("/v1/score", files=form(pictures)).json()["results"]
    kept(client, sent[-1]["id"])
    after = counted()
    assert sum(b.scored for b in after.buckets) - sum(b.scored for b in before.buckets) == len(sent)
    more = sum(b.outliers for b in after.buckets) - sum(b.outliers for b in before.buckets)
    assert more == sum(result["outlier"] for result in sent)
    assert sum(after.p_values) == sum(b.scored for b in after.buckets)
    for bucket in after.buckets:
        assert bucket.band[0] <= bucket.rate == bucket.outliers / bucket.scored <= bucket.band[1]
        assert 0 < bucket.expected_rate <= 0.1
    assert not client.get("/v1/rates?source=elsewhere").json()["buckets"]


def test_what_people_say_stands_beside_the_verdict(client, pictures):
    sent = client.post("/v1/score", files=form(pictures)).json()["results"]
    odd, fine = (next(r for r in sent if r["outlier"] is flag) for flag in (True, False))
    kept(client, sent[-1]["id"])
    said = client.post("/v1/feedback", json={"verdict": odd["id"], "label": "false_alarm", "note": "a shadow"})
    assert answered.Verdict.model_validate(said.json()).feedback.label == "false_alarm"
    assert client.post("/v1/feedback", json={"verdict": odd["id"], "label": "confirmed"}).status_code == 200
    assert kept(client, odd["id"]).feedback.label == "confirmed"
    assert client.post("/v1/feedback", json={"verdict": fine["id"], "label": "missed"}).status_code == 200
    wrong = client.post("/v1/feedback", json={"verdict": fine["id"], "label": "false_alarm"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (409, "contradiction")
    assert "missed or normal or unclear" in wrong.json()["error"]["message"]
    changes = answered.Audit.model_validate(client.get("/v1/audit").json()).changes
    assert [(c.subject, c.before, c.after) for c in changes if c.action == "feedback"][:3] == [
        (fine["id"], None, "missed"), (odd["id"], "false_alarm", "confirmed"), (odd["id"], None, "false_alarm"),
    ]  # fmt: skip


def test_reviews_are_drawn_by_chance_and_tell_nothing_of_the_verdict(client, pictures, tiny_bundle):
    new = {f"new-{name}": altered(data, 1) for name, data in pictures.items()}
    for _ in range(8):
        sent = client.post("/v1/score", files=form(new)).json()["results"]
    kept(client, sent[-1]["id"])
    rows = {row["id"]: row for row in client.get("/v1/verdicts?limit=1000").json()["verdicts"]}
    reviews = client.get("/v1/review?limit=500").json()
    drawn = answered.ReviewPage.model_validate(reviews).verdicts
    assert [one.id for one in drawn] == sorted(one.id for one in drawn)
    assert set(reviews["verdicts"][0]) == {"id", "model", "at", "filename", "has_picture"}
    assert all(one.has_picture for one in drawn)
    for flag in (True, False):
        # Whatever the verdict, half are drawn: four standard deviations either way.
        of_kind = [
            row for row in rows.values() if row["outlier"] is flag and (row["filename"] or "").startswith("new-")
        ]
        share = len({one.id for one in drawn} & {row["id"] for row in of_kind}) / len(of_kind)
        assert abs(share - 0.5) < 4 * 0.5 / len(of_kind) ** 0.5
    known = {name for name, data in pictures.items() if Detector.load(tiny_bundle).has_seen(data)}
    assert len(known) > 5
    assert not known & {one.filename for one in drawn}, "what the detector was made from is no sample of the stream"
    first = drawn[0].id
    client.post("/v1/feedback", json={"verdict": first, "label": "unclear"}).raise_for_status()
    assert client.get("/v1/review?limit=1").json()["verdicts"][0]["id"] == drawn[1].id


def test_a_verdict_and_its_picture_can_be_forgotten(client, pictures):
    sent = client.post("/v1/score", files=form(pictures)).json()["results"]
    first, second = (next(result for result in sent if result["outlier"] is flag) for flag in (True, False))
    kept(client, sent[-1]["id"])
    assert client.delete(f"/v1/verdicts/{first['id']}/image").json() == {"forgotten": 1}
    assert client.get(f"/v1/verdicts/{first['id']}/image").status_code == 404
    assert client.get(f"/v1/verdicts/{first['id']}").status_code == 200
    assert client.delete(f"/v1/verdicts/{second['id']}").json() == {"forgotten": 1}
    assert client.get(f"/v1/verdicts/{second['id']}").status_code == 404
    refused = client.delete("/v1/verdicts")
    assert (refused.status_code, "say which" in refused.text) == (400, True)
    rows = client.get("/v1/verdicts?outlier=true&limit=1000").json()["verdicts"]
    gone = client.delete("/v1/verdicts?outlier=true&pictures_only=true").json()["forgotten"]
    assert gone == sum(row["has_picture"] for row in rows)
    assert client.delete("/v1/verdicts?outlier=true").json() == {"forgotten": len(rows)}
    assert not client.get("/v1/verdicts?outlier=true").json()["verdicts"]
    assert client.get("/v1/audit?limit=1").json()["changes"][0]["action"] == "forget"


@pytest.mark.parametrize(("method", "path", "body", "code"), [
    ("GET", "/v1/verdicts?limit=0", None, "bad_parameter"),
    ("GET", "/v1/verdicts?colour=red", None, "unknown_parameter"),
    ("GET", "/v1/verdicts?since=yesterday", None, "bad_parameter"),
    ("GET", "/v1/verdicts?cursor=abc", None, "bad_parameter"),
    ("GET", "/v1/verdicts?limit=1&limit=2", None, "bad_parameter"),
    ("GET", "/v1/verdicts/0000000000000000", None, "unknown_verdict"),
    ("GET", "/v1/verdicts/..%2f..%2fetc", None, "not_found"),
    ("GET", "/v1/verdicts/none/image", None, "unknown_verdict"),
    ("GET", "/v1/rates?minutes=many", None, "bad_parameter"),
    ("GET", "/v1/rates?since=1970-01-01&minutes=1", None, "bad_parameter"),
    ("POST", "/v1/feedback", "{", "bad_json"),
    ("POST", "/v1/feedback", "[1]", "bad_json"),
    ("POST", "/v1/feedback", "[" * 60_000, "bad_json"),
    ("POST", "/v1/feedback", "x" * 70_000, "too_large"),
    ("POST", "/v1/feedback", '{"verdict": "0000000000000000", "label": "nice"}', "bad_parameter"),
    ("POST", "/v1/feedback", '{"verdict": "0000000000000000", "label": "normal"}', "unknown_verdict"),
    ("PUT", "/v1/feedback", "{}", "method_not_allowed"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(client, method, path, body, code):
    reply = client.request(method, path, content=body)
    refusal = answered.Refusal.model_validate(reply.json())
    assert (refusal.error.code, 400 <= reply.status_code < 500) == (code, True)
    assert "\n" not in refusal.error.message


@pytest.mark.parametrize(("headers", "code"), [
    ({"Origin": "http://evil.example"}, "cross_site"),
    ({"Origin": "null"}, "cross_site"),
    ({"Sec-Fetch-Site": "cross-site"}, "cross_site"),
    ({"Host": "evil.example"}, "unknown_host"),
    ({"Host": "localhost.evil.example:80"}, "unknown_host"),
    ({"Origin": "http://evil.example", "Host": "evil.example"}, "unknown_host"),
])  # fmt: skip
def test_pages_of_other_sites_are_kept_out_where_nobody_is_asked_for_a_key(client, pictures, headers, code):
    for method, path in (("POST", "/v1/score"), ("GET", "/v1/verdicts"), ("POST", "/v1/models/x/policy:rollback")):
        reply = client.request(method, path, content=pictures["good-0000.png"], headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, code)
    own = {"Origin": str(client.base_url).rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    assert client.get("/v1/verdicts", headers=own).status_code == 200
    assert client.get("/v1/verdicts", headers={"Host": "localhost:80"}).status_code == 200


def test_what_was_just_answered_is_forgotten_too(client, pictures):
    sent = client.post("/v1/score", files=form(pictures)).json()["results"]
    assert client.delete("/v1/verdicts?until=2100-01-01").json()["forgotten"] >= len(sent)
    assert client.get("/v1/verdicts").json()["verdicts"] == []

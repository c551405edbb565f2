"""The API on a real server over a real detector: scores are the library's, and every refusal is JSON with a code."""

import base64
import io
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from bad_bytes import bad_bytes
from PIL import Image
from serving import Server, running
from sklearn.datasets import load_digits

from anomaly_vae import Detector
from service import ids

LIMIT = 300_000
FIELD = b"--x\r\nContent-Disposition: form-data; name=a"


def pictures() -> dict[str, bytes]:
    """Two dozen real digits in several formats and sizes."""
    digits = load_digits().images
    found = {}
    for index in range(24):
        kind = ("PNG", "JPEG", "BMP", "WEBP")[index % 4]
        side = (8, 32, 50, 128)[index // 4 % 4]
        picture = Image.fromarray((digits[index] * 15.9).astype(np.uint8)).resize((side, side))
        file = io.BytesIO()
        picture.save(file, kind)
        found[f"{index}.{kind.lower()}"] = file.getvalue()
    return found


PICTURES = pictures()


@pytest.fixture(scope="module")
def detector(tiny_bundle: Path) -> Detector:
    return Detector.load(tiny_bundle)


@pytest.fixture(scope="module")
def expected(detector: Detector) -> dict[str, dict[str, Any]]:
    """What the library itself says of each picture, alone."""
    return {name: detector.judge(detector.prepare(data)[None]).row(0) for name, data in PICTURES.items()}


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    limits = f"max_request_bytes={LIMIT}", "max_images_per_request=24", "queue_size=256", "source=line-3"
    with running(tiny_bundle, *limits) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def same(detector: Detector, found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal within 1e-5 of the calibration scores' interquartile range, and the same verdict."""
    low, high = np.quantile(np.concatenate(detector.calibration.scores), [0.25, 0.75])
    close = abs(found["score"] - expected["score"]) <= 1e-5 * (high - low)
    rest = ("outlier", "alpha", "mode", "threshold")
    return (
        bool(close)
        and all(found[key] == expected[key] for key in rest)
        and found["parts"].keys() == expected["parts"].keys()
    )


def form(files: dict[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (name, data)) for name, data in files.items()]


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check a refusal's shape and return its error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == code
    assert error["message"]
    assert error["request_id"] == response.headers["x-request-id"]
    return error


def test_alone_together_and_at_once_a_picture_has_the_librarys_score(
    client: httpx.Client, detector: Detector, expected: dict[str, dict[str, Any]]
) -> None:
    alone = {name: client.post("/v1/score", content=data).json()["results"] for name, data in PICTURES.items()}
    together = client.post("/v1/score", files=form(PICTURES)).json()["results"]
    assert [result["filename"] for result in together] == list(PICTURES)
    with ThreadPoolExecutor(12) as pool:
        replies = pool.map(lambda name: (name, client.post("/v1/score", content=PICTURES[name])), list(PICTURES) * 4)
        at_once = [(name, reply.json()["results"][0]) for name, reply in replies]
    for name, result in zip(PICTURES, together, strict=True):
        assert len(alone[name]) == 1
        assert same(detector, alone[name][0], expected[name])
        assert same(detector, result, expected[name])
    for name, result in at_once:
        assert same(detector, result, expected[name])


def test_the_reply_names_the_model_that_scored(client: httpx.Client, detector: Detector, tiny_bundle: Path) -> None:
    model = {"name": tiny_bundle.name, "version": detector.version}
    reply = client.post("/v1/score", content=PICTURES["0.png"], headers={"X-Request-Id": "line-3.77"})
    assert reply.json()["model"] == model
    assert reply.headers["x-request-id"] == "line-3.77"
    assert ids.read(reply.json()["results"][0]["id"]) is not None
    (listed,) = client.get("/v1/models").json()["models"]
    assert listed["policy"]["alpha"] == detector.policy.alpha
    assert {key: listed[key] for key in model} == model
    assert tiny_bundle.name in client.get("/").text


@pytest.mark.parametrize(
    "content_type",
    [None, "image/png", "application/octet-stream", "application/x-www-form-urlencoded", "IMAGE/X-ODD; a=b"],
)
def test_a_raw_body_is_known_by_its_bytes(client: httpx.Client, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert client.post("/v1/score", content=PICTURES["0.png"], headers=headers).status_code == 200


def test_an_explanation_is_the_librarys(client: httpx.Client, detector: Detector) -> None:
    result = client.post("/v1/score?explain=true&parts=false", content=PICTURES["0.png"]).json()["results"][0]
    image = detector.prepare(PICTURES["0.png"])[None]
    (expected,) = detector.explain(image, detector.judge(image).parts)
    assert result["explanation"]["nearest_normal"]["name"] == expected["nearest_normal"]["name"]
    assert [one["index"] for one in result["explanation"]["latents"]] == [one["index"] for one in expected["latents"]]
    assert result["explanation"]["percentiles"] == pytest.approx(expected["percentiles"], abs=1)
    assert isinstance(result["regions"], list)
    assert "parts" not in result
    assert "heatmap_png" not in result


def test_a_body_without_a_declared_length_is_read(client: httpx.Client) -> None:
    halves = [PICTURES["0.png"][:50], PICTURES["0.png"][50:]]
    assert client.post("/v1/score", content=iter(halves)).status_code == 200


def test_heat_maps_are_pngs_for_those_who_ask_and_change_no_score(client: httpx.Client) -> None:
    plain = client.post("/v1/score", files=form(PICTURES)).json()["results"]
    mapped = client.post("/v1/score?heatmap=png", files=form(PICTURES)).json()["results"]
    for without, with_map in zip(plain, mapped, strict=True):
        assert "heatmap_png" not in without
        picture = Image.open(io.BytesIO(base64.b64decode(with_map["heatmap_png"])))
        assert picture.format == "PNG"
        assert picture.mode == "RGB"
        assert abs(without["score"] - with_map["score"]) < 1e-4


@pytest.mark.parametrize("alpha", ["0.5", "0.05", "1e-1"])
def test_another_alpha_judges_this_reply_alone(client: httpx.Client, detector: Detector, alpha: str) -> None:
    other, counted = detector.with_policy(float(alpha)), outliers_counted(client)
    found = client.post(f"/v1/score?alpha={alpha}&parts=false", files=form(PICTURES)).json()["results"]
    usual = client.post("/v1/score", files=form(PICTURES)).json()["results"]
    for name, result, plain in zip(PICTURES, found, usual, strict=True):
        wanted = other.judge(other.prepare(PICTURES[name])[None]).row(0)
        assert {key: result[key] for key in ("outlier", "alpha", "mode", "threshold")} == {
            key: wanted[key] for key in ("outlier", "alpha", "mode", "threshold")
        }
        assert result["score"] == pytest.approx(plain["score"], rel=1e-5)
        assert "parts" not in result
        assert plain["alpha"] == detector.policy.alpha
    # Rates are of the policy in force, or a curious client would set off alarms.
    assert outliers_counted(client) - counted == 2 * sum(result["outlier"] for result in usual)


def outliers_counted(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("anomaly_outliers_total"))


@pytest.mark.parametrize("name", sorted(bad_bytes()))
def test_bad_bytes_get_a_refusal_and_their_neighbours_their_score(
    client: httpx.Client, detector: Detector, expected: dict[str, dict[str, Any]], name: str
) -> None:
    bad = bad_bytes()[name]
    oversize = len(bad) > LIMIT
    good = dict(list(PICTURES.items())[:3])
    with ThreadPoolExecutor(8) as pool:
        alone = pool.submit(client.post, "/v1/score", content=bad)
        mixed = pool.submit(
            client.post, "/v1/score", files=form({"0.png": good["0.png"], "bad": bad, "1.jpeg": good["1.jpeg"]})
        )
        beside = {key: pool.submit(client.post, "/v1/score", content=data) for key, data in good.items()}
    assert 400 <= alone.result().status_code < 500
    error = refused(alone.result(), alone.result().status_code, alone.result().json()["error"]["code"])
    for key, reply in beside.items():
        assert same(detector, reply.result().json()["results"][0], expected[key])
    if oversize:
        refused(mixed.result(), 413, "too_large")
        return
    first, middle, last = mixed.result().json()["results"]
    assert same(detector, first, expected["0.png"])
    assert same(detector, last, expected["1.jpeg"])
    if error["code"] == "bad_archive":  # which alone it is taken for
        assert middle["error"]["code"] == "not_an_image"
    else:
        assert middle["error"] == {key: value for key, value in error.items() if key != "request_id"}


def test_when_no_picture_is_usable_the_whole_request_is_refused(client: httpx.Client) -> None:
    text = refused(client.post("/v1/score", files=form({"a": b"hello", "b": b"world"})), 422, "not_an_image")
    assert text
    reply = client.post("/v1/score", files=form({"a": b"hello", "b": PICTURES["0.png"][:60]}))
    refused(reply, 422, "no_usable_image")
    assert [result["filename"] for result in reply.json()["results"]] == ["a", "b"]
    assert len({result["error"]["code"] for result in reply.json()["results"]}) == 2


def test_too_much_is_413_whether_declared_or_not(client: httpx.Client) -> None:
    big = bytes(LIMIT + 1)
    refused(client.post("/v1/score", content=big), 413, "too_large")
    refused(client.post("/v1/score", content=iter([big[:LIMIT], big[LIMIT:]])), 413, "too_large")
    refused(client.post("/v1/score", content=bytes(20 * LIMIT)), 413, "too_large")
    refused(client.post("/v1/score", files=form({"a": bytes(LIMIT)})), 413, "too_large")
    refused(client.post("/v1/score", files=[("f", ("a", b"x"))] * 25), 413, "too_many_images")
    assert client.post("/v1/score", content=PICTURES["0.png"]).status_code == 200


def test_a_client_that_asks_first_is_refused_before_it_sends(server: Server) -> None:
    head = f"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**12}\r\nExpect: 100-continue\r\n\r\n"
    assert raw(server, head.encode()).startswith(b"HTTP/1.1 413")


def test_a_body_that_ends_early_is_400(server: Server) -> None:
    reply = raw(server, b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nshort")
    assert reply.startswith(b"HTTP/1.1 400")
    assert json.loads(reply.split(b"\r\n\r\n")[1])["error"]["code"] == "incomplete_body"


def raw(server: Server, sent: bytes) -> bytes:
    """Send bytes as they are, half-close, return what comes back."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=30) as connection:
        connection.sendall(sent)
        if b"Expect" not in sent:
            connection.shutdown(socket.SHUT_WR)
        # Headers and body may come in two pieces.
        reply = b""
        while piece := connection.recv(65536):
            reply += piece
            head, _, body = reply.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            if length is None or len(body) >= int(length[1]):
                break
        return reply


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        ("GET", "/nothing", {}, 404, "not_found"),
        ("GET", "/v1/score/../../etc/passwd", {}, 404, "not_found"),
        ("GET", "/%00%ff", {}, 404, "not_found"),
        ("GET", "/v1/score", {}, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", {}, 405, "method_not_allowed"),
        ("POST", "/ready", {}, 405, "method_not_allowed"),
        ("POST", "/v1/score", {}, 400, "empty"),
        ("POST", "/v1/score", {"json": {}}, 415, "unsupported_media_type"),
        ("POST", "/v1/score", {"data": {"text": "no file"}, "files": {}}, 422, "not_an_image"),
        ("POST", "/v1/score?heatmap=jpeg", {}, 400, "bad_parameter"),
        ("POST", "/v1/score?heatmaps=png", {}, 400, "unknown_parameter"),
        ("POST", "/v1/score?alpha=2", {}, 400, "bad_parameter"),
        ("POST", "/v1/score?alpha=nan", {}, 400, "bad_parameter"),
        ("POST", "/v1/score?alpha=few", {}, 400, "bad_parameter"),
        ("POST", "/v1/score?alpha=0.0000001", {}, 400, "alpha_not_supported"),
        ("POST", "/v1/score?parts=perhaps", {}, 400, "bad_parameter"),
        ("POST", "/v1/score", {"headers": {"X-Deadline-Ms": "soon"}}, 400, "bad_deadline"),
        ("POST", "/v1/score", {"headers": {"X-Deadline-Ms": "0"}}, 400, "bad_deadline"),
    ],
)  # fmt: skip
def test_every_mistake_has_its_status_and_code(
    client: httpx.Client, method: str, path: str, options: dict[str, Any], status: int, code: str
) -> None:
    refused(client.request(method, path, **options), status, code)


@pytest.mark.parametrize(
    ("content_type", "body", "code"),
    [
        ("multipart/form-data", b"x", "bad_multipart"),
        ("multipart/form-data; boundary=x", b"junk", "bad_multipart"),
        ("multipart/form-data; boundary=x", b"", "bad_multipart"),
        ("multipart/form-data; boundary=x", FIELD + b"; filename=b\r\n\r\nab", "bad_multipart"),
        ("multipart/form-data; boundary=x", FIELD + b"\r\n\r\nab\r\n--x--\r\n", "no_files"),
    ],
)
def test_a_broken_or_empty_form_is_400(client: httpx.Client, content_type: str, body: bytes, code: str) -> None:
    refused(client.post("/v1/score", content=body, headers={"Content-Type": content_type}), 400, code)


def test_an_id_that_could_harm_a_log_is_replaced(client: httpx.Client) -> None:
    for given in ("a b", "x" * 65, "new;line", ""):
        assert client.get("/", headers={"X-Request-Id": given}).headers["x-request-id"] != given


def test_health_answers_on_both_ports(server: Server, client: httpx.Client) -> None:
    for base in (server.url, server.health):
        for path in ("/v2/health/live", "/v2/health/ready", "/live", "/ready"):
            assert client.get(base + path).status_code == 200
        assert client.get(base + "/ready").json().items() >= {"ready": True, "state": "ready"}.items()
        assert "anomaly_images_scored_total" in client.get(base + "/metrics").text
    assert client.get(server.health + "/nothing").json()["error"]["code"] == "not_found"


def test_a_batch_judged_by_the_library_agrees_too(detector: Detector, expected: dict[str, dict[str, Any]]) -> None:
    judged = detector.judge(torch.stack([detector.prepare(data) for data in PICTURES.values()]))
    for index, row in enumerate(expected.values()):
        assert same(detector, judged.row(index), row)

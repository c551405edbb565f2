"""Plain pictures take a quick way past Flask: nobody can tell by the answers; and slow or broken bodies are bounded."""

import io
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from serving import Server, running, started

from service.keys import KeyFile, Role, made
from service.shares import Shares
from service.tickets import Target

BODY_SECONDS = 1.0
BY_FLASK = {"Cookie": "nothing=of-ours"}
"""A request with any cookie is none for the quick way."""


def picture(side: int = 32, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


GOOD = picture()
OVER = 200_000


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    with running(tiny_bundle, f"body_seconds={BODY_SECONDS}", f"max_request_bytes={OVER}", "log_requests=true") as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as client:
        yield client


def told(response: httpx.Response) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers without what differs between any two requests."""
    found = response.json()
    for result in found.get("results", ()):
        result.pop("id", None)
    if "error" in found:
        assert found["error"].pop("request_id") == response.headers["x-request-id"]
    passing = ("date", "content-length", "x-request-id", "connection")
    return response.status_code, found, {k: v for k, v in response.headers.items() if k not in passing}


@pytest.mark.parametrize(
    ("query", "body", "headers"),
    [
        ("", GOOD, {}),
        ("", picture(600), {}),
        ("", picture(300, "JPEG"), {"Content-Type": "image/jpeg"}),
        ("", GOOD, {"Content-Type": "application/octet-stream", "X-Request-Id": "mine-7"}),
        ("?parts=false", GOOD, {}),
        ("?alpha=0.2", GOOD, {}),
        ("?heatmap=none&explain=false", GOOD, {}),
        ("?model=nobody", GOOD, {}),
        ("?alpha=2", GOOD, {}),
        ("?alpha=0.0001", GOOD, {}),
        ("?parts=yes", GOOD, {}),
        ("?parts=false&parts=true", GOOD, {}),
        ("?what=%E2%82%AC", GOOD, {}),
        ("?alpha=", GOOD, {}),
        ("", GOOD, {"X-Deadline-Ms": "0"}),
        ("", GOOD, {"X-Deadline-Ms": "soon"}),
        ("", b"this is no picture", {}),
        ("", GOOD[:-20], {}),
        ("", GOOD[:10], {"Content-Type": "image/png"}),
        ("", GOOD, {"Content-Type": "text/html"}),
        ("", b"", {}),
        ("", bytes(OVER + 1), {}),
        ("", b"7z\xbc\xaf\x27\x1c" + bytes(600), {}),
        ("", GOOD, {"Host": "elsewhere.example"}),
    ],
)
def test_the_quick_way_answers_as_flask_does(
    client: httpx.Client, query: str, body: bytes, headers: dict[str, str]
) -> None:
    quick, slow = (
        client.post(f"/v1/score{query}", content=body, headers={**headers, **more}) for more in ({}, BY_FLASK)
    )
    (status, found, answered), expected = told(quick), told(slow)
    assert (status, answered) == (expected[0], expected[2])
    if status == 200:
        ours, theirs = found["results"][0], expected[1]["results"][0]
        assert ours.pop("score") == pytest.approx(theirs.pop("score"), rel=1e-5)
        assert ours.pop("parts", {}) == pytest.approx(theirs.pop("parts", {}), rel=1e-4)
    assert found == expected[1]


def test_both_ways_are_counted_and_written_down_alike(server: Server, client: httpx.Client) -> None:
    def count(route: str) -> float:
        line = re.search(rf'^anomaly_http_requests_total{{code="200",method="POST",route="{route}"}} (\S+)', said, re.M)
        return float(line[1]) if line else 0.0

    said = client.get("/metrics").text
    before = count("/v1/score")
    for more in ({}, BY_FLASK):
        client.post("/v1/score", content=GOOD, headers={"X-Request-Id": f"seen-{len(more)}", **more})
    said = client.get("/metrics").text
    assert count("/v1/score") == before + 2
    lines = [next(line for line in server.lines if f"seen-{way}" in line) for way in (0, 1)]
    shape = [re.sub(r"seen-\d|[0-9.:T-]{5,}Z?|\"milliseconds\": [0-9.]+", "", line) for line in lines]
    assert shape[0] == shape[1]


def test_keys_open_both_ways_alike(tiny_bundle: Path, tmp_path: Path) -> None:
    (key, secret), (ended, late) = (
        made("line", Role.SCORE, "line-1", requests_per_second=2),
        made("old", Role.SCORE, days=-1),
    )
    KeyFile(keys=(key, ended)).write(tmp_path / "keys.yaml")
    with (
        running(tiny_bundle, f"keys={tmp_path / 'keys.yaml'}") as server,
        httpx.Client(base_url=server.url, trust_env=False) as client,
    ):
        for headers in (
            {},
            {"Authorization": f"Bearer {late}"},
            {"X-API-Key": "av_0_0"},
            {"Authorization": "Basic eA=="},
        ):
            quick, slow = (
                client.post("/v1/score", content=GOOD, headers={**headers, **more}) for more in ({}, BY_FLASK)
            )
            assert told(quick) == told(slow)
            assert (quick.status_code, quick.headers["WWW-Authenticate"]) == (401, "Bearer")
        known = {"X-API-Key": secret}
        assert client.post("/v1/score", content=GOOD, headers=known).json()["results"][0]["p_value"] <= 1
        answers = [client.post("/v1/score", content=GOOD, headers={**known, **BY_FLASK}) for _ in range(6)]
        answers += [client.post("/v1/score", content=GOOD, headers=known) for _ in range(6)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert {answer.json()["error"]["code"] for answer in refused} == {"rate_limited"}
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        assert 'source="line-1"' in httpx.get(f"{server.health}/metrics", trust_env=False).text


def raw(server: Server, *pieces: bytes, pause: float = 0.0) -> bytes:
    """What comes back for bytes sent one piece after another, until the server has answered."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        return connection.recv(65536)


@pytest.mark.parametrize("more", [b"", b"Cookie: a=b\r\n"], ids=["quick", "flask"])
def test_a_body_that_comes_too_slowly_is_refused(server: Server, more: bytes) -> None:
    head = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n" + more + b"\r\n"
    began = time.monotonic()
    answer = raw(server, head, b"some")
    assert time.monotonic() - began >= BODY_SECONDS * 0.9
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"slow_body"' in answer


def test_slow_bodies_hold_up_nobody_else(server: Server, client: httpx.Client) -> None:
    head = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    with ThreadPoolExecutor(40) as pool:
        slow = [pool.submit(raw, server, head, b"some") for _ in range(40)]
        assert client.post("/v1/score", content=GOOD).status_code == 200
        assert all(one.result().startswith(b"HTTP/1.1 408") for one in slow)


def test_a_chunked_body_that_breaks_off_is_never_taken_for_a_whole_one(server: Server, client: httpx.Client) -> None:
    def scored() -> float:
        said = client.get("/metrics").text
        return sum(float(value) for value in re.findall(r"^anomaly_images_scored_total{.*} (\S+)", said, re.M))

    before = scored()
    head = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    whole = head + f"{len(GOOD):x}\r\n".encode() + GOOD + b"\r\n"
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        connection.sendall(whole)  # the last, empty chunk is missing
    assert raw(server, whole + b"0\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert scored() == before + 1


def test_cores_are_divided_by_what_a_picture_takes() -> None:
    def judging(seconds: float) -> Target:
        def judge(images: torch.Tensor, _: bool) -> Any:
            time.sleep(seconds * len(images))

        return Target(judge, torch.zeros(1, 4, 4, dtype=torch.uint8))

    threads = torch.get_num_threads()
    try:
        cpu = torch.device("cpu")
        found = []
        for cores, seconds in ((2, 0.0001), (2, 0.01), (4, 0.01), (16, 0.01)):
            shares = Shares(cores, None, cpu)
            with shares.one():
                shares.settle(judging(seconds))
            found.append(shares.batches)
        assert found == [1, 2, 4, 4]
        shares.take()
        assert torch.get_num_threads() == 3
        for given, device in ((3, cpu), (None, torch.device("cuda"))):
            shares = Shares(2, given, device)
            shares.settle(judging(0.01))
            assert shares.batches == (given or 1)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="it looks processes up in /proc")
def test_further_signals_do_not_cut_the_farewell_short(tiny_bundle: Path, tmp_path: Path) -> None:
    server = started(tiny_bundle, "-o", f"store={tmp_path / 's.sqlite'}", anew=True)
    assert server.ready.wait(120)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    (worker,) = [int(pid) for pid in children if "tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]
    os.killpg(server.process.pid, signal.SIGINT)
    while server.process.poll() is None:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGTERM)  # without a pause: no instant may be left at which one would kill
    assert server.ended.wait(60)
    assert server.process.poll() == 0
    assert "stopped: 0 pictures" in server.output

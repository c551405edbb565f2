"""Archives over HTTP: verdicts come line by line while the rest is scored, within bounds, with others served beside."""

import io
import json
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from archiving import MAKES, tar_bomb, tarred, zip_bomb, zipped
from flask import g
from prometheus_client import CollectorRegistry
from serving import Server, running
from test_service_http import PICTURES, form, refused, same
from test_service_limits import PICTURE, children, samples, total, wait_until

from anomaly_vae import Detector
from service import ids
from service.app import create_app
from service.errors import Problem
from service.keys import KeyFile, Role, made
from service.metrics import Metrics
from service.options import Options
from service.scoring import Asked
from service.settings import ServiceSettings
from service.streaming import Archives
from service.uploads import spooled_body

MANY = [(f"{number:04}.png", data) for number, data in enumerate(list(PICTURES.values()) * 125)]
LINUX = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="/proc tells open files and memory on Linux alone"
)
SCORED = "anomaly_images_scored_total"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    with running(tiny_bundle, "max_archives=1", "source=line-3") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def lines(reply: httpx.Response) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of an answer and its last line."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert reply.text.endswith("\n")
    *rows, last = [json.loads(line) for line in reply.text.splitlines()]
    for row in rows:
        assert ("error" in row) == (ids.read(row.get("id", "")) is None)
    assert "id" not in last
    return rows, last


@contextmanager
def unread(server: Server, body: bytes, headers: str = "", query: str = "?heatmap=png") -> Iterator[socket.socket]:
    """An archive whose answer nobody reads past its first bytes: its lines are long, so that it comes to a halt."""
    url = httpx.URL(server.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect((url.host, url.port))
        head = f"POST /v1/score{query} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        yield connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def spooled(server: Server) -> list[str]:
    """Files without a name that the service's process holds open."""
    (worker,) = children(server.process.pid)
    held = Path(f"/proc/{worker}/fd")
    links = [str(file.readlink()) for file in held.iterdir() if file.is_symlink()]
    return [link for link in links if link.endswith(" (deleted)")]


def most_memory(server: Server) -> int:
    """MiB the service's process has held at most."""
    (worker,) = children(server.process.pid)
    status = Path(f"/proc/{worker}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
def test_every_entry_has_the_verdict_it_has_alone(client: httpx.Client, tiny_detector: Detector, make: Any) -> None:
    files = {**PICTURES, "notes.txt": b"hello", "empty.png": b"", "inner.zip": zipped([("a.png", PICTURE)])}
    alone = client.post("/v1/score", files=form(files)).json()
    rows, last = lines(client.post("/v1/score", content=make([*files.items(), ("0.png", PICTURES["0.png"])])))
    assert [row["filename"] for row in rows] == [*files, "0.png"]
    for row, expected in zip(rows, [*alone["results"], alone["results"][0]], strict=True):
        assert row.keys() == expected.keys()
        assert row.get("error") == expected.get("error")
        assert "error" in row or same(tiny_detector, row, expected)
    outliers = sum(row.get("outlier", False) for row in rows)
    assert last == {"summary": {"scored": 25, "failed": 3, "outliers": outliers}, "model": alone["model"]}


def test_what_a_request_asks_for_goes_for_each_entry(client: httpx.Client) -> None:
    query = "/v1/score?alpha=0.5&parts=false&heatmap=png"
    alone = client.post(query, files=form(PICTURES)).json()["results"]
    rows, last = lines(client.post(query, content=tarred(PICTURES.items()), headers={"X-Request-Id": "tray-7"}))
    for row, expected in zip(rows, alone, strict=True):
        assert ("error" in row) == ("id" not in row)
        assert {key: row[key] for key in ("outlier", "alpha", "threshold", "regions")} == {
            key: expected[key] for key in ("outlier", "alpha", "threshold", "regions")
        }
        assert row.keys() == expected.keys()
    assert last["summary"]["outliers"] == sum(row["outlier"] for row in rows)


@LINUX
def test_an_unread_answer_halts_alone_and_a_reader_who_leaves_frees_everything(
    server: Server, client: httpx.Client
) -> None:
    before = total(samples(server), SCORED, source="line-3")
    with unread(server, tarred(MANY)):
        # Its first line is here while most of it is not even scored.
        assert total(samples(server), SCORED) - before < len(MANY)
        assert spooled(server)
        other = client.post("/v1/score", content=tarred(MANY[:1]))
        refused(other, 429, "too_many_archives")
        assert int(other.headers["retry-after"]) >= 1
        for _ in range(20):
            assert client.post("/v1/score", content=PICTURE).status_code == 200
        assert client.post("/v1/score", files=form(PICTURES)).status_code == 200
    wait_until(lambda: not spooled(server))
    rows, _ = lines(client.post("/v1/score", content=tarred(MANY[:1])))
    assert len(rows) == 1
    found = samples(server)
    assert total(found, SCORED) - before < len(MANY)
    assert total(found, "anomaly_queue_depth") == 0
    assert total(found, "anomaly_rejected_total", reason="too_many_archives") == 1


@LINUX
def test_thousands_are_scored_in_little_memory_while_single_ones_pass(server: Server, client: httpx.Client) -> None:
    lines(client.post("/v1/score", content=zipped(MANY[:100])))
    memory = most_memory(server)
    arrived: list[str] = []
    with client.stream("POST", "/v1/score", content=iter([zipped(MANY)])) as reply:
        for line in reply.iter_lines():
            arrived.append(line)
            if len(arrived) % 500 == 1:
                assert httpx.post(server.url + "/v1/score", content=PICTURE).status_code == 200
    assert len(arrived) == len(MANY) + 1
    assert json.loads(arrived[-1])["summary"]["scored"] == len(MANY) == 3000
    assert most_memory(server) - memory < 60
    assert not spooled(server)


@LINUX
def test_hostile_archives_get_clear_answers_and_the_service_lives_on(server: Server, client: httpx.Client) -> None:
    lines(client.post("/v1/score", content=zipped(MANY[:100])))
    memory, rejected = most_memory(server), total(samples(server), "anomaly_rejected_total", reason="bad_archive")
    empty = [(f"{number}.png", b"") for number in range(100_000)]
    before = {
        "expands_too_much": tar_bomb(3000),
        "too_many_entries": zipped(empty),
        "bad_archive": b"PK\x03\x04" + bytes(3000),
        "empty_archive": tarred([(".DS_Store", b"1")]),
    }
    for code, body in before.items():
        refused(client.post("/v1/score", content=body), 413 if "too" in code else 422, code)
    within = {
        "too_many_entries": tarred(empty[:10_001]),
        "expands_too_much": zip_bomb(20, 16),
        "bad_archive": tarred(PICTURES.items())[:5000],
    }
    for code, body in within.items():
        rows, last = lines(client.post("/v1/score", content=body))
        assert rows
        assert last["error"].keys() == {"code", "message", "request_id"}
        assert last["error"]["code"] == code
    tricks = ["../../etc/passwd", "/etc/passwd", "C:\\boot.ini", "a\0b.png"]
    rows, last = lines(client.post("/v1/score", content=zipped((name, PICTURE) for name in tricks[:3])))
    assert [row["filename"] for row in rows] == tricks[:3]
    assert last["summary"]["scored"] == 3
    refused(client.post("/v1/score", content=b"BZh91AY&SY"), 415, "unsupported_archive")
    refused(client.post("/v1/score", content=PICTURE, headers={"Content-Type": "application/zip"}), 422, "bad_archive")
    assert client.post("/v1/score", content=PICTURE).status_code == 200
    assert most_memory(server) - memory < 150
    assert not spooled(server)
    assert total(samples(server), "anomaly_rejected_total", reason="bad_archive") - rejected == len(before) + 4


@pytest.fixture(scope="module")
def narrow(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str, str]]:
    """A service that takes little and is slow, and two keys, the first of which may hold still less."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    key, secret = made("line", Role.SCORE, bytes_in_hand=8_000_000, source="line-5")
    other, free = made("free", Role.SCORE)
    KeyFile(keys=(key, other)).write(file)
    bounds = "max_archive_bytes=9000000", "max_archive_entries=3000", "max_request_bytes=300000"
    with running(tiny_bundle, *bounds, f"keys={file}", "extra_delay_ms=20", "max_batch=64") as server:
        yield server, secret, free


def test_too_many_bytes_are_refused_whether_declared_or_not(narrow: tuple[Server, str, str]) -> None:
    server, *secrets = narrow
    big = tarred([("a.png", bytes(9_000_001))])
    for secret, said in zip(secrets, ("8000000 bytes at once", "max_archive_bytes"), strict=True):
        with httpx.Client(base_url=server.url, headers={"X-API-Key": secret}, timeout=60) as client:
            for content in (big, iter([big[:512], big[512:]])):
                error = refused(client.post("/v1/score", content=content), 413, "too_large")
                assert said in error["message"]
            rows, _ = lines(client.post("/v1/score", content=tarred([("a.png", bytes(300_001)), ("b.png", PICTURE)])))
            assert rows[0]["error"]["code"] == "too_large"
            assert "outlier" in rows[1]


@LINUX
def test_a_keys_bytes_are_in_hand_until_the_answer_has_gone(narrow: tuple[Server, str, str]) -> None:
    server, secret, _ = narrow
    with httpx.Client(base_url=server.url, headers={"X-API-Key": secret}, timeout=60) as client:
        body = tarred(MANY)
        assert 7_000_000 < len(body) < 8_000_000
        for _ in range(2):  # what is given back is what was taken, no more
            with unread(server, body, f"X-API-Key: {secret}\r\n"):
                refused(client.post("/v1/score", content=bytes(1_000_000)), 429, "too_many_bytes")
                refused(client.post("/v1/score", content=iter([body[:1000], body[1000:]])), 429, "too_many_bytes")
                assert client.post("/v1/score", content=PICTURE).status_code == 200
            wait_until(lambda: not spooled(server))
        few = tarred(MANY[:200])
        rows, last = lines(client.post("/v1/score", content=iter([few[:1000], few[1000:]])))
        assert len(few) > 400_000
        assert len(rows) == last["summary"]["scored"] == 200
        assert total(samples(server), SCORED, source="line-5") >= 200


def test_an_archive_leaves_others_half_of_the_queue(narrow: tuple[Server, str, str]) -> None:
    server, secret, _ = narrow
    depths, settings = [], ServiceSettings()
    with httpx.stream(
        "POST", server.url + "/v1/score", content=tarred(MANY[:320]), headers={"X-API-Key": secret}
    ) as reply:
        for number, _ in enumerate(reply.iter_lines()):
            if number % 16 == 0:
                depths.append(total(samples(server), "anomaly_queue_depth"))
    assert 0 < max(depths) <= settings.queue_size / (2 * settings.max_archives)


def test_an_archive_is_never_refused_for_a_full_queue(narrow: tuple[Server, str, str]) -> None:
    server, secret, _ = narrow
    codes: Counter[int] = Counter()
    over = threading.Event()

    def crowd() -> None:
        with httpx.Client(base_url=server.url, headers={"X-API-Key": secret}, timeout=60) as client:
            while not over.is_set():
                codes[client.post("/v1/score", files=[("f", ("a", PICTURE))] * 32).status_code] += 1

    with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=server.url, headers={"X-API-Key": secret}) as client:
        crowds = [pool.submit(crowd) for _ in range(4)]
        wait_until(lambda: codes[429] > 0)
        rows, last = lines(client.post("/v1/score", content=tarred(MANY[:200]), timeout=60))
        over.set()
        assert [future.result() for future in crowds]
    assert len(rows) == last["summary"]["scored"] == 200


def test_the_deadline_ends_an_archive_with_a_line_that_says_so(narrow: tuple[Server, str, str]) -> None:
    server, secret, _ = narrow
    with httpx.Client(base_url=server.url, headers={"X-API-Key": secret}, timeout=60) as client:
        rows, last = lines(client.post("/v1/score", content=tarred(MANY), headers={"X-Deadline-Ms": "700"}))
        assert 0 < len(rows) < 3000
        assert last["error"]["code"] == "deadline_exceeded"
        assert "send the rest" in last["error"]["message"]
        late = client.post("/v1/score", content=tarred(MANY), headers={"X-Deadline-Ms": "1"})
        refused(late, 504, "deadline_exceeded")
        assert total(samples(server), "anomaly_queue_depth") == 0


def test_sigterm_ends_an_archive_after_what_was_accepted_with_a_line_that_says_so(tiny_bundle: Path) -> None:
    with running(tiny_bundle) as server:
        url, late, rows = httpx.URL(server.url), tarred(MANY[:1]), []
        assert len(late) == 10240
        with socket.create_connection((url.host, url.port)) as unfinished:
            head = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10240\r\n\r\n"
            unfinished.sendall(head + late[:600])
            with httpx.stream("POST", server.url + "/v1/score", content=tarred(MANY * 3), timeout=60) as reply:
                for line in reply.iter_lines():
                    rows.append(json.loads(line))
                    if len(rows) == 20:
                        os.kill(server.process.pid, signal.SIGTERM)
            unfinished.sendall(late[600:])
            assert unfinished.recv(1000).startswith(b"HTTP/1.1 503")
        *rows, last = rows
        assert last["error"]["code"] == "draining"
        assert all("outlier" in row for row in rows)
        assert 20 <= len(rows) < 9000
        assert server.process.wait(60) == 0
        assert server.ended.wait(60)
        assert f"stopped: {len(rows)} pictures scored" in server.output


def test_a_fault_in_mid_answer_is_told_and_logged(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(ServiceSettings(device="cpu"), "tiny", lambda: Detector.load(tiny_bundle))
    scorer = app.extensions["running"].scorer
    archives = Archives(scorer, ServiceSettings(), Metrics(CollectorRegistry()))
    asked = Asked(scorer.models.pick(), time.monotonic() + 60, Options(), "tray-8")
    numbers = iter(range(9))

    def row(name: str, outcome: object) -> dict[str, Any]:
        return {"seventh": 7 // (2 - next(numbers))}

    with app.test_request_context("/", method="POST", data=tarred(MANY[:9])):
        g.key, g.taken = None, None
        answer = archives.answer("tar", asked, row)
    first, second, last = [json.loads(line) for line in answer.response]
    answer.close()
    assert (first["seventh"], second["seventh"]) == (3, 7)
    assert (last["error"]["code"], last["error"]["request_id"]) == ("internal", "tray-8")
    assert caplog.records[-1].fields == {"request_id": "tray-8"}
    assert "ZeroDivisionError" in caplog.text
    assert app.extensions["running"].close(60)[0]


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    body = bytes(1_000_000)
    environ = {"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limit[1]))
    try:
        with pytest.raises(Problem, match="no room") as refused, spooled_body(environ, 2_000_000, lambda _: None):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (refused.value.status, refused.value.code) == (507, "no_room")

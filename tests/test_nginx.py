"""A real nginx, configured as it is deployed, in front of a real service: TLS, slow clients, large bodies, streams."""

import json
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from archiving import tarred
from nginx import Nginx, nginx
from serving import Server, running
from test_archive_stream import MANY, SCORED, lines, refused, wait_until
from test_service_http import PICTURES
from test_service_limits import samples, total

from anomaly_vae import Detector
from service.app import create_app
from service.settings import ServiceSettings

PICTURE = PICTURES["0.png"]
HEADERS = ("Strict-Transport-Security", "X-Content-Type-Options", "Content-Security-Policy", "Referrer-Policy",
           "X-Request-Id", "Cache-Control")  # fmt: skip
QUICKER = {
    "client_header_timeout 10s;": "client_header_timeout 1s;",
    "client_body_timeout 15s;": "client_body_timeout 1s;",
    "send_timeout 30s;": "send_timeout 1s;",
    "client_max_body_size 1024m;": "client_max_body_size 16m;",
    "limit_conn anomaly_vae_clients 128;": "limit_conn anomaly_vae_clients 12;",
}


@pytest.fixture(scope="module")
def service(tiny_bundle: Path) -> Iterator[Server]:
    settings = "trusted_proxies=1", "max_archives=1", "queue_size=32", "max_batch=8", "request_threads=4", "store=none"
    with running(tiny_bundle, *settings) as server:
        yield server


@pytest.fixture(scope="module")
def front(service: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(tmp_path_factory.mktemp("nginx"), service.url.split("//")[1], QUICKER) as server:
        yield server


@pytest.fixture(scope="module")
def client(front: Nginx) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=front.url, verify=front.trust(), timeout=60) as client:
        yield client


def begun(front: Nginx, length: int = 1000, sent: bytes = b"\x89PNG") -> ssl.SSLSocket:
    """A request whose body has begun, and goes on only if somebody sends more."""
    connection = front.connect()
    head = f"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + sent)
    return connection


def is_closed(connection: ssl.SSLSocket) -> bool:
    """Waits until the other side says something or hangs up; whether it hung up."""
    try:
        return connection.recv(100) == b""
    except (ConnectionResetError, ssl.SSLError):
        return True


def statuses(front: Nginx) -> list[int]:
    return [json.loads(line)["status"] for line in front.log.splitlines()]


def test_pictures_and_archives_are_scored_through_it(client: httpx.Client, service: Server) -> None:
    (through,) = client.post("/v1/score", content=PICTURE).json()["results"]
    (direct,) = httpx.post(f"{service.url}/v1/score", content=PICTURE).json()["results"]
    assert through["parts"] == direct["parts"]
    rows, last = lines(client.post("/v1/score", content=tarred(MANY[:50])))
    assert len(rows) == last["summary"]["scored"] == 50


def test_lines_of_an_archive_come_while_the_rest_is_scored(client: httpx.Client, service: Server) -> None:
    before = total(samples(service), SCORED)
    with client.stream("POST", "/v1/score", content=tarred(MANY[:800])) as reply:
        found = reply.iter_lines()
        assert "score" in json.loads(next(found))
        assert total(samples(service), SCORED) - before < 800
        assert sum(1 for _ in found) == 800


def test_tls_alone_and_of_today(front: Nginx, client: httpx.Client) -> None:
    with front.connect() as connection:
        assert connection.version() == "TLSv1.3"
    old = ssl.create_default_context(cafile=str(front.certificate))
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with (
        pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"),
        socket.create_connection(("localhost", front.port)) as raw,
    ):
        old.wrap_socket(raw, server_hostname="localhost")
    plain = f"http://localhost:{front.plain_port}"
    moved = httpx.get(f"{plain}/v1/models?x=1")
    assert (moved.status_code, moved.headers["location"]) == (308, "https://localhost/v1/models?x=1")
    refused(httpx.post(f"{plain}/v1/score", content=PICTURE), 403, "tls_required")
    refused(httpx.get(f"http://localhost:{front.port}/"), 400, "tls_required")


def test_every_header_is_there_once_whoever_answers(client: httpx.Client) -> None:
    for path in ("/v1/models", "/nothing", "/metrics", "/v1/score"):
        reply = client.get(path)
        assert {name: len(reply.headers.get_list(name)) for name in HEADERS} == dict.fromkeys(HEADERS, 1), path
        assert reply.headers["content-type"] == "application/json"
    large = client.post("/v1/score", content=bytes(17 << 20))
    assert {name: len(large.headers.get_list(name)) for name in HEADERS} == dict.fromkeys(HEADERS, 1)


def test_the_service_believes_the_proxy_and_only_where_it_is_told_to(
    client: httpx.Client, service: Server, front: Nginx, tiny_bundle: Path
) -> None:
    secure = {"X-Forwarded-Proto": "https"}
    own, foreign = {"Origin": front.url}, {"Origin": "https://elsewhere.example"}
    assert "max-age" in client.get("/v1/models").headers["strict-transport-security"]
    assert client.get("/v1/models", headers=own).status_code == 200, "the proxy tells under which name it was asked"
    refused(client.get("/v1/models", headers=foreign), 403, "cross_site")
    refused(client.get("/v1/models", headers={"Host": "elsewhere.example"}), 403, "unknown_host")
    lied = client.get("/v1/models", headers={"X-Forwarded-Host": "elsewhere.example", "Forwarded": "host=elsewhere"})
    assert lied.status_code == 200
    assert "strict-transport-security" in httpx.get(f"{service.url}/v1/models", headers=secure).headers
    app = create_app(ServiceSettings(), "tiny", lambda: Detector.load(tiny_bundle))
    assert "Strict-Transport-Security" not in app.test_client().get("/v1/models", headers=secure).headers
    app.extensions["running"].close(10.0)


def test_what_is_for_those_inside_stays_inside(client: httpx.Client, service: Server) -> None:
    for path in ("/metrics", "/live", "/ready", "/ready/", "/v2/health/ready", "/v2/health/live"):
        refused(client.get(path), 404, "not_found")
    assert httpx.get(f"{service.health}/metrics").status_code == 200


def test_too_large_is_said_in_json_before_the_body_is_sent(client: httpx.Client, front: Nginx) -> None:
    error = refused(client.post("/v1/score", content=bytes(17 << 20)), 413, "too_large")
    assert "split it" in error["message"]
    with begun(front, length=2 << 30) as connection:
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_slow_body_is_cut_off_and_the_service_never_saw_it(front: Nginx, service: Server) -> None:
    before = total(samples(service), "anomaly_http_requests_total")
    timeouts = statuses(front).count(408)
    with begun(front) as connection:
        assert is_closed(connection)
    wait_until(lambda: statuses(front).count(408) == timeouts + 1)
    assert total(samples(service), "anomaly_http_requests_total") == before


def test_a_slow_header_is_cut_off(front: Nginx) -> None:
    timeouts = statuses(front).count(408)
    with front.connect() as connection:
        connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: local")
        assert is_closed(connection)
    wait_until(lambda: statuses(front).count(408) == timeouts + 1)


def test_bodies_that_trickle_hold_no_thread_of_the_service(front: Nginx, client: httpx.Client) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(begun(front)) for _ in range(8)]  # it has four threads for requests
        for _ in range(3):
            assert client.post("/v1/score", content=PICTURE).status_code == 200
            for connection in slow:
                connection.sendall(b"x")


def test_one_address_has_so_many_requests_at_once(front: Nginx, client: httpx.Client) -> None:
    wait_until(lambda: client.get("/v1/models").status_code == 200)
    with ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(begun(front))
        reply = client.get("/v1/models")
        refused(reply, 429, "rate_limited")
        assert reply.headers["retry-after"] == "5"
    wait_until(lambda: client.get("/v1/models").status_code == 200)


def test_who_does_not_read_an_archives_answer_is_dropped_and_the_place_is_free(
    front: Nginx, client: httpx.Client
) -> None:
    body = tarred(MANY)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("localhost", front.port))
    with front.trust().wrap_socket(raw, server_hostname="localhost") as connection:
        head = f"POST /v1/score?heatmap=png HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert connection.recv(12) == b"HTTP/1.1 200"
        few = tarred(MANY[:3])
        refused(client.post("/v1/score", content=few), 429, "too_many_archives")
        wait_until(lambda: client.post("/v1/score", content=few).status_code == 200)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_no_connection_becomes_a_websocket(client: httpx.Client) -> None:
    asked = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
             "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
    reply = client.get("/v1/models", headers=asked)
    assert reply.status_code == 200
    assert "upgrade" not in reply.headers


def test_both_logs_and_the_answer_have_one_id(client: httpx.Client, front: Nginx) -> None:
    given = client.get("/v1/models", headers={"X-Request-Id": "tray-7"})
    assert given.headers["x-request-id"] == "tray-7"
    mended = client.get("/v1/models", headers={"X-Request-Id": 'no"good'})
    wait_until(lambda: mended.headers["x-request-id"] in front.log)
    assert '"request_id":"tray-7"' in front.log
    assert "good" not in front.log


def test_without_a_service_the_answer_says_so_and_when_to_come_back(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with nginx(tmp_path, address, {}) as alone:
            reply = httpx.post(f"{alone.url}/v1/score", content=PICTURE, verify=alone.trust())
    refused(reply, 503, "unavailable")
    assert reply.headers["retry-after"] == "5"
    assert reply.json()["error"]["request_id"] == reply.headers["x-request-id"]

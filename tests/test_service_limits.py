"""Overload is refused, not suffered; a service told to stop finishes what it accepted; one that dies comes back."""

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Server, running, started
from test_service_http import PICTURES

PICTURE = PICTURES["0.png"]


def samples(server: Server) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All metric samples by name and sorted labels."""
    text = httpx.get(server.health + "/metrics").text
    families = list(text_string_to_metric_families(text))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def total(found: dict[tuple[str, tuple[tuple[str, str], ...]], float], name: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(value for (sample, by), value in found.items() if sample == name and wanted <= set(by))


def test_the_metrics_count_exactly_and_start_at_zero(tiny_bundle: Path) -> None:
    with running(tiny_bundle, "source=line-3", "model=digits") as server, httpx.Client(base_url=server.url) as client:
        labels = {"model": "digits", "source": "line-3"}
        before = samples(server)
        for name in ("anomaly_images_scored_total", "anomaly_outliers_total"):
            assert [value for (sample, by), value in before.items() if sample == name] == [0.0]
            assert total(before, name, **labels) == 0.0
        results = []
        for data in list(PICTURES.values())[:7]:
            results += client.post("/v1/score", content=data).json()["results"]
        results += client.post("/v1/score?heatmap=png", files=[("f", ("a", PICTURE)), ("f", ("b", b"no"))]).json()[
            "results"
        ][:1]
        client.post("/v1/score", content=b"no picture")
        for path in ("/a", "/b", "/c"):
            client.get(path)
        found = samples(server)
    outliers = sum(result["outlier"] for result in results)
    assert total(found, "anomaly_images_scored_total", **labels) == len(results) == 8
    assert total(found, "anomaly_outliers_total", **labels) == outliers
    assert total(found, "anomaly_p_value_count", **labels) == 8
    assert total(found, "anomaly_p_value_sum", **labels) == pytest.approx(sum(result["p_value"] for result in results))
    assert total(found, "anomaly_expected_outlier_ratio", **labels) > 0
    assert total(found, "anomaly_model_info", model="digits") == 1
    assert total(found, "anomaly_http_requests_total", route="/v1/score", method="POST", code="200") == 8
    assert total(found, "anomaly_http_requests_total", route="/v1/score", method="POST", code="422") == 1
    assert total(found, "anomaly_http_requests_total", route="unmatched", code="404") == 3
    failures = {dict(by)["code"]: value for (name, by), value in found.items()
                if name == "anomaly_http_requests_total" and ("route", "/v1/score") in by}  # fmt: skip
    assert failures == {"200": 8, "422": 1, "429": 0, "500": 0, "503": 0, "504": 0}, "failures start at 0"
    assert total(found, "anomaly_http_request_duration_seconds_count", route="/v1/score") == 9
    assert total(found, "anomaly_rejected_total", reason="bad_image") == 2
    assert total(found, "anomaly_rejected_total") == 2
    assert total(found, "anomaly_batch_size_sum") == 8
    assert total(found, "anomaly_queue_depth") == 0
    for stage, count in {"read": 9, "decode": 10, "queue": 8, "judge": 8, "draw": 1}.items():
        assert total(found, "anomaly_stage_duration_seconds_count", stage=stage) == count, stage
    for name, by in found:
        assert not {"/a", "/b", "/c"} & {value for _, value in by}, name


def test_a_full_queue_is_429_with_retry_after_and_a_late_verdict_504(tiny_bundle: Path) -> None:
    # The first picture waits half a second for company, in the only place there is.
    settings = "queue_size=1", "max_images_per_request=1", "extra_delay_ms=500"
    with running(tiny_bundle, *settings) as server, ThreadPoolExecutor(4) as pool:
        first = pool.submit(httpx.post, server.url + "/v1/score", content=PICTURE)
        wait_until(lambda: total(samples(server), "anomaly_queue_depth") == 1)
        second = httpx.post(server.url + "/v1/score", content=PICTURE)
        assert second.status_code == 429
        assert second.json()["error"]["code"] == "queue_full"
        assert int(second.headers["retry-after"]) >= 1
        assert first.result().status_code == 200
        late = httpx.post(server.url + "/v1/score", content=PICTURE, headers={"X-Deadline-Ms": "50"})
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "deadline_exceeded"
        assert httpx.post(server.url + "/v1/score", content=PICTURE).status_code == 200
        found = samples(server)
    assert total(found, "anomaly_rejected_total", reason="queue_full") == 1
    assert total(found, "anomaly_rejected_total", reason="deadline") == 1
    assert total(found, "anomaly_images_scored_total") == 2


def test_sigterm_makes_unready_finishes_the_queued_refuses_the_rest_and_ends_with_0(tiny_bundle: Path) -> None:
    settings = "extra_delay_ms=5000", "max_batch=64"
    with running(tiny_bundle, *settings, anew=True) as server, ThreadPoolExecutor(8) as pool:
        url = httpx.URL(server.url)
        replies = [pool.submit(httpx.post, server.url + "/v1/score", content=PICTURE, timeout=60) for _ in range(8)]
        # A request whose body has yet to come keeps the process alive for a look at it.
        with socket.create_connection((url.host, url.port)) as unfinished:
            unfinished.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nno ")
            wait_until(lambda: total(samples(server), "anomaly_queue_depth") == 8)
            server.process.terminate()
            wait_until(lambda: httpx.get(server.health + "/ready").status_code == 503)
            said = httpx.get(server.health + "/ready").json()
            assert (said["ready"], said["state"]) == (False, "draining")
            assert httpx.get(server.health + "/live").status_code == 200
            unfinished.sendall(b"image!")
            refusal = b""
            while b"}}" not in refusal and (piece := unfinished.recv(65536)):
                refusal += piece
        assert b" 503 " in refusal.splitlines()[0]
        assert b'"draining"' in refusal
        assert [reply.result().status_code for reply in replies] == [200] * 8
        assert server.process.wait(60) == 0
        assert server.ended.wait(60)
        assert "stopped: 8 pictures scored" in server.output


def test_a_stop_under_load_loses_no_accepted_request(tiny_bundle: Path) -> None:
    outcomes: Counter[str] = Counter()
    counting = threading.Lock()

    def client(url: str) -> None:
        outcome = "200"
        while outcome == "200":
            try:
                outcome = str(httpx.post(url, content=PICTURE, timeout=60).status_code)
            except httpx.TransportError:
                outcome = "never accepted"  # refused, or still in the listening socket's queue when that closed
            with counting:
                outcomes[outcome] += 1

    with running(tiny_bundle, anew=True) as server, ThreadPoolExecutor(12) as pool:
        for _ in range(12):
            pool.submit(client, server.url + "/v1/score")
        wait_until(lambda: outcomes["200"] > 50)
        assert server.stop() == 0
    said = re.search(r"stopped: (\d+) pictures scored", server.output)
    assert said, server.output
    assert int(said[1]) == outcomes["200"]
    assert set(outcomes) <= {"200", "503", "never accepted"}


def test_a_killed_worker_is_replaced_and_one_whose_command_is_killed_ends(tiny_bundle: Path) -> None:
    with running(tiny_bundle, anew=True) as server:
        assert server.lines[0].startswith(f"starting: loading {tiny_bundle} and warming it up")
        (worker,) = children(server.process.pid)
        server.ready.clear()
        os.kill(worker, signal.SIGKILL)
        assert server.ready.wait(60)
        assert children(server.process.pid) != [worker]
        assert httpx.get(server.health + "/ready").status_code == 200
        assert httpx.post(server.url + "/v1/score", content=PICTURE).status_code == 200
        server.process.kill()
        server.process.wait(60)
        assert server.ended.wait(60)  # the pipe ends when the last process that holds it is gone
        assert "stopped: 1 pictures scored" in server.output
        assert server.output.count("starting: ") == 1


def test_what_cannot_start_says_so_in_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        attempts = {
            "missing": started(tmp_path / "missing", anew=True),
            taken: started(tiny_bundle, "--port", taken, anew=True),
        }
        for said, attempt in attempts.items():
            assert attempt.process.wait(60) == 2
            assert attempt.ended.wait(60)
            assert attempt.output.startswith("error: ")
            assert attempt.output.count("\n") == 1
            assert said in attempt.output


def children(pid: int) -> list[int]:
    """Child processes of `pid`."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [line.split() for line in listing.splitlines()]
    return [int(child) for child, parent in pairs if int(parent) == pid]


def wait_until(condition: object) -> None:
    """Look again and again, for at most a minute; for tests only."""
    assert callable(condition)
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)

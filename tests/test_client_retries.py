"""What a client tries again and how long it waits: a full queue, a service that dies, an answer that is lost."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from archiving import tarred
from serving import Server, running, started
from test_client import ONCE

from anomaly_vae import Client, Retries, ServiceError
from anomaly_vae.answers import Forgotten, Scored
from anomaly_vae.asking import Answer, Ask
from anomaly_vae.retrying import Turns


@pytest.fixture(scope="module")
def pictures(digits_folder: Path) -> list[Path]:
    return [*sorted((digits_folder / "good").iterdir())[:12], *sorted((digits_folder / "8").iterdir())[:12]]


def test_a_full_queue_is_waited_for_and_told_to_those_who_do_not_wait(tiny_bundle, pictures):
    small = "queue_size=2", "max_images_per_request=2", "max_batch=1", "store=none"
    data = [path.read_bytes() for path in pictures]
    with running(tiny_bundle, *small) as server, ThreadPoolExecutor(16) as pool:
        with Client(server.url, retries=ONCE) as hasty:

            def refused(picture):
                try:
                    return hasty.score_one(picture) and None
                except ServiceError as error:
                    return error

            errors = [error for error in pool.map(refused, data * 10) if error]
        assert {(error.status, error.code) for error in errors} == {(429, "queue_full")}
        assert all(error.retry_after > 0 for error in errors)
        with Client(server.url, retries=Retries(times=1000)) as patient:
            assert len(list(pool.map(patient.score_one, data * 4))) == len(data) * 4


def killed(server: Server) -> None:
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(60)


def test_a_service_killed_in_mid_request_is_waited_for_until_it_is_back(tiny_bundle, pictures, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    data = pictures[0].read_bytes()
    (tmp_path / "many.tar").write_bytes(tarred([(f"{i}.png", data) for i in range(4000)]))
    options = "--port", port, "-o", "store=none", "-o", "max_batch=1"
    server = started(tiny_bundle, *options)
    assert server.ready.wait(120)
    scored, stop = [], threading.Event()

    def go_on(client):
        while not stop.is_set():
            scored.append((time.monotonic(), client.score_one(data).score))

    with Client(server.url, retries=Retries(times=1000, seconds=120)) as client, ThreadPoolExecutor(4) as pool:
        rows = client.score_archive(tmp_path / "many.tar")
        assert next(rows).filename == "0.png"
        workers = [pool.submit(go_on, client) for _ in range(3)]
        while len(scored) < 20:
            time.sleep(0.01)
        killed(server)
        with pytest.raises(ServiceError) as caught:
            list(rows)
        assert (caught.value.code, caught.value.status) == ("cut_off", 200)
        with Client(f"http://127.0.0.1:{port}", retries=Retries(times=2, seconds=5)) as other:
            for asked in (other.models, lambda: other.rollback("tiny")):
                with pytest.raises(ServiceError, match="check the address") as caught:
                    asked()
                assert (caught.value.code, caught.value.status) == ("unreachable", None)
        again, died = started(tiny_bundle, *options), time.monotonic()
        try:
            assert again.ready.wait(120)
            ready = time.monotonic()
            while not scored or scored[-1][0] < ready:
                assert not any(worker.done() for worker in workers)
                time.sleep(0.01)
            stop.set()
            for worker in workers:
                worker.result(60)
        finally:
            killed(again)
    assert {round(score, 4) for _, score in scored} == {round(scored[0][1], 4)}
    assert any(moment > died for moment, _ in scored)


@contextmanager
def silent() -> Iterator[tuple[str, list[bytes]]]:
    """A port where every request is read, and the connection then closed without a word; and what was read."""
    heads: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    heads.append(connection.recv(65536).partition(b"\r\n")[0])

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", heads
        listening.shutdown(socket.SHUT_RDWR)


def test_where_the_answer_is_lost_reading_is_repeated_and_writing_is_not():
    with silent() as (url, heads), Client(url, retries=Retries(times=3)) as client:
        for ask, code, times in [
            (client.models, "unreachable", 4),
            (lambda: client.score(b"x"), "unreachable", 4),
            (lambda: client.set_policy("m", alpha=0.1), "answer_lost", 1),
            (lambda: client.forget("0" * 16), "answer_lost", 1),
            (lambda: client.feedback("0" * 16, "normal"), "answer_lost", 1),
        ]:
            with pytest.raises(ServiceError) as caught:
                ask()
            assert (caught.value.code, len(heads)) == (code, times)
            heads.clear()


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def refusal(status: int, **more) -> Answer:
    return Answer(status, more.pop("headers", {}), b'{"error": {"code": "c", "message": "m"}}')


def waits(ask: Ask, retries: Retries, answer: Answer, jitter: float = 1.0) -> list[float]:
    """How long is waited between attempts that all get `answer`."""
    clock, found = Clock(), []
    turns = Turns(ask, retries, lambda: jitter, clock)
    while (wait := turns.after_answer(answer)) is not None:
        found.append(wait)
        clock.now += wait
    return found


READING, WRITING = Ask("GET", "/", bytes, repeatable=True), Ask("POST", "/", bytes)


def test_waits_grow_and_are_bounded_in_number_and_time():
    found = waits(READING, Retries(times=8, seconds=60), refusal(503))
    assert found == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])
    assert sum(waits(READING, Retries(times=1000, seconds=60), refusal(503), 0.0)) <= 60
    assert len(waits(READING, Retries(times=2000, seconds=1e9), refusal(503))) == 2000
    assert waits(READING, ONCE, refusal(503)) == []
    late = Ask("GET", "/", bytes, repeatable=True, deadline=1.0)
    assert sum(waits(late, Retries(), refusal(503))) <= 1


def test_what_the_service_says_of_the_wait_counts():
    told = refusal(429, headers={"retry-after": "2"})
    assert waits(READING, Retries(times=3), told, 0.0) == [2, 2, 2]
    assert all(2 <= wait <= 2.5 for wait in waits(READING, Retries(), told, 0.7))
    exact = Answer(429, {"retry-after": "1"}, b'{"error": {"code": "c", "message": "m", "retry_after_ms": 30}}')
    assert waits(READING, Retries(times=1), exact, 0.0) == [0.03]
    assert waits(READING, Retries(seconds=60), refusal(429, headers={"retry-after": "3600"})) == []


def test_what_is_never_sent_again():
    for status in (200, 400, 401, 404, 409, 413, 422, 500, 504):
        assert waits(READING, Retries(), refusal(status)) == []
    assert waits(WRITING, Retries(), refusal(503)) == []
    assert len(waits(WRITING, Retries(times=2), refusal(429))) == 2, "which was refused before anything was done"


def test_what_is_no_answer_of_the_service_is_told_so():
    for answer in (Answer(502, {}, b"<html>"), Answer(200, {}, b"{}"), Answer(404, {"x-request-id": "r"}, b"[]")):
        with pytest.raises(ServiceError) as caught:
            Ask("GET", "/", Scored).read(answer)
        assert (caught.value.code, caught.value.status) == ("bad_answer", answer.status)
    later = b'{"forgotten": 1, "added_later": {}}'
    assert Ask("DELETE", "/", Forgotten).read(Answer(200, {}, later)).forgotten == 1

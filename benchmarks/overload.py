"""Twice as many requests as the service can answer: what it still answers, and how it refuses the rest.

    python benchmarks/overload.py BUNDLE --image picture.jpg

Capacity is measured first, in a closed loop; then requests come by the clock at a multiple of it, whatever became of
those before. Goodput is the verdicts a second. Ends with 1 where anything came back but 200, or 429 with a Retry-After.
"""

import argparse
import http.client
import json
import os
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from serve import Bench, service
from serve_load import Target

from service.settings import ServiceSettings, available_cores

Answer = tuple[str, float]
"""How a request ended, and after how many milliseconds."""


def main() -> int:
    options = parsed()
    settings = ServiceSettings.load(None, options.override)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options.bundle, options.image, options.override, settings, Path(scratch), sys.executable)
        engine = bench.engine("float32")
        image = engine.detector.image
        size = f"{image.channels} x {image.height} x {image.width}"
        print(f"{available_cores()} cores; model {options.bundle.name}, {size}; load {os.getloadavg()[0]:.1f}")
        with service(bench, engine, "float32") as target:
            target.closed(32, 3)
            capacity = float(np.median([target.closed(32, options.seconds).per_second for _ in range(3)]))
            rate = options.times * capacity
            answers = offered(target, rate, 3 * options.seconds, options.senders)
    return told(capacity, rate, 3 * options.seconds, answers)


def offered(target: Target, rate: float, seconds: float, senders: int) -> list[Answer]:
    """Requests at a fixed rate; a sender that is late sends at once, so that senders bound what is in flight."""
    due = iter(np.arange(0, seconds, 1 / rate).tolist())
    found: list[Answer] = []
    lock, started = threading.Lock(), time.perf_counter() + 0.2
    address, body = urllib.parse.urlparse(target.url), target.body.read_bytes()

    def send() -> None:
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        while True:
            with lock:
                at = next(due, None)
            if at is None:
                return
            time.sleep(max(0.0, started + at - time.perf_counter()))
            sent, ended = time.perf_counter(), "no answer"
            with suppress(OSError, http.client.HTTPException):
                connection.request("POST", address.path, body, {"Content-Type": target.content_type})
                answer = connection.getresponse()
                ended = str(answer.status)
                if answer.status == 429 and not answer.headers.get("Retry-After", "").isdigit():
                    ended = "429 without Retry-After"
                answer.read()
            with lock:
                found.append((ended, 1000 * (time.perf_counter() - sent)))

    threads = [threading.Thread(target=send) for _ in range(senders)]
    with target.awake():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found


def told(capacity: float, rate: float, seconds: float, answers: list[Answer]) -> int:
    """Say it, and whether it is as it should be."""
    counts = Counter(ended for ended, _ in answers)
    goodput = counts["200"] / seconds
    print(f"capacity {capacity:.0f}/s; offered {len(answers) / seconds:.0f}/s of {rate:.0f}/s for {seconds:.0f} s")
    print(f"goodput {goodput:.0f}/s, {goodput / capacity:.0%} of capacity; answers: {json.dumps(dict(counts))}")
    for ended in sorted(counts):
        waits = [wait for one, wait in answers if one == ended]
        print(f"  {ended}: p50 {np.quantile(waits, 0.5):.0f} ms, p99 {np.quantile(waits, 0.99):.0f} ms")
    return 1 if set(counts) - {"200", "429"} else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="folder of a trained detector")
    parser.add_argument("--image", type=Path, required=True, help="the picture every request sends")
    parser.add_argument("--times", type=float, default=2.0, help="offered load in units of the capacity")
    parser.add_argument("--seconds", type=float, default=5, help="of each run that measures the capacity")
    parser.add_argument("--senders", type=int, default=200)
    parser.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE", help="a service setting")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

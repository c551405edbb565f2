"""How fast the service is, beside the same detector in a bare loop on the same cores.

    python benchmarks/serve.py BUNDLE --image picture.jpg

wrk keeps 1, 8, 32 connections busy with POSTs; between its runs the bare loop decodes and judges full batches, so that
a noisy machine disturbs both alike. First every reply of a short run is compared with the library's own score. Needs
wrk (Debian: apt-get install wrk) and Linux's /proc for the CPU time. Ends with 1 if any reply was wrong or missing.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ["GOMP_SPINCOUNT"] = "2000"  # as the service does, before torch is imported

import numpy as np
import torch

from anomaly_vae import AnomalyVaeError, Detector, Engine
from service.settings import ServiceSettings, available_cores

LUA = """
local picture = io.open(os.getenv("BENCH_IMAGE"), "rb"):read("*a")
wrk.method, wrk.body, wrk.headers["Content-Type"] = "POST", picture, "application/octet-stream"

local expected, tolerance = tonumber(os.getenv("BENCH_SCORE")), tonumber(os.getenv("BENCH_TOLERANCE"))
wrong = 0
local threads = {}
function setup(thread) table.insert(threads, thread) end
if expected then
  function response(status, headers, body)
    local score = tonumber(string.match(body, '"score": (-?[%d.e+-]+)'))
    if status ~= 200 or not score or math.abs(score - expected) > tolerance then wrong = wrong + 1 end
  end
end

function done(summary, latency, requests)
  local errors, total_wrong = summary.errors, 0
  for _, thread in ipairs(threads) do total_wrong = total_wrong + thread:get("wrong") end
  io.write(string.format(
    'RESULT {"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "failed": %d, "wrong": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout, total_wrong))
end
"""


@dataclass(frozen=True)
class Run:
    """One measured stretch; milliseconds where nothing else is said."""

    per_second: float
    p50: float
    p99: float
    cpu: float
    memory_mb: float
    failed: int = 0
    wrong: int = 0


class Tree:
    """CPU time and memory of a process and those it has started, from /proc."""

    def __init__(self, pid: int, children: bool = False) -> None:
        self._pids = [pid]
        if children:
            listing = subprocess.run(
                ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
            ).stdout
            pairs = [line.split() for line in listing.splitlines()]
            self._pids += [int(child) for child, parent in pairs if int(parent) == pid]

    def cpu_seconds(self) -> float:
        ticks = 0
        for pid in self._pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._pids)
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def service(bundle: Path, overrides: list[str]) -> Iterator[tuple[str, Tree]]:
    """A `serve` command in a process of its own: its address and its process tree."""
    options = [part for override in overrides for part in ("-o", override)]
    command = [sys.executable, "-m", "anomaly_vae", "serve", str(bundle), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        url = ""
        for line in process.stdout:
            words = line.split()
            url = words[1] if words[:1] == ["address"] else url
            if words[:1] == ["stop"]:
                break
        else:
            raise SystemExit("the service did not start; its message is above")
        yield url, Tree(process.pid, children=True)
    finally:
        process.terminate()
        process.wait(60)


class Bare:
    """Decode and judge full batches in one process, the next batch being decoded while one is judged."""

    def __init__(self, engine: Engine, data: bytes, batch: int, decoders: int) -> None:
        self._engine, self._data, self._batch = engine, data, batch
        self._pool = ThreadPoolExecutor(decoders)
        self._memory = Tree(os.getpid())

    def run(self, seconds: float) -> Run:
        started, cpu, images = time.perf_counter(), time.process_time(), 0
        upcoming = self._decoding()
        while time.perf_counter() - started < seconds:
            current, upcoming = upcoming, self._decoding()
            self._engine.judge(torch.stack([one.result() for one in current]), False)
            images += self._batch
        spent, cpu = time.perf_counter() - started, time.process_time() - cpu
        return Run(images / spent, float("nan"), float("nan"), 1000 * cpu / images, self._memory.memory_mb())

    def _decoding(self) -> list[Future[torch.Tensor]]:
        return [self._pool.submit(self._engine.prepare, self._data) for _ in range(self._batch)]


class Load:
    """wrk against the service."""

    def __init__(self, url: str, tree: Tree, image: Path, script: Path) -> None:
        self._url, self._tree, self._image, self._script = url, tree, image, script

    def run(self, connections: int, seconds: float, expected: tuple[float, float] | None = None) -> Run:
        """Closed loop; with `expected` (score, tolerance) every reply is checked, which slows wrk down."""
        environment = {**os.environ, "BENCH_IMAGE": str(self._image)}
        if expected is not None:
            environment |= {"BENCH_SCORE": repr(expected[0]), "BENCH_TOLERANCE": repr(expected[1])}
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
        cpu = self._tree.cpu_seconds()
        done = subprocess.run(
            [*command, "-s", str(self._script), f"{self._url}/v1/score"],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        cpu = self._tree.cpu_seconds() - cpu
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[7:])
        per_image = 1000 * cpu / max(1, found["requests"])
        memory = self._tree.memory_mb()
        rate = found["requests"] / found["seconds"]
        return Run(rate, found["p50"], found["p99"], per_image, memory, found["failed"], found["wrong"])


def main() -> int:
    options = parsed()
    settings = ServiceSettings.load(None, options.override)
    if settings.compute_threads is not None:
        torch.set_num_threads(settings.compute_threads)
    detector = Detector.load(options.bundle)
    engine = Engine(detector, settings.device, settings.max_batch)
    engine.warm()
    data = options.image.read_bytes()
    expected = engine.judge(engine.prepare(data)[None], False).score[0], tolerance(detector)
    bare = Bare(engine, data, settings.max_batch, settings.threads_for_decoding())
    runs: dict[int, list[Run]] = {connections: [] for connections in (0, *options.connections)}
    with tempfile.TemporaryDirectory() as scratch, service(options.bundle, options.override) as (url, tree):
        script = Path(scratch) / "post.lua"
        script.write_text(LUA)
        load = Load(url, tree, options.image.resolve(), script)
        checked = [load.run(connections, 2, expected) for connections in options.connections]
        bare.run(1)
        for _ in range(options.repeats):
            for connections, found in runs.items():
                found.append(load.run(connections, options.seconds) if connections else bare.run(options.seconds))
    print(describe(detector, options))
    print(table(runs))
    everything = [run for found in runs.values() for run in found] + checked
    failed, wrong = sum(run.failed for run in everything), sum(run.wrong for run in everything)
    print(f"\n{failed} errors; {wrong} of the checked replies differ from the library's score {expected[0]:.6g}.")
    return 1 if failed or wrong else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="folder of a trained detector")
    parser.add_argument("--image", type=Path, required=True, help="the picture every request sends")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each run")
    parser.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE", help="a service setting")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed; on Debian or Ubuntu: apt-get install wrk")
    return options


def tolerance(detector: Detector) -> float:
    """How far a score may differ with its batch: 1e-5 of the calibration scores' interquartile range."""
    low, high = np.quantile(np.concatenate(detector.calibration.scores), [0.25, 0.75])
    return 1e-5 * float(high - low)


def describe(detector: Detector, options: argparse.Namespace) -> str:
    image = detector.image
    names = ("torch", "granian", "flask", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    with Path("/proc/cpuinfo").open() as lines:
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    size = options.image.stat().st_size / 1024
    return (
        f"{available_cores()} cores of {processor or platform.machine()}; "
        f"Python {platform.python_version()}, {versions}.\n"
        f"Model {options.bundle.name} {detector.version}, {image.channels} x {image.height} x {image.width}; "
        f"{options.image.name} of {size:.0f} KiB; {options.repeats} interleaved runs of {options.seconds:g} s, "
        f"{torch.get_num_threads()} torch threads{', ' + ' '.join(options.override) if options.override else ''}.\n"
        "Medians; in brackets the smallest and largest run.\n"
    )


def table(runs: dict[int, list[Run]]) -> str:
    lines = [
        "| | images/s | share of bare | p50 ms | p99 ms | CPU-ms an image | memory MB |",
        "|---|---|---|---|---|---|---|",
    ]
    bare = statistics.median(run.per_second for run in runs[0])
    for connections, found in runs.items():
        rates = [run.per_second for run in found]
        name = f"HTTP, {connections} connections" if connections else "bare loop, full batches"
        waits = [f"{statistics.median(getattr(run, key) for run in found):.1f}" for key in ("p50", "p99")]
        lines.append(
            f"| {name} | {statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f}) "
            f"| {statistics.median(rates) / bare:.0%} | {' | '.join(waits if connections else ['-', '-'])} "
            f"| {statistics.median(run.cpu for run in found):.2f} | {max(run.memory_mb for run in found):.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AnomalyVaeError as error:
        sys.exit(f"error: {error}")

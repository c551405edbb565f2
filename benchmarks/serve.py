"""How fast the service is, beside the same detector in a bare loop and behind LitServe, on the same cores.

    python benchmarks/serve.py BUNDLE --image picture.jpg

wrk keeps 1, 8, 32 connections busy with POSTs of one picture; between its runs the bare loop decodes and judges full
batches, so that a noisy machine disturbs all alike. First every reply of a short run of each server is compared with
the library's own score. LitServe is tried with some settings, of which the quickest is measured, once as its users
would write it and once around this library's native calls; `pip install litserve` makes it available. Then, at half
the rate that the service reached, requests come by the clock. `--soak N` watches memory over N requests instead.

Needs wrk (Debian: apt-get install wrk) and Linux's /proc. Ends with 1 if any reply was wrong or missing.
"""

import argparse
import base64
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["GOMP_SPINCOUNT"] = "2000"  # as the service does, before torch is imported

import numpy as np
import torch
from serve_load import LUA, Run, Target, Tree

from anomaly_vae import AnomalyVaeError, Detector, Engine
from service.settings import ServiceSettings, available_cores

HERE = Path(__file__).parent
TRIED = [
    {"workers": workers, "threads": max(1, available_cores() // workers), "batch_timeout": wait}
    for workers in sorted({1, available_cores()})
    for wait in (0.0, 0.01)
]
"""LitServe's settings to choose from: processes, torch threads of each, and seconds to wait for a fuller batch."""
FLOAT32, BFLOAT16 = 1e-5, 0.005
"""How far a reply may lie from the score of the picture judged alone, in the calibration scores' quartile ranges."""

Key = tuple[str, int]
"""Who served, and over how many connections; 0: nobody, in a loop."""


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
        return Run(images / spent, float("nan"), float("nan"), 1000 * cpu / images, float("nan"), images=images)

    def alone_ms(self, count: int = 30) -> float:
        """Milliseconds to decode and judge one picture with nothing else to do, median."""
        spent = []
        for _ in range(count):
            started = time.perf_counter()
            self._engine.judge(self._engine.prepare(self._data)[None], False)
            spent.append(1000 * (time.perf_counter() - started))
        return statistics.median(spent)

    def _decoding(self) -> list[Future[torch.Tensor]]:
        return [self._pool.submit(self._engine.prepare, self._data) for _ in range(self._batch)]


@dataclass(frozen=True)
class Bench:
    """What is measured, and with what."""

    bundle: Path
    image: Path
    overrides: list[str]
    settings: ServiceSettings
    scratch: Path
    litserve_python: str

    def engine(self, precision: str) -> Engine:
        """Warm, as the service has it; raises `ConfigError` where bfloat16 cannot be had."""
        engine = Engine(Detector.load(self.bundle), self.settings.device, self.settings.max_batch, precision)
        engine.warm()
        return engine

    def target(self, url: str, process: "subprocess.Popen[str]", engine: Engine, as_json: bool = False) -> Target:
        """A server that judges as `engine` does."""
        data = self.image.read_bytes()
        score = engine.judge(engine.prepare(data)[None], False).score[0]
        low = engine.detector.calibration.tie > 1e-4
        body, script = self.scratch / ("body.json" if as_json else "body"), self.scratch / "post.lua"
        body.write_bytes(json.dumps({"image": base64.b64encode(data).decode()}).encode() if as_json else data)
        script.write_text(LUA)
        within = (BFLOAT16 if low else FLOAT32) * quartile_range(engine.detector)
        kind = "application/json" if as_json else "application/octet-stream"
        return Target(url, process.pid, body, kind, score, within, script)


@contextmanager
def service(bench: Bench, engine: Engine, precision: str) -> Iterator[Target]:
    """A `serve` command in a process of its own, which keeps its verdicts as usual."""
    store = f"store={bench.scratch / 'store.sqlite'}"
    options = [part for override in (store, *bench.overrides, f"precision={precision}") for part in ("-o", override)]
    command = [sys.executable, "-m", "anomaly_vae", "serve", str(bench.bundle), "--port", "0", *options]
    with started(command, subprocess.PIPE) as process:
        assert process.stdout is not None
        url = ""
        for line in process.stdout:
            words = line.split()
            url = words[1] if words[:1] == ["address"] else url
            if words[:1] == ["stop"]:
                break
        else:
            raise SystemExit("the service did not start; its message is above")
        yield bench.target(f"{url}/v1/score", process, engine)


@contextmanager
def litserve(bench: Bench, engine: Engine, settings: dict[str, Any]) -> Iterator[Target]:
    """LitServe around the same detector."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"precision": "float32", "native": False, "max_batch": bench.settings.max_batch, **settings}
    command = [bench.litserve_python, str(HERE / "serve_litserve.py"), str(bench.bundle), str(port)]
    with started([*command, json.dumps(settings)], subprocess.DEVNULL) as process:
        target = bench.target(f"http://127.0.0.1:{port}/predict", process, engine, as_json=True)
        await_answer(target, process)
        yield target


@contextmanager
def started(command: list[str], output: int) -> Iterator["subprocess.Popen[str]"]:
    """A process with a group of its own, so that nothing of it is left behind: LitServe's workers outlive it."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen(command, stdout=output, text=True, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def await_answer(target: Target, process: "subprocess.Popen[str]") -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(240):
        if process.poll() is not None:
            break
        try:
            request = urllib.request.Request(target.url, target.body.read_bytes(), {"Content-Type": "application/json"})
            opener.open(request, timeout=60).read()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("LitServe did not start; run benchmarks/serve_litserve.py by itself to see why")


def main() -> int:
    # Ended from outside, it still ends its servers, which are in groups of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options = parsed()
    settings = ServiceSettings.load(None, options.override)
    if settings.compute_threads is not None:
        torch.set_num_threads(settings.compute_threads)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options.bundle, options.image, options.override, settings, Path(scratch), options.litserve_python)
        engines = engines_of(bench, options.precisions)
        return soaked(bench, engines, options) if options.soak else compared(bench, engines, options)


def compared(bench: Bench, engines: dict[str, Engine], options: argparse.Namespace) -> int:
    """All contenders, interleaved; then the service by the clock."""
    data, decoders = bench.image.read_bytes(), bench.settings.threads_for_decoding()
    bare = {name: Bare(engine, data, bench.settings.max_batch, decoders) for name, engine in engines.items()}
    most = max(options.connections)
    with ExitStack() as stack:
        servers = {f"service, {name}": stack.enter_context(service(bench, engines[name], name)) for name in engines}
        for label, engine, choice in litserves(bench, engines, most, options):
            servers[label] = stack.enter_context(litserve(bench, engine, choice))
        runs: dict[Key, list[Run]] = {(f"bare loop, {name}", 0): [] for name in engines}
        runs |= {(name, connections): [] for name in servers for connections in options.connections}
        checked = [one.closed(c, 2, check=True) for one in servers.values() for c in options.connections]
        for _ in range(options.repeats):
            for (name, connections), found in runs.items():
                if connections:
                    found.append(servers[name].closed(connections, options.seconds))
                else:
                    found.append(bare[name.removeprefix("bare loop, ")].run(options.seconds))
        clocked = {}
        for name in engines:
            target, rate = servers[f"service, {name}"], median(runs[f"service, {name}", most]) / 2
            clocked[name] = by_the_clock(name, target, bare[name], rate, 2 * options.seconds)
    print(describe(engines["float32"].detector, options))
    print(table(runs))
    print("\n" + "\n".join(clocked[name][1] for name in engines))
    everything = [run for found in runs.values() for run in found] + checked + [run for run, _ in clocked.values()]
    failed, wrong = sum(run.failed for run in everything), sum(run.wrong for run in everything)
    seen = sum(run.images for run in checked)
    print(f"\n{failed} errors; {wrong} of {seen} checked replies differ from the library's score of the picture alone.")
    return 1 if failed or wrong else 0


def engines_of(bench: Bench, precisions: Sequence[str]) -> dict[str, Engine]:
    """One for each precision that can be had."""
    found = {}
    for precision in precisions:
        try:
            found[precision] = bench.engine(precision)
        except AnomalyVaeError as error:
            print(f"not measured here: {error}")
    return found


def litserves(
    bench: Bench, engines: dict[str, Engine], connections: int, options: argparse.Namespace
) -> Iterator[tuple[str, Engine, dict[str, Any]]]:
    """Name, engine and settings of the LitServes to measure: the best of `TRIED` as it is, and with native calls."""
    if not options.litserve:
        return
    known = subprocess.run([bench.litserve_python, "-c", "import litserve"], capture_output=True, check=False)
    if known.returncode:
        print("LitServe: not measured here; pip install litserve, or name a Python that has it by --litserve-python")
        return
    rates, tried = [], [json.loads(options.litserve_settings)] if options.litserve_settings else TRIED
    for choice in tried if len(tried) > 1 else ():
        with litserve(bench, engines["float32"], choice) as target:
            target.closed(connections, 1)
            rates.append(target.closed(connections, 3).per_second)
        print(f"LitServe with {choice}: {rates[-1]:.0f} images/s over {connections} connections")
    best = tried[int(np.argmax(rates))] if rates else tried[0]
    print(f"LitServe is measured with {best}")
    yield "LitServe, float32", engines["float32"], best
    for name, engine in engines.items():
        yield f"LitServe + native calls, {name}", engine, {**best, "precision": name, "native": True}


def by_the_clock(name: str, target: Target, bare: Bare, rate: float, seconds: float) -> tuple[Run, str]:
    """Requests at a fixed rate, and what came of it in words."""
    alone, run = bare.alone_ms(), target.open(rate, seconds)
    said = (
        f"service, {name}, by the clock at {rate:.0f} images/s, half of what it can: p50 {run.p50:.1f} ms, "
        f"p99 {run.p99:.1f} ms, which is {run.p99 / alone:.1f} times the {alone:.1f} ms of one picture alone"
    )
    return run, said


def soaked(bench: Bench, engines: dict[str, Engine], options: argparse.Namespace) -> int:
    """Memory over many requests."""
    failed = 0
    for name, engine in engines.items():
        with service(bench, engine, name) as target:
            target.closed(max(options.connections), 3)
            memory, run = target.soak(options.soak, max(options.connections))
            start, tenth, end = memory
            print(
                f"service, {name}: {run.images} requests at {run.per_second:.0f}/s; {start:.0f} MB at the start, "
                f"{tenth:.0f} MB after a tenth, {end:.0f} MB at the end; {run.failed} errors"
            )
            failed += run.failed
    return 1 if failed else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="folder of a trained detector")
    parser.add_argument("--image", type=Path, required=True, help="the picture every request sends")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4, help="of each run")
    parser.add_argument("--soak", type=int, metavar="N", help="watch memory over N requests instead")
    parser.add_argument("--no-litserve", dest="litserve", action="store_false", help="leave LitServe out")
    parser.add_argument("--litserve-settings", metavar="JSON", help="of one of those tried, to try no others")
    parser.add_argument("--litserve-python", default=sys.executable, help="the Python that has LitServe")
    parser.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE", help="a service setting")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed; on Debian or Ubuntu: apt-get install wrk")
    return options


def quartile_range(detector: Detector) -> float:
    """Of the calibration scores, the unit of tolerances."""
    low, high = np.quantile(np.concatenate(detector.calibration.scores), [0.25, 0.75])
    return float(high - low)


def median(runs: Sequence[Run]) -> float:
    """Images a second."""
    return statistics.median(run.per_second for run in runs)


def describe(detector: Detector, options: argparse.Namespace) -> str:
    image = detector.image
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "granian", "flask", "numpy")
    )
    with Path("/proc/cpuinfo").open() as lines:
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    size, load = options.image.stat().st_size / 1024, os.getloadavg()[2]
    return (
        f"{available_cores()} cores of {processor or platform.machine()}; "
        f"Python {platform.python_version()}, {versions}; load over the last quarter of an hour {load:.1f}.\n"
        f"Model {options.bundle.name} {detector.version}, {image.channels} x {image.height} x {image.width}; "
        f"{options.image.name} of {size:.0f} KiB; {options.repeats} interleaved runs of {options.seconds:g} s, "
        f"{torch.get_num_threads()} torch threads{', ' + ' '.join(options.override) if options.override else ''}.\n"
        "Medians; in brackets the smallest and largest run.\n"
    )


def table(runs: dict[Key, list[Run]]) -> str:
    """A row for each contender; added is the CPU time beyond that of the bare loop of the same precision."""
    lines = [
        "| | images/s | share of bare | p50 ms | p99 ms | CPU-ms an image | added | memory MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, connections), found in runs.items():
        bare = runs[f"bare loop, {name.split(', ')[1]}", 0]
        rates, cpu = [run.per_second for run in found], statistics.median(run.cpu for run in found)
        label = f"{name}, {connections} connection{'s' if connections > 1 else ''}" if connections else name
        waits = [f"{statistics.median(getattr(run, key) for run in found):.1f}" for key in ("p50", "p99")]
        added = cpu - statistics.median(run.cpu for run in bare)
        memory = f"{max(run.memory_mb for run in found):.0f}"
        cells = [*waits, f"{cpu:.2f}", f"{added:.2f}", memory] if connections else ["-", "-", f"{cpu:.2f}", "-", "-"]
        spread = f"{median(found):.0f} ({min(rates):.0f}-{max(rates):.0f})"
        lines.append(f"| {label} | {spread} | {median(found) / median(bare):.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AnomalyVaeError as error:
        sys.exit(f"error: {error}")

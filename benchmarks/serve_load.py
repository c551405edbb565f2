"""Load for a server, and what it costs: wrk in a closed loop, a clock's schedule in an open one, /proc for the bill."""

import http.client
import json
import os
import signal
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LUA = """
local body = io.open(os.getenv("BENCH_BODY"), "rb"):read("*a")
wrk.method, wrk.body, wrk.headers["Content-Type"] = "POST", body, os.getenv("BENCH_TYPE")

local expected, tolerance = tonumber(os.getenv("BENCH_SCORE")), tonumber(os.getenv("BENCH_TOLERANCE"))
wrong = 0
local threads = {}
function setup(thread) table.insert(threads, thread) end
if expected then
  function response(status, headers, body)
    local score = tonumber(string.match(body, '"score": ?(-?[%d.e+-]+)'))
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
    """One measured stretch; milliseconds where nothing else is said. `cpu`: of all processes, for each image."""

    per_second: float
    p50: float
    p99: float
    cpu: float
    memory_mb: float
    failed: int = 0
    wrong: int = 0
    images: int = 0


class Tree:
    """CPU time and memory of a process and of all that descend from it, from /proc."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        ticks = 0
        for pid in self._pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """Resident memory; what processes share counts once."""
        shares = (Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in self._pids())
        return sum(int(line.split()[1]) for lines in shares for line in lines if line.startswith("Pss:")) / 1024

    def _pids(self) -> list[int]:
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
        found = [self._pid]
        for parent in found:
            found += [pid for pid, of in pairs if of == parent]
        return [pid for pid in found if Path(f"/proc/{pid}").exists()]


@dataclass(frozen=True)
class Target:
    """A running server, and the request that it is sent: a picture whose `score` is known within `tolerance`.

    It heads a process group, which stands still whenever it is not measured: some servers are busy even when idle.
    """

    url: str
    pid: int
    body: Path
    content_type: str
    score: float
    tolerance: float
    script: Path

    @property
    def tree(self) -> Tree:
        """What the server costs."""
        return Tree(self.pid)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """It is measured inside the block."""
        os.killpg(self.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.pid, signal.SIGSTOP)

    def closed(self, connections: int, seconds: float, check: bool = False) -> Run:
        """wrk keeps so many connections busy; with `check` it looks at every reply, which slows it down."""
        environment = {**os.environ, "BENCH_BODY": str(self.body), "BENCH_TYPE": self.content_type}
        if check:
            environment |= {"BENCH_SCORE": repr(self.score), "BENCH_TOLERANCE": repr(self.tolerance)}
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
        cpu = self.tree.cpu_seconds()
        command += ["-s", str(self.script), self.url]
        with self.awake():
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        cpu = self.tree.cpu_seconds() - cpu
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[7:])
        rate, each = found["requests"] / found["seconds"], 1000 * cpu / max(1, found["requests"])
        memory = self.tree.memory_mb()
        return Run(
            rate, found["p50"], found["p99"], each, memory, found["failed"], found["wrong"], int(found["requests"])
        )

    def open(self, rate: float, seconds: float, senders: int = 32) -> Run:
        """Requests at a fixed rate, whatever became of those before; waits count from the time they were due."""
        due = iter(np.arange(0, seconds, 1 / rate).tolist())
        waits: list[float] = []
        failed = 0
        lock, started = threading.Lock(), time.perf_counter() + 0.1
        cpu = self.tree.cpu_seconds()

        def send() -> None:
            nonlocal failed
            address, body = urllib.parse.urlparse(self.url), self.body.read_bytes()
            connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
            while True:
                with lock:
                    at = next(due, None)
                if at is None:
                    return connection.close()
                time.sleep(max(0.0, started + at - time.perf_counter()))
                connection.request("POST", address.path, body, {"Content-Type": self.content_type})
                answer = connection.getresponse()
                answer.read()
                with lock:
                    waits.append(1000 * (time.perf_counter() - started - at))
                    failed += answer.status != 200

        threads = [threading.Thread(target=send) for _ in range(senders)]
        with self.awake():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        cpu = self.tree.cpu_seconds() - cpu
        p50, p99 = np.quantile(waits, [0.5, 0.99])
        took = time.perf_counter() - started
        each, memory = 1000 * cpu / len(waits), self.tree.memory_mb()
        return Run(len(waits) / took, float(p50), float(p99), each, memory, failed, 0, len(waits))

    def soak(self, requests: int, connections: int) -> tuple[list[float], Run]:
        """Memory (MB) at the start, after a tenth and at the end of so many requests; and the worst of the runs."""
        memory, runs, done = [self.tree.memory_mb()], [], 0
        for share in (0.1, 1.0):
            while done < share * requests:
                runs.append(self.closed(connections, 10))
                done += max(1, runs[-1].images)
            memory.append(self.tree.memory_mb())
        return memory, total(runs)


def total(runs: Sequence[Run]) -> Run:
    """Several runs as one: means of rates and costs, the worst waits, sums of what was counted."""
    return Run(
        float(np.mean([run.per_second for run in runs])),
        max(run.p50 for run in runs),
        max(run.p99 for run in runs),
        float(np.mean([run.cpu for run in runs])),
        max(run.memory_mb for run in runs),
        sum(run.failed for run in runs),
        sum(run.wrong for run in runs),
        sum(run.images for run in runs),
    )

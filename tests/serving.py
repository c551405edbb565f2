"""A real service in a process of its own, for the tests of HTTP and of signals."""

import json
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from forked import Process, begun

START_SECONDS = 120


@dataclass
class Server:
    """A running `serve` command: where it answers and what it printed."""

    process: Process
    stdout: IO[str]
    lines: list[str] = field(default_factory=list)
    ready: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return self._word_after("address")

    @property
    def health(self) -> str:
        return self._word_after("health").removesuffix("/ready,")

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def stop(self) -> int:
        """Send SIGTERM to the command, wait for it and for its last words; returns the exit code."""
        self.process.terminate()
        code = self.process.wait(60)
        assert self.ended.wait(60)
        return code

    def _word_after(self, label: str) -> str:
        line = next(line for line in self.lines if line.strip().startswith(label))
        return line.split()[1]

    def _read(self) -> None:
        for line in self.stdout:
            self.lines.append(line)
            if line.strip().startswith("stop "):
                self.ready.set()
        self.ended.set()
        self.ready.set()


def started(bundle: Path, *options: str, anew: bool = False) -> Server:
    """Start `serve BUNDLE` on free ports without waiting for it; `anew` as for `begun`."""
    words = ["serve", bundle, "--port", "0", "--device", "cpu", *options]
    reading, writing = os.pipe()
    process = begun(words, writing, writing, own_session=True, anew=anew)
    os.close(writing)
    server = Server(process, os.fdopen(reading))
    threading.Thread(target=server._read, daemon=True).start()
    return server


@contextmanager
def running(bundle: Path, *settings: str, anew: bool = False) -> Iterator[Server]:
    """A service that is ready; `settings` are key=value. It ends by Ctrl-C, which must be in good order."""
    server = started(bundle, *(part for setting in settings for part in ("-o", setting)), anew=anew)
    try:
        assert server.ready.wait(START_SECONDS)
        assert server.process.poll() is None, server.output
        yield server
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does: to all processes of the command at once
            assert server.process.wait(60) == 0
            assert server.ended.wait(60)
            assert "stopped: " in server.output
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait(60)


def posted(url: str, data: bytes) -> dict[str, Any]:
    """The JSON answer to `data` posted to `url`; proxies of the environment are not for this machine's own services."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data), timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found

"""A real `watch` command in a process of its own, and a real receiver of webhooks."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from forked import Process, begun

SECONDS = 90
QUICK = ("--device", "cpu", "--settle", "0.1", "--patience", "0.3", "--every", "0.5")


def fill(folder: Path, files: Iterable[Path], start: int = 0) -> None:
    """Files as a camera would number them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, path in enumerate(files, start):
        shutil.copyfile(path, folder / f"{i:03}.png")


@dataclass
class Watcher:
    """What a watch prints, as it comes."""

    process: Process
    lines: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    said: threading.Condition = field(default_factory=threading.Condition)
    threads: list[threading.Thread] = field(default_factory=list)
    open: int = 0

    def wait(self, whether: Callable[["Watcher"], bool]) -> None:
        """Until something was printed; a watch that ends before fails the test with its words."""
        with self.said:
            assert self.said.wait_for(lambda: whether(self) or not self.open, SECONDS), self.words
            assert whether(self), self.words

    def wait_lines(self, count: int) -> list[dict[str, Any]]:
        self.wait(lambda one: len(one.lines) >= count)
        return self.lines[:count]

    def wait_note(self, words: str) -> str:
        self.wait(lambda one: any(words in note for note in one.notes))
        return next(note for note in self.notes if words in note)

    @property
    def words(self) -> str:
        return "\n".join(self.notes) + f"\n{len(self.lines)} lines"

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it in good order, or as `number` does; returns the exit code when all it said was read."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        code = self.process.wait(SECONDS)
        for thread in self.threads:
            thread.join(SECONDS)
        return code

    def read(self, descriptor: int, take: Callable[[str], None]) -> None:
        def work() -> None:
            with os.fdopen(descriptor) as file:
                for line in file:
                    with self.said:
                        take(line.rstrip("\n"))
                        self.said.notify_all()
            with self.said:
                self.open -= 1
                self.said.notify_all()

        self.open += 1
        self.threads.append(threading.Thread(target=work, daemon=True))

    def _line(self, line: str) -> None:
        self.lines.append(json.loads(line))


@contextmanager
def watching(bundle: Path, folder: Path, *options: object) -> Iterator[Watcher]:
    """A running watch, quick to see things; what is given later counts."""
    out, err = os.pipe(), os.pipe()
    process = begun(["watch", bundle, folder, *QUICK, *options], out[1], err[1])
    os.close(out[1])
    os.close(err[1])
    watcher = Watcher(process)
    watcher.read(out[0], watcher._line)
    watcher.read(err[0], watcher.notes.append)
    for thread in watcher.threads:
        thread.start()
    try:
        yield watcher
    finally:
        watcher.stop(signal.SIGKILL)


@dataclass
class Post:
    """What a receiver got."""

    body: bytes
    headers: dict[str, str]

    @property
    def row(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def name(self) -> str:
        return Path(self.row["path"]).name


@dataclass
class Receiver:
    """Answers each post by `answer`, which gets it and how often its verdict has come: a status, and headers."""

    answer: Callable[[Post, int], tuple[int, dict[str, str]]]
    posts: list[Post] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    got: threading.Condition = field(default_factory=threading.Condition)
    url: str = ""

    def wait(self, whether: Callable[["Receiver"], bool]) -> None:
        with self.got:
            assert self.got.wait_for(lambda: whether(self), SECONDS), [post.name for post in self.posts]

    def take(self, post: Post) -> tuple[int, dict[str, str]]:
        with self.got:
            times = sum(one.headers["x-id"] == post.headers["x-id"] for one in self.posts) + 1
            status, headers = self.answer(post, times)
            self.posts.append(post)
            if status < 300:
                self.taken.add(post.headers["x-id"])
            self.got.notify_all()
        return status, headers


@contextmanager
def receiving(answer: Callable[[Post, int], tuple[int, dict[str, str]]] = lambda post, times: (204, {}),
              port: int = 0) -> Iterator[Receiver]:  # fmt: skip
    """A receiver at its `url`."""
    receiver = Receiver(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status, headers = receiver.take(Post(body, {k.lower(): v for k, v in self.headers.items()}))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        try:
            yield receiver
        finally:
            server.shutdown()

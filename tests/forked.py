"""Commands of `anomaly-vae` in processes that are forked from one which has imported torch and the rest already.

A new interpreter spends two seconds on these imports before it does anything, and tests start some hundred commands.
Where a test is about the process itself (its signals, who ends whom, what it imports), it starts one anew.
"""

import atexit
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from runpy import run_path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
IMPORTED = (
    "torch", "torch._dynamo", "sklearn.covariance", "sklearn.mixture", "anomaly_vae.cli", "anomaly_vae.training",
    "service.app", "service.process", "service.store",
)  # fmt: skip
"""What takes long, by itself or by what it imports, and starts no thread."""
_NO_THREADS = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
MESSAGE_BYTES = 1 << 17  # an environment and a line of words


class Forked:
    """A running command, as far as tests need it with the methods of `subprocess.Popen`."""

    def __init__(self, words: list[str], script: Path | None, stdout: int, stderr: int, own_session: bool) -> None:
        self.args, self.returncode = words, None
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {
            "words": [str(script or "anomaly-vae"), *words], "script": script is not None, "session": own_session,
            "folder": str(Path.cwd()), "environment": dict(os.environ),
        }  # fmt: skip
        with theirs:
            socket.send_fds(_parent()[1], [json.dumps(request).encode()], [theirs.fileno(), stdout, stderr])
        self.pid = int(self._said())

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                self.returncode = int(self._said())
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except (subprocess.TimeoutExpired, BlockingIOError):
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _said(self) -> str:
        said = self._status.recv(64)
        assert said, "the process that commands are forked from is gone"
        return said.decode()


Process = Forked | subprocess.Popen


def begun(
    words: Iterable[object], stdout: IO[Any] | int, stderr: IO[Any] | int, *,
    script: Path | None = None, own_session: bool = False, anew: bool = False,
) -> Process:  # fmt: skip
    """Start `anomaly-vae WORDS`, or a script of Python; `anew`: by a new interpreter, as a user would."""
    given = [str(word) for word in words]
    if not anew and sys.platform == "linux":
        files = (file if isinstance(file, int) else file.fileno() for file in (stdout, stderr))
        return Forked(given, script, *files, own_session)
    command = [sys.executable, *(["-m", "anomaly_vae"] if script is None else [str(script)]), *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, start_new_session=own_session)


def command(*words: object, script: Path | None = None, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """What `begun` printed and its exit code, as by `subprocess.run` with text."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = begun(words, out, err, script=script)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        printed = [_text(file) for file in (out, err)]
    return subprocess.CompletedProcess(process.args, code, *printed)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


@cache
def _parent() -> tuple[subprocess.Popen, socket.socket]:
    """The process that forks, and where it takes requests; it ends with this one, which holds the other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT,
            env={**os.environ, **_NO_THREADS}, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    return process, ours


def _serve(requests: socket.socket) -> dict[str, Any]:
    """Fork a child for every request and tell how it ended; returns in the children alone, with what is asked."""
    running: dict[int, socket.socket] = {}
    ended, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is ended:
                    ended.recv(4096)
                    for pid, code in _ended():
                        with running.pop(pid) as status, suppress(OSError):  # nobody may wait for it any more
                            status.sendall(str(code).encode())
                    continue
                message, files, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 3)
                if not message:
                    os._exit(0)
                assert len(list(Path("/proc/self/task").iterdir())) == 1, "with threads a fork may hang"
                status = socket.socket(fileno=files[0])
                pid = os.fork()
                if not pid:
                    for one in (requests, ended, wake, status, *running.values()):
                        one.close()
                    asked = json.loads(message)
                    _become(asked, *files[1:])
                    return asked
                running[pid] = status
                status.sendall(str(pid).encode())
                for file in files[1:]:
                    os.close(file)


def _ended() -> Iterator[tuple[int, int]]:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        yield pid, os.waitstatus_to_exitcode(status)


def _become(asked: dict[str, Any], stdout: int, stderr: int) -> None:
    """Be what `subprocess` would have made of this process."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if asked["session"]:
        os.setsid()
    for file, number in ((stdout, 1), (stderr, 2)):
        os.dup2(file, number)
        if file > 2:
            os.close(file)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["words"]


def _code_of(script: bool) -> int:
    """Do what `sys.argv` says; the exit code."""
    try:
        if script:
            sys.path[0] = str(Path(sys.argv[0]).parent)
            run_path(sys.argv[0], run_name="__main__")
        else:
            import_module("anomaly_vae.cli").main()
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    os.environ["GOMP_SPINCOUNT"] = "2000"  # as the service sets it, before torch is imported
    sys.path[0] = str(ROOT)
    for name in IMPORTED:
        import_module(name)
    gc.freeze()  # else the first collection of every child would copy all that it shares
    code = _code_of(_serve(socket.socket(fileno=int(sys.argv[1])))["script"])
    # As at the end of an interpreter, which then would take apart a million objects for a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)

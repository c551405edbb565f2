"""A real PostgreSQL server of the tests' own: a new cluster in a temporary folder, on 127.0.0.1 and a free port."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp


def programs() -> Path | None:
    """Where PostgreSQL's programs are; Debian keeps them out of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


class Postgres:
    """One server; `url` is that of a new empty database at each call."""

    def __init__(self, folder: Path) -> None:
        place = programs()
        assert place is not None
        self._bin, self._folder, self._count = place, folder, 0
        # It refuses to run as root.
        self._user = {"user": "postgres"} if os.geteuid() == 0 else {}
        if self._user:
            shutil.chown(folder, "postgres")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._run("initdb", "-D", folder / "data", "-U", "tests", "-A", "trust", "-E", "UTF8", "--no-sync")
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self._folder} -c max_connections=200"
        command = [self._bin / "postgres", "-D", self._folder / "data", *options.split()]
        log = (self._folder / "log").open("a")
        self._server = subprocess.Popen(command, stdout=log, stderr=log, **self._user)
        until = time.monotonic() + 60
        while subprocess.run([self._bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]).returncode:
            assert self._server.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < until, "PostgreSQL does not start"
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it at once, as a power cut would; what it has committed is there at the next start."""
        if self._server.poll() is None:
            self._server.send_signal(signal.SIGQUIT)
            self._server.wait(60)

    def start_again(self) -> None:
        """Start it if it does not run."""
        if self._server.poll() is not None:
            self.start()

    def url(self) -> str:
        """A new empty database."""
        self._count += 1
        name = f"d{self._count}"
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tests", name)
        return f"postgresql://tests@127.0.0.1:{self.port}/{name}"

    def _run(self, program: str, *arguments: object) -> None:
        command = [self._bin / program, *(str(one) for one in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self._folder, **self._user)
        assert done.returncode == 0, done.stderr


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A server that ends with the block."""
    folder = Path(mkdtemp(prefix="pg"))
    folder.chmod(0o755)
    server = Postgres(folder)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)

"""A real nginx of the tests' own, on the deployed configuration with other places, ports and shorter times."""

import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

DEPLOYED = Path(__file__).parent.parent / "deploy" / "nginx"


@dataclass
class Nginx:
    """A running server: its two ports, its certificate, and its folder."""

    port: int
    plain_port: int
    folder: Path

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def certificate(self) -> Path:
        return self.folder / "anomaly-vae" / "tls.crt"

    @property
    def log(self) -> str:
        return (self.folder / "access.log").read_text()

    def trust(self) -> ssl.SSLContext:
        """A client's settings that take this server's certificate and no other."""
        return ssl.create_default_context(cafile=str(self.certificate))

    def connect(self) -> ssl.SSLSocket:
        """A TLS connection on which nothing was said yet."""
        raw = socket.create_connection(("localhost", self.port), timeout=60)
        return self.trust().wrap_socket(raw, server_hostname="localhost")


@contextmanager
def nginx(folder: Path, upstream: str, changes: dict[str, str]) -> Iterator[Nginx]:
    """nginx before `upstream`, HOST:PORT; `changes` replace words of the configuration, each of which must be there."""
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if program is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx)")
    port, plain_port = _free_ports(2)
    places = folder / "anomaly-vae"
    places.mkdir()
    (folder / "conf.d").mkdir()
    _make_certificate(places)
    for name in ("upstream.conf", "log.conf", "headers.conf"):
        shutil.copy(DEPLOYED / name, places)
    _write(places / "upstream.conf", {"127.0.0.1:8765": upstream})
    _write(places / "log.conf", {"/var/log/nginx/anomaly-vae.log": f"{folder}/access.log"})
    shutil.copy(DEPLOYED / "anomaly-vae.conf", folder / "conf.d")
    shutil.copy(DEPLOYED / "nginx.conf", folder)
    listens = {
        "listen 80;": f"listen 127.0.0.1:{plain_port};", "listen [::]:80;": "",
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;", "listen [::]:443 ssl;": "",
    }  # fmt: skip
    _write(folder / "conf.d" / "anomaly-vae.conf", {"/etc/nginx/": f"{folder}/", **listens, **changes})
    _write(folder / "nginx.conf", {"/tmp/": f"{folder}/", "/etc/nginx/": f"{folder}/"})
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    as_root = "user root; " if os.geteuid() == 0 else ""  # workers must reach the folder
    checked = subprocess.run([*command, "-t", "-g", as_root], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "warn" not in checked.stderr, checked.stderr
    with (folder / "out.log").open("w") as out:
        process = subprocess.Popen([*command, "-g", f"{as_root}daemon off;"], stdout=out, stderr=out)
        try:
            _wait_for(port, process, folder)
            yield Nginx(port, plain_port, folder)
        finally:
            process.terminate()
            process.wait(60)


def _write(path: Path, changes: dict[str, str]) -> None:
    text = path.read_text()
    for old, new in changes.items():
        assert old in text, f"{path.name} has no {old!r}"
        text = text.replace(old, new)
    path.write_text(text)


def _free_ports(count: int) -> list[int]:
    with_ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in with_ports]
    for one in with_ports:
        one.close()
    return ports


def _make_certificate(folder: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2",
               "-keyout", folder / "tls.key", "-out", folder / "tls.crt"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)


def _wait_for(port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, (folder / "out.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)

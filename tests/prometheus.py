"""A real Prometheus of the tests' own, on the deployed configuration with shorter intervals and nothing else."""

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

DEPLOYED = Path(__file__).parent.parent / "deploy" / "prometheus"
# Windows keep their order; each holds several scrapes of half a second.
WINDOWS = {"5m": "4s", "15m": "6s", "30m": "8s", "1h": "9s", "6h": "10s", "1d": "12s", "3d": "15s"}


def quickened(text: str) -> str:
    """Rules or queries with shorter windows and waits."""
    text = re.sub(r"\[(\w+)\]", lambda found: f"[{WINDOWS[found[1]]}]", text)
    return re.sub(r"^(\s+for:) \w+$", r"\1 1s", text, flags=re.MULTILINE)


class Prometheus:
    """A running server; `get` asks its API."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log

    def get(self, path: str, **parameters: Any) -> Any:
        """The `data` of an answer; fails for one that is no success, with Prometheus' own words."""
        body = httpx.get(f"{self.url}/api/v1/{path}", params=parameters).json()
        assert body["status"] == "success", f"{parameters}: {body}"
        assert "warnings" not in body, f"{parameters}: {body['warnings']}"
        return body["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an expression is now."""
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def firing(self) -> dict[str, list[dict[str, str]]]:
        """Labels of the firing alerts, by name."""
        found: dict[str, list[dict[str, str]]] = {}
        for one in self.get("alerts")["alerts"]:
            if one["state"] == "firing":
                found.setdefault(one["labels"]["alertname"], []).append(one["labels"])
        return found

    def wait_for(self, alert: str, seconds: float = 60) -> list[dict[str, str]]:
        """Wait until an alert fires; the labels of all its instances."""
        until = time.monotonic() + seconds
        while alert not in (firing := self.firing()):
            assert time.monotonic() < until, f"{alert} does not fire, only {sorted(firing)} do"
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)
        return firing[alert]


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """A server that scrapes `target`, HOST:PORT, twice a second, and evaluates the deployed rules as often."""
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed (Debian: apt-get install prometheus)")
    shutil.copytree(DEPLOYED, folder / "config")
    settings = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    (folder / "config" / "prometheus.yml").write_text(yaml.safe_dump(settings))
    (folder / "config" / "targets" / "anomaly-vae.yml").write_text(yaml.safe_dump([{"targets": [target]}]))
    for rules in (folder / "config" / "rules").glob("*.yml"):
        rules.write_text(quickened(rules.read_text()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["prometheus", f"--config.file={folder}/config/prometheus.yml", f"--storage.tsdb.path={folder}/data",
               f"--web.listen-address={address}", "--log.level=warn"]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            server = Prometheus(process, f"http://{address}", folder / "log")
            _wait_until_ready(server)
            yield server
        finally:
            process.terminate()
            process.wait(60)


def _wait_until_ready(server: Prometheus) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            if httpx.get(f"{server.url}/-/ready").is_success:
                return
        except httpx.TransportError:
            pass
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < until, server.log.read_text()
        time.sleep(0.1)

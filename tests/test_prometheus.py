"""A real Prometheus scrapes a real service under traffic: alerts fire for what is odd, and every expression works."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus import Prometheus, prometheus, quickened
from serving import Server, running

from service.keys import KeyFile, Role, made

DASHBOARDS = Path(__file__).parent.parent / "deploy" / "grafana" / "dashboards"
VARIABLES = {"$job": ".*", "$model": ".*", "$source": ".*", "$instance": ".*", "$__rate_interval": "1h"}
# What only another exporter has.
ELSEWHERE = re.compile(r"DCGM_")


@dataclass
class Watched:
    """A service, the Prometheus that scrapes it, and clients by the source of their pictures."""

    service: Server
    server: Prometheus
    clients: dict[str, httpx.Client]

    def send(self, source: str, pictures: list[Path]) -> int:
        """Score pictures; how many of them are outliers."""
        files = [("file", (path.name, path.read_bytes())) for path in pictures]
        replies = [self.clients[source].post("/v1/score", files=files[i : i + 20]) for i in range(0, len(files), 20)]
        return sum(result["outlier"] for reply in replies for result in reply.raise_for_status().json()["results"])


@pytest.fixture(scope="module")
def watched(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("prometheus")
    keys = {source: made(source, Role.READ, source=source) for source in ("line-1", "line-2")}
    KeyFile(keys=tuple(key for key, _ in keys.values())).write(folder / "keys.yaml")
    settings = f"keys={folder}/keys.yaml", f"store={folder}/store.sqlite", "model=digits", "base_rates={line-9: 0.04}"
    with running(tiny_bundle, *settings) as service, prometheus(folder, service.health.split("//")[1]) as server:
        clients = {
            source: httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {secret}"}, timeout=60)
            for source, (_, secret) in keys.items()
        }
        yield Watched(service, server, clients)
        for client in clients.values():
            client.close()


def test_the_alert_fires_for_the_source_with_odd_pictures_alone(watched: Watched, digits_folder: Path) -> None:
    normal = sorted((digits_folder / "good").iterdir())
    odd = [path for digit in "456789" for path in sorted((digits_folder / digit).iterdir())[:40]]
    while not watched.server.query("up == 1"):
        time.sleep(0.1)
    watched.clients["line-1"].post("/v1/score", content=b"no picture")
    for source in watched.clients:
        watched.send(source, normal[:60])
    judged = "job_model_version_source:anomaly_images_scored:increase30m >= 50"
    until = time.monotonic() + 60
    while len(watched.server.query(judged)) < 2:
        assert time.monotonic() < until, watched.server.query("anomaly_images_scored_total")
        time.sleep(0.2)
    assert not watched.server.firing()
    while "AnomalyOutlierRateHigh" not in watched.server.firing():
        watched.send("line-1", normal[60:120])
        assert watched.send("line-2", odd[:60]) > 20
        odd = odd[60:] + odd[:60]
        assert time.monotonic() < until + 60, watched.server.query("ALERTS")
    (found,) = watched.server.wait_for("AnomalyOutlierRateHigh")
    assert found.items() >= {"job": "anomaly-vae", "model": "digits", "source": "line-2"}.items()


def test_what_a_source_is_known_to_hold_is_told(watched: Watched) -> None:
    (found,) = watched.server.query("anomaly_base_outlier_ratio")
    assert (found["metric"]["source"], float(found["value"][1])) == ("line-9", 0.04)


def test_every_rule_is_evaluated_without_an_error(watched: Watched) -> None:
    rules = [rule for group in watched.server.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 40
    assert [rule for rule in rules if rule["health"] != "ok" or rule.get("lastError")] == []
    recorded = {rule["name"] for rule in rules if rule["type"] == "recording"}
    there = set(watched.server.get("label/__name__/values"))
    assert recorded <= there, f"nothing was recorded as {recorded - there}"


def _expressions() -> Iterator[tuple[str, str]]:
    for path in sorted(DASHBOARDS.glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                yield f"{path.stem}: {panel['title']} {target['refId']}", target["expr"]
        for one in board["annotations"]["list"]:
            yield f"{path.stem}: {one['name']}", one["expr"]
        for one in board["templating"]["list"]:
            if one["type"] == "query":
                series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", one["definition"]).groups()
                yield f"{path.stem}: ${one['name']}", f"count by ({label}) ({series})"


@pytest.mark.parametrize(("place", "expression"), list(_expressions()), ids=lambda value: str(value)[:50])
def test_every_expression_of_the_dashboards_finds_something(watched: Watched, place: str, expression: str) -> None:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    now = time.time()
    found = watched.server.get("query_range", query=quickened(expression), start=now - 120, end=now, step=1)["result"]
    if not ELSEWHERE.search(expression):
        assert found, f"{place} is empty: {expression}"


def test_a_service_that_is_gone_is_noticed(watched: Watched) -> None:
    watched.service.stop()
    (found,) = watched.server.wait_for("AnomalyTargetDown")
    assert found["instance"] == watched.service.health.split("//")[1]

"""The committed dashboards are what the code makes, fit Grafana's types, and hang together."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

GRAFANA = Path(__file__).parent.parent / "deploy" / "grafana"
FILES = sorted((GRAFANA / "dashboards").glob("*.json"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def board(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.param.read_text())
    return found


def test_the_files_are_what_the_code_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(GRAFANA)
    made = importlib.import_module("dashboards").rendered()
    assert made == {path.name: path.read_text() for path in FILES}, "run python deploy/grafana/dashboards.py"
    for name in ("dashboards", "panels"):
        sys.modules.pop(name)


def test_they_fit_the_types_that_grafana_publishes(board: dict[str, Any]) -> None:
    schema = json.loads((Path(__file__).parent / "grafana_schema.json").read_text())
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    assert [f"{list(error.path)}: {error.message[:300]}" for error in kind(schema).iter_errors(board)] == []


def test_panels_have_numbers_of_their_own_and_do_not_overlap(board: dict[str, Any]) -> None:
    panels = board["panels"]
    assert len({one["id"] for one in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for one in panels:
        place = one["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, one["title"]
        taken |= cells
        assert one["type"] == "row" or (one["description"] and one["targets"])


def test_every_variable_is_declared_and_used(board: dict[str, Any]) -> None:
    variables = board["templating"]["list"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([board["panels"], variables]))) - {"__rate_interval", "__all"}
    assert used == {one["name"] for one in variables}


def test_what_is_provisioned_is_where_it_is_looked_for() -> None:
    source = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    provider = yaml.safe_load((GRAFANA / "provisioning/dashboards/anomaly-vae.yml").read_text())["providers"][0]
    for path in FILES:
        first = json.loads(path.read_text())["templating"]["list"][0]
        assert (first["current"]["value"], first["query"]) == (source["uid"], source["type"])
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"

"""Prometheus' own tool on the rules: they are valid, fire when they should and not when not; each is explained."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
CASES = sorted((PROMETHEUS / "tests").glob("*.yml"))


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return found


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "rules" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_configuration_and_its_rules_are_valid(promtool: str) -> None:
    done = subprocess.run([promtool, "check", "config", PROMETHEUS / "prometheus.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rule files found" in done.stdout


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_the_rules_pass_their_unit_tests(promtool: str, case: Path) -> None:
    done = subprocess.run([promtool, "test", "rules", case.name], cwd=case.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_says_what_happened_and_what_to_do(rule: dict[str, Any]) -> None:
    name, notes = rule["alert"], rule["annotations"]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert len(notes["summary"]) <= 120
    assert len(notes["description"]) > len(notes["summary"])
    page, anchor = notes["runbook"].split("#")
    assert anchor == name.lower()
    section = f"\n## {name}\n\n*{rule['labels']['severity']}.* "
    assert section in (ROOT / page).read_text(), "the page has no section of it that begins with its severity"


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_is_seen_firing_in_a_unit_test(rule: dict[str, Any]) -> None:
    fired = set()
    for case in CASES:
        for test in yaml.safe_load(case.read_text())["tests"]:
            fired |= {one["alertname"] for one in test.get("alert_rule_test", ()) if one["exp_alerts"]}
            for one in test.get("promql_expr_test", ()):
                fired |= {found for sample in one["exp_samples"] or () for found in _alert(one["expr"], sample)}
    assert rule["alert"] in fired


def _alert(expression: str, sample: dict[str, Any]) -> list[str]:
    """The alert whose firing a sample is."""
    text = sample["labels"] + expression
    return re.findall(r'alertname="(\w+)"', text) if 'alertstate="firing"' in text else []


def test_only_the_pages_sections_are_alerts() -> None:
    sections = re.findall(r"^## (Anomaly\w+)$", (ROOT / "docs" / "alerts.md").read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(rule["alert"] for rule in alerts())

"""What can be said of containers and units without running them: schemas, systemd's own checks, files that agree."""

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from sqlalchemy import make_url

from service.settings import ENVIRONMENT_PREFIX, ServiceSettings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "anomaly-vae.service"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


@pytest.fixture
def check() -> Iterator[ModuleType]:
    """deploy/check.py as a module."""
    sys.path.insert(0, str(DEPLOY))
    yield importlib.import_module("check")
    sys.path.remove(str(DEPLOY))
    sys.modules.pop("check")


def test_the_compose_files_fit_the_compose_specification() -> None:
    files = [DEPLOY / "compose.yaml", DEPLOY / "compose.cuda.yaml"]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_that_a_container_is_given_is_there(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for volume in service["volumes"]:
            source, place, *_ = re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", volume).split(":")
            if source.startswith("./") and source.split("/")[1] not in {"models", "keys", "tls"}:  # the operator's own
                assert (DEPLOY / source).exists(), f"{name}: {source}"
            elif not source.startswith("./"):
                assert source in compose["volumes"]
            assert place.startswith("/")
    assert {name for service in compose["services"].values() for name in service["networks"]} == set(
        compose["networks"]
    )


def test_every_container_is_pinned_and_may_do_little(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert re.search(r":[\w.-]*\d|:cpu$", service["image"]), f"{name}: {service['image']}"
        assert service["read_only"], name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert name == "postgres" or service["cap_drop"] == ["ALL"]
    assert [name for name, one in compose["services"].items() if "ports" in one] == ["nginx", "prometheus", "grafana"]
    for name in ("prometheus", "grafana"):
        assert all(port.startswith("127.0.0.1:") for port in compose["services"][name]["ports"])


def test_the_settings_of_the_containers_are_settings(compose: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("keys: []\n")
    given = dict(compose["services"]["anomaly-vae"]["environment"])
    in_image = dict(re.findall(rf"({ENVIRONMENT_PREFIX}\w+)=(\S+)", (DEPLOY / "Dockerfile").read_text()))
    environment = {name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for name, value in (in_image | given).items()}
    environment |= {"ANOMALY_VAE_SERVE_MODELS": str(tmp_path), "ANOMALY_VAE_SERVE_KEYS": str(tmp_path / "keys.yaml")}
    settings = ServiceSettings.load(environment=environment)
    assert (settings.host, settings.port, settings.separate_health_port(settings.port)) == ("0.0.0.0", 8765, 8766)
    assert settings.trusted_proxies == 1
    store = make_url(settings.store)
    postgres = compose["services"]["postgres"]["environment"]
    assert (store.host, store.username, store.database) == (
        "postgres", postgres["POSTGRES_USER"], postgres["POSTGRES_DB"],
    )  # fmt: skip
    limit = re.search(r"client_max_body_size (\d+)m;", (DEPLOY / "nginx" / "anomaly-vae.conf").read_text())
    assert limit
    assert int(limit[1]) << 20 == settings.max_archive_bytes


def test_prometheus_and_nginx_look_where_the_service_is(compose: dict[str, Any]) -> None:
    (target,) = yaml.safe_load((DEPLOY / "prometheus" / "targets" / "anomaly-vae.yml").read_text())[0]["targets"]
    assert target == "anomaly-vae:8766"
    assert "server anomaly-vae:8765;" in (DEPLOY / "compose" / "upstream.conf").read_text()
    services = compose["services"]
    for name, network in (("nginx", "front"), ("prometheus", "metrics"), ("postgres", "store")):
        assert network in services[name]["networks"]
        assert network in services["anomaly-vae"]["networks"]
    url = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0][
        "url"
    ]
    assert url == "http://prometheus:9090"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that is there."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: apt-get install systemd)")
    text = UNIT.read_text()
    assert "ExecStart=/opt/anomaly-vae/bin/anomaly-vae serve" in text
    place = tmp_path / "anomaly-vae.service"
    place.write_text(text.replace("/opt/anomaly-vae/bin/anomaly-vae", sys.executable))
    return place


def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    drop_in = unit.with_name("anomaly-vae.service.d")
    drop_in.mkdir()
    for more in ((), ("cuda.conf",)):
        for name in more:
            shutil.copy(DEPLOY / "systemd" / name, drop_in)
        done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if "anomaly-vae" in line]
        assert (done.returncode, said) == (0, []), done.stderr


def test_the_unit_may_do_little(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:]


def test_the_steps_of_the_dockerfile_are_understood(check: ModuleType) -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    stages = check.stages(text)
    assert list(stages) == ["wheel", "packages", "service", "cuda", "cpu"]
    assert stages["cuda"].base == stages["cpu"].base == "service"
    words = [step.word for step in stages["service"].steps]
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert next(step.rest for step in stages["service"].steps if step.word == "USER") == "10001:10001"
    assert {"HEALTHCHECK", "VOLUME", "EXPOSE"} <= set(words)
    assert [step.word for step in check.stages('FROM a AS b\nRUN x \\\n    y\nRUN ["z"]').get("b").steps] == ["RUN"] * 2
    for stage in stages.values():
        for step in stage.steps:
            if step.word == "COPY" and "from" not in step.flags:
                assert all(check.sent(source) and (ROOT / source).exists() for source in step.rest.split()[:-1])


def test_the_image_is_given_what_the_product_needs() -> None:
    command = [sys.executable, DEPLOY / "requirements.py", ROOT / "pyproject.toml", "postgres"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = done.stdout.split("\n")
    assert any(line.startswith("torch>=") for line in found)
    assert any(line.startswith("psycopg[binary]") for line in found)

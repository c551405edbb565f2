"""Settings come from a file, the environment and options, in this order, and every mistake is one clear line."""

from pathlib import Path

import pytest

from anomaly_vae import ConfigError
from service.settings import ENVIRONMENT_PREFIX, ServiceSettings

SHIPPED = Path(__file__).parent.parent / "configs" / "service.yaml"


def test_the_shipped_file_states_every_setting_at_its_default() -> None:
    shown = {line.split(":")[0] for line in SHIPPED.read_text().splitlines() if line and line[0].isalpha()}
    assert ServiceSettings.load(SHIPPED, environment={}) == ServiceSettings()
    assert shown == set(ServiceSettings.model_fields)


def test_options_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("port: 1111\nqueue_size: 100\nmax_batch: 4\n")
    environment = {f"{ENVIRONMENT_PREFIX}PORT": "2222", f"{ENVIRONMENT_PREFIX}QUEUE_SIZE": "200", "HOME": "/root"}
    settings = ServiceSettings.load(file, ["port=3333"], environment)
    assert (settings.port, settings.queue_size, settings.max_batch) == (3333, 200, 4)


@pytest.mark.parametrize(
    ("yaml", "environment", "options", "named"),
    [
        ("port: many", {}, [], "port"),
        ("prot: 1", {}, [], "prot"),
        ("port: 70000", {}, [], "port"),
        ("device: tpu", {}, [], "device"),
        ("source: 'a b'", {}, [], "source"),
        ("", {"PORT": "many"}, [], "ANOMALY_VAE_SERVE_PORT"),
        ("", {"PROT": "1"}, [], "ANOMALY_VAE_SERVE_PROT"),
        ("", {}, ["queue_size=0"], "queue_size"),
        ("", {}, ["queue_size"], "queue_size"),
        ("", {}, ["queue_size=4"], "max_images_per_request"),
        ("", {}, ["health_port=8765"], "health_port"),
        ("base_rates: {line-3: 4}\n", {}, [], "base_rates.line-3"),
        ("", {"BASE_RATES": "{line 3: 0.1}"}, [], "base_rates"),
        ("", {"BASE_RATES": "{"}, [], "base_rates"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_setting(
    tmp_path: Path, yaml: str, environment: dict[str, str], options: list[str], named: str
) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(yaml)
    with pytest.raises(ConfigError) as error:
        ServiceSettings.load(file, options, {ENVIRONMENT_PREFIX + key: value for key, value in environment.items()})
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_base_rates_are_read_from_wherever_they_stand() -> None:
    for options, environment in ((["base_rates={line-3: 0.04}"], {}), ([], {"BASE_RATES": "{line-3: 0.04}"})):
        given = {ENVIRONMENT_PREFIX + key: value for key, value in environment.items()}
        assert ServiceSettings.load(None, options, given).base_rates == {"line-3": 0.04}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_other_machines_are_let_in_only_when_it_is_said(host: str) -> None:
    with pytest.raises(ConfigError, match="allow_remote"):
        ServiceSettings.load(None, [f"host='{host}'"], {})
    assert ServiceSettings.load(None, [f"host='{host}'", "allow_remote=true"], {}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_no_permission(host: str) -> None:
    assert ServiceSettings.load(None, [f"host='{host}'"], {}).host == host


def test_request_threads_can_fill_the_queue_and_still_refuse() -> None:
    for queue_size in (1, 64, 1000):
        settings = ServiceSettings(queue_size=queue_size, max_images_per_request=1)
        assert settings.threads_for_requests() > settings.queue_size + settings.max_batch

"""`ServiceSettings`: everything an operator can set, from a YAML file, the environment and the command line."""

import ipaddress
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from anomaly_vae import ConfigError, Spec, override, parse_yaml, read_yaml

# Not ANOMALY_VAE_SERVICE_: Kubernetes itself sets ANOMALY_VAE_SERVICE_HOST and _PORT beside a Service "anomaly-vae".
ENVIRONMENT_PREFIX = "ANOMALY_VAE_SERVE_"
MIB = 1024 * 1024
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class ServiceSettings(Spec):
    """How the service listens, how much it accepts, and how it batches; configs/service.yaml explains each."""

    host: str = "127.0.0.1"
    port: int = Field(default=8765, ge=0, le=65535)
    health_port: int | None = Field(default=None, ge=0, le=65535)
    allow_remote: bool = False
    trusted_proxies: int = Field(default=0, ge=0, le=16)
    keys: Path | None = None
    session_hours: float = Field(default=12.0, gt=0.0, le=8760.0)
    tls_certificate: Path | None = None
    tls_key: Path | None = None

    models: Path | None = None
    load_seconds: float = Field(default=300.0, ge=0.1, le=3600.0)
    model: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    source: str = Field(default="default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    device: str = "auto"
    precision: Literal["float32", "bfloat16", "auto"] = "float32"

    max_batch: int = Field(default=16, ge=1, le=1024)
    queue_size: int = Field(default=64, ge=1, le=65536)
    extra_delay_ms: float = Field(default=0.0, ge=0.0, le=10_000.0)
    bulk_patience_ms: float = Field(default=500.0, ge=0.0, le=60_000.0)
    deadline_ms: int = Field(default=30_000, ge=1, le=600_000)

    max_request_bytes: int = Field(default=32 * MIB, ge=1024, le=1024 * MIB)
    max_images_per_request: int = Field(default=32, ge=1, le=4096)

    max_archives: int = Field(default=2, ge=1, le=64)
    max_archive_bytes: int = Field(default=1024 * MIB, ge=1024, le=64 * 1024 * MIB)
    max_archive_entries: int = Field(default=10_000, ge=1, le=1_000_000)
    max_expansion: float = Field(default=20.0, ge=1.0, le=1000.0)
    archive_deadline_ms: int = Field(default=600_000, ge=1, le=86_400_000)

    store: str = "auto"
    flush_ms: float = Field(default=200.0, ge=1.0, le=60_000.0)
    store_buffer: int = Field(default=10_000, ge=100, le=10_000_000)
    images: Literal["none", "outliers", "all"] = "outliers"
    picture_days: float | None = Field(default=30.0, gt=0.0)
    picture_megabytes: int | None = Field(default=1024, ge=1)
    verdict_days: float | None = Field(default=None, gt=0.0)
    minute_counts_days: float | None = Field(default=7.0, ge=1.0)
    hour_counts_days: float | None = Field(default=400.0, ge=1.0)
    max_exports: int = Field(default=2, ge=1, le=64)
    review_share: float = Field(default=0.01, ge=0.0, le=1.0)
    base_rates: dict[SourceName, Annotated[float, Field(gt=0.0, lt=1.0)]] = Field(default_factory=dict)

    max_scans: int | None = Field(default=1000, ge=1)
    scan_days: float | None = Field(default=None, gt=0.0)
    max_report_bytes: int = Field(default=16 * MIB, ge=1024, le=1024 * MIB)

    logs: Literal["auto", "text", "json"] = "auto"
    log_requests: bool = False

    compute_threads: int | None = Field(default=None, ge=1, le=1024)
    batches_at_once: int | None = Field(default=None, ge=1, le=64)
    decode_threads: int | None = Field(default=None, ge=1, le=1024)
    request_threads: int | None = Field(default=None, ge=1, le=4096)
    backlog: int = Field(default=1024, ge=128, le=65535)
    body_seconds: float = Field(default=20.0, ge=1.0, le=3600.0)
    drain_seconds: float = Field(default=30.0, ge=1.0, le=3600.0)

    @field_validator("models")
    @classmethod
    def _a_folder(cls, models: Path | None) -> Path | None:
        if models is not None and not models.is_dir():
            raise ValueError(f"{models} is no folder; give the one that holds the bundles")
        return models

    @field_validator("base_rates", mode="before")
    @classmethod
    def _as_in_yaml(cls, rates: Any) -> Any:
        return parse_yaml(rates, "base_rates") if isinstance(rates, str) else rates

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        kind, _, index = device.partition(":")
        if kind not in {"auto", "cpu", "cuda", "mps"} or (index and not index.isdigit()):
            raise ValueError(f"{device!r} is no device; use auto, cpu, cuda, cuda:1 or mps")
        return device

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.max_images_per_request > self.queue_size:
            raise ValueError(
                f"max_images_per_request {self.max_images_per_request} can never fit in queue_size {self.queue_size}; "
                "raise the second or lower the first"
            )
        if (self.minute_counts_days or math.inf) > (self.hour_counts_days or math.inf):
            raise ValueError(
                "minute_counts_days is more than hour_counts_days, and counts by the minute are folded into those by "
                "the hour; raise the second or lower the first"
            )
        if self.health_port is not None and self.health_port == self.port != 0:
            raise ValueError(f"health_port and port are both {self.port}; leave health_port out for the next one")
        if not self.allow_remote and self.keys is None and not _is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from other machines, and the service asks nobody for a key; "
                "keep 127.0.0.1, make keys (anomaly-vae keys FILE --add NAME) and pass -o keys=FILE, "
                "or pass -o allow_remote=true when a proxy or firewall guards it"
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; give both or none")
        return self

    @classmethod
    def load(
        cls, path: Path | None = None, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> Self:
        """Defaults, then the YAML file, then `ANOMALY_VAE_SERVE_<SETTING>` variables, then `key=value` overrides."""
        data = read_yaml(path) if path else {}
        settings = cls.parse(data, str(path) if path else "the settings")
        from_environment = cls._from_environment(os.environ if environment is None else environment)
        if from_environment:
            names = ", ".join(ENVIRONMENT_PREFIX + key.upper() for key in from_environment)
            settings = cls.parse({**data, **from_environment}, f"environment ({names})")
            data = {**data, **from_environment}
        if overrides:
            settings = cls.parse(override(data, overrides), f"with {', '.join(overrides)}")
        return settings

    @classmethod
    def _from_environment(cls, environment: Mapping[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for variable, value in sorted(environment.items()):
            if not variable.startswith(ENVIRONMENT_PREFIX) or not value:
                continue
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            if key not in cls.model_fields:
                known = ", ".join(ENVIRONMENT_PREFIX + name.upper() for name in cls.model_fields)
                raise ConfigError(f"environment variable {variable}: no such setting; there are {known}")
            found[key] = value
        return found

    def separate_health_port(self, port: int) -> int:
        """The port of health and metrics, given the port the service got: the next one unless set (0: any free)."""
        if self.health_port is not None:
            return self.health_port
        return 0 if self.port == 0 else port + 1 if port < 65535 else port - 1

    def threads_for_requests(self) -> int:
        """Request threads: enough that the queue, not the server, is the first bound a client meets."""
        return self.request_threads or self.queue_size + 2 * self.max_batch + self.max_archives

    def most_bytes(self) -> int:
        """The largest body that is taken."""
        return max(self.max_request_bytes, self.max_archive_bytes, self.max_report_bytes)

    def place_of_store(self, bundle: Path) -> str | None:
        """Where verdicts are kept: beside the bundle unless set; None for nowhere."""
        if self.store == "auto":
            bundle = bundle.resolve()
            return str(bundle.with_name(f"{bundle.name}.store.sqlite"))
        return None if self.store == "none" else self.store

    def pictures_in_hand(self) -> int:
        """How many pictures of one archive may wait at once; all archives together leave others half of the queue."""
        return max(1, self.queue_size // (2 * self.max_archives))

    def threads_for_decoding(self) -> int:
        """How many pictures may be decoded or drawn at once: the cores this process may use."""
        return self.decode_threads or available_cores()


def available_cores() -> int:
    """Cores this process may run on, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

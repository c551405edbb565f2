"""What `quality.py` remembers: a row a measurement, and every look at test images, in one JSON file."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from anomaly_vae import ConfigError, Spec, __version__

HERE = Path(__file__).parent
LIBRARY = HERE.parent / "anomaly_vae"


class Achieved(Spec):
    """False alarms over redrawn calibration sets: mean rate and the range of the central 90% of the redraws.

    `interval`: where the rate of one fresh calibration set on as many fresh test pictures lies with 90% probability.
    """

    alpha: float
    mean: float
    low: float
    high: float
    interval: tuple[float, float]
    redraws: int


class Row(Spec):
    """One method on one task with one seed.

    `settings` and `code` stand for all settings and pictures, and for the code that the figures come from. `status`:
    `absent` where a package is not installed. `n_train`: pictures it was made from without those that calibrate; with
    K-fold calibration all do both. Rates and AUROCs are shares of 1. `product`: a preset, which alone has verdicts.
    """

    data_set: str
    row: str
    method: str
    seed: int
    split: str
    quick: bool
    product: bool
    settings: str = ""
    code: str = ""
    status: Literal["done", "failed", "absent"] = "done"
    reason: str = ""
    about: str = ""
    n_train: int | None = None
    n_calibrate: int | None = None
    n_normal: int | None = None
    n_abnormal: int | None = None
    auroc: float | None = None
    auroc_interval: tuple[float, float] | None = None
    average_precision: float | None = None
    tpr_at_1_fpr: float | None = None
    pixel_auroc: float | None = None
    pixel_average_precision: float | None = None
    pro: float | None = None
    alpha: float | None = None
    expected_rate: float | None = None
    false_alarms: int | None = None
    false_alarm_interval: tuple[int, int] | None = None
    flagged: float | None = None
    achieved: tuple[Achieved, ...] = ()
    parts: dict[str, float] = Field(default_factory=dict)
    train_seconds: float | None = None
    ms_an_image: float | None = None
    versions: str = ""
    machine: str = ""
    command: str = ""

    @property
    def identity(self) -> tuple[str, str, str, str, bool, int]:
        """What a row is about; a new one replaces that of older settings or code."""
        return self.data_set, self.row, self.method, self.split, self.quick, self.seed


class Look(Spec):
    """A run that tested on pictures which serve for nothing but a release's figures."""

    date: str
    version: str
    command: str


class Book:
    """The file, written whole after every change; one that another process added rows to meanwhile keeps them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.looks: list[Look] = []
        self._read()

    def standing(self, row: Row) -> Row | None:
        """The row that needs not be measured again."""
        same = (one for one in self.rows if one.identity == row.identity and one.status == "done")
        return next((one for one in same if (one.settings, one.code) == (row.settings, row.code)), None)

    def put(self, row: Row) -> None:
        """Add, or replace what stands for the same."""
        self._read()
        self.rows = [one for one in self.rows if one.identity != row.identity] + [row]
        self._write()

    def look(self, look: Look) -> None:
        """Remember a look at test images, before it happens."""
        self._read()
        self.looks.append(look)
        self._write()

    def _read(self) -> None:
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text())
            self.rows = [Row.parse(one, str(self.path)) for one in content["rows"]]
            self.looks = [Look.parse(one, str(self.path)) for one in content["looks"]]
        except (ValueError, KeyError, TypeError, ConfigError):
            raise ConfigError(f"{self.path} is no file of this benchmark's rows; choose another --out") from None

    def _write(self) -> None:
        content: dict[str, Any] = {
            "looks": [one.model_dump(mode="json") for one in self.looks],
            "rows": [one.model_dump(mode="json") for one in self.rows],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(f".{os.getpid()}.part")
        fresh.write_text(json.dumps(content, indent=1) + "\n")
        fresh.replace(self.path)


@cache
def product_code() -> str:
    """Version and content of the library."""
    return f"{__version__}+{_digest(sorted(LIBRARY.glob('*.py')))}"


@cache
def baseline_code() -> str:
    """Content of what a baseline's figures depend on, so that a change of the models does not measure them again."""
    names = ("images.py", "image_headers.py", "data.py", "metrics.py")
    return f"baselines+{_digest([HERE / 'baselines.py', *(LIBRARY / name for name in names)])}"


def _digest(paths: Iterable[Path]) -> str:
    content = hashlib.sha256()
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:8]


@cache
def versions() -> str:
    """What the figures were made with."""
    found = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "scikit-learn"))
    return f"anomaly-vae {__version__}, Python {platform.python_version()}, {', '.join(found)}"


def machine(device: torch.device) -> str:
    """Processor, threads and, where one computes, the GPU."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    here = f"{os.cpu_count()} cores of {processor or platform.machine()}, {torch.get_num_threads()} torch threads"
    return f"{torch.cuda.get_device_name(device)}, {here}" if device.type == "cuda" else here

"""What the commands share: options, opening a bundle, printing JSON. Imports nothing heavy until it is called."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anomaly_vae.errors import ConfigError

if TYPE_CHECKING:
    from anomaly_vae.data import DataSpec
    from anomaly_vae.engine import Engine

Override = Annotated[
    list[str] | None, typer.Option("-o", "--override", metavar="KEY.SUB=VALUE", help="Change one setting.")
]
DataOverride = Annotated[
    list[str] | None,
    typer.Option("-o", "--override", metavar="data.KEY=VALUE", help="Change how the folder is read."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder written by train.")]
Alpha = Annotated[float | None, typer.Option(help="Another false-alarm rate than the bundle's.")]


def engine_of(
    bundle: Path, device: str, alpha: float | None, max_batch: int = 32, precision: str = "float32"
) -> "Engine":
    """The bundle's detector, ready to judge on `device`; `alpha` None keeps the bundle's own."""
    from anomaly_vae.detector import Detector
    from anomaly_vae.engine import Engine, pick_device

    detector = Detector.load(bundle, pick_device(device))
    return Engine(detector.with_policy(alpha) if alpha is not None else detector, device, max_batch, precision)


def data_spec_of(engine: "Engine", overrides: list[str]) -> "DataSpec":
    """How the detector's own training data was read, changed by overrides."""
    return engine.detector.spec.with_overrides(only_data(overrides)).data


def only_data(overrides: list[str]) -> list[str]:
    """The overrides as they are; raises `ConfigError` where one is of another setting than `data`."""
    for text in overrides:
        if not text.startswith("data."):
            raise ConfigError(f"override {text!r}: only data.* settings, such as data.normal=[good], apply here")
    return overrides


def print_json(facts: Any) -> None:
    """Plain values as JSON on standard output; refuses NaN and infinity, which are no JSON."""
    typer.echo(json.dumps(facts, indent=2, allow_nan=False))

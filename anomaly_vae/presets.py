"""Ready-made recipes: the YAML files of `configs/models`, by name, wherever the package is installed."""

from collections.abc import Sequence
from pathlib import Path

from anomaly_vae.errors import ConfigError
from anomaly_vae.recipe import DetectorSpec

DEFAULT = "default"

_PACKAGED = Path(__file__).parent / "_configs"
"""A wheel carries the folder inside the package; a checkout has it beside the package."""


def configs_folder() -> Path:
    """The folder of the shipped configuration files."""
    return _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent / "configs"


def preset_names() -> list[str]:
    """Names that `read_preset` knows."""
    return sorted(path.stem for path in (configs_folder() / "models").glob("*.yaml"))


def read_preset(name: str, overrides: Sequence[str] = ()) -> DetectorSpec:
    """The recipe `name` with overrides; raises `ConfigError` naming the known ones."""
    if name not in preset_names():
        raise ConfigError(f"there is no preset {name!r}; choose one of {', '.join(preset_names())}")
    return DetectorSpec.read(configs_folder() / "models" / f"{name}.yaml", [*overrides, f"preset={name}"])

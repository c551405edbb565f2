"""Which device trains, in which precision, with how many processes: one `Fabric`."""

import os
import warnings
from pathlib import Path
from typing import Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.logger import Logger

from anomaly_vae.engine import pick_device
from anomaly_vae.errors import ConfigError


def make_fabric(
    device: str, precision: Literal["auto", "32-true", "bf16-mixed"], tensorboard: Path | None, parts_rest: bool = False
) -> Fabric:
    """A launched Fabric on `device`; under torchrun one of its processes.

    `precision` `auto`: bfloat16 mixed precision on NVIDIA GPUs that have it, float32 elsewhere. `parts_rest`: some
    weights take no part in some steps, which several processes must be told.
    """
    chosen = pick_device(device)
    if precision == "auto":
        has_bf16 = chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16-mixed" if has_bf16 else "32-true"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices: int | list[int] = processes
    if processes == 1 and chosen.type == "cuda":
        devices = [chosen.index or 0]
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with warnings.catch_warnings():
        # Fabric recommends its own launcher and its users' shared-memory settings; neither helps here.
        warnings.simplefilter("ignore")
        fabric = Fabric(
            accelerator=chosen.type,
            devices=devices,
            num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
            strategy=("ddp_find_unused_parameters_true" if parts_rest else "ddp") if many else "auto",
            precision=precision,
            loggers=_logger(tensorboard),
        )
        fabric.launch()
    return fabric


def _logger(folder: Path | None) -> Logger | None:
    if folder is None:
        return None
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    try:
        return TensorBoardLogger(root_dir=folder)
    except ModuleNotFoundError:
        raise ConfigError("--tensorboard needs a package: pip install 'anomaly-vae[tensorboard]'") from None

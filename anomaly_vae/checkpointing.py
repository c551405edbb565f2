"""The folder of checkpoints beside a bundle in the making, which belongs to one run and no other."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from anomaly_vae import __version__
from anomaly_vae.bundle import write_durably
from anomaly_vae.data import Pictures
from anomaly_vae.dividing import Indices, Part
from anomaly_vae.errors import BundleError, TrainingError
from anomaly_vae.known import Known
from anomaly_vae.recipe import DetectorSpec
from anomaly_vae.spec import dump_yaml, read_yaml

Say = Callable[[str], None]
_RUN = "run.yaml"


def open_work(work: Path, run: dict[str, Any], restart: bool, fabric: Fabric, say: Say) -> None:
    """The folder of checkpoints beside the bundle; an old one must be of the very same run."""
    if fabric.is_global_zero:
        if restart or not (work / _RUN).exists():
            # Without its description a checkpoint may be of any run.
            shutil.rmtree(work, ignore_errors=True)
        if (work / _RUN).exists():
            if read_yaml(work / _RUN) != run:
                raise TrainingError(
                    f"an interrupted training with other settings or pictures lies in {work}; "
                    "give its settings to go on with it, or pass --restart to begin anew"
                )
            say(f"going on with the interrupted training in {work}")
        else:
            try:
                work.mkdir(parents=True)
                write_durably(work / _RUN, dump_yaml(run).encode())
            except OSError as error:
                raise BundleError(f"cannot write {work}: {error.strerror}; choose another --out") from None
    fabric.barrier()


def identity(
    spec: DetectorSpec, pictures: Pictures, parts: list[Part], fabric: Fabric, known: Known | None
) -> dict[str, Any]:
    """All that the weights depend on: another order, label or group of the pictures divides them otherwise."""

    def of(indices: Indices, among: Pictures = pictures) -> str:
        return hashlib.sha256(among.fingerprints[indices].tobytes()).hexdigest()[:16]

    return {
        "spec": spec.model_dump(mode="json"),
        "parts": [[of(part.train), of(part.fit), of(part.calibrate)] for part in parts],
        "known": None if known is None else of(np.arange(len(known.pictures)), known.pictures),
        "processes": fabric.world_size,
        "device": fabric.device.type,
        "torch": str(torch.__version__),
        "version": __version__,
    }


def close_work(work: Path) -> None:
    """Remove the checkpoints, their description last: what a crash leaves behind must still say what it is of."""
    for path in work.glob("member*.safetensors"):
        path.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)

"""What training must remember to go on exactly where it was: one safetensors file, nothing pickled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from anomaly_vae.bundle import write_durably
from anomaly_vae.errors import TrainingError


@dataclass
class Checkpoint:
    """State after `epoch` whole epochs. `best`: the weights to keep; `history`: one row an epoch."""

    epoch: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    best: dict[str, Tensor]
    best_loss: float = float("inf")
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write durably: after a crash the file is the old checkpoint or this one."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.weights.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, state in self.optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        facts = {
            "epoch": self.epoch,
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            "history": self.history,
        }
        # Weights and best weights may share memory, and one file may hold a tensor only once.
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        write_durably(path, safetensors.torch.save(copies, {"facts": json.dumps(facts)}))

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read what `write` wrote; the optimizer's settings are not in it, only its state."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                facts = json.loads(file.metadata()["facts"])
        except (OSError, safetensors.SafetensorError, KeyError, ValueError):
            raise TrainingError(f"the checkpoint {path} cannot be read; pass --restart to begin again") from None
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer", tensors).items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        return cls(
            weights=_under("weights", tensors), best=_under("best", tensors), optimizer={"state": state}, **facts
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}

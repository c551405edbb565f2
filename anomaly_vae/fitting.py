"""Finding the weights of one model: AdamW on Lightning Fabric, resumable to the bit.

All randomness of epoch e and step s is drawn from generators seeded by (seed, e, s), never carried over; so a run that
was killed goes on from its last checkpoint and ends with the weights it would have had.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from anomaly_vae.checkpoints import Checkpoint
from anomaly_vae.data import Pictures
from anomaly_vae.errors import TrainingError
from anomaly_vae.member import normalise
from anomaly_vae.model import AutoEncoder, Loss
from anomaly_vae.recipe import TrainingSpec
from anomaly_vae.seeds import generator_of, seed_of

Indices = npt.NDArray[np.int64]

ACTIVE_NATS = 0.01
"""A latent dimension is active when its mean KL on held-out normals exceeds this (Burda et al. 2016 use a variance)."""
_HELD_OUT_ROWS = 40
"""About how often the held-out loss is measured; a tiny set has thousands of epochs."""


@dataclass(frozen=True)
class Progress:
    """Where training stands after an epoch; losses in nats per image, `held_out` as last measured."""

    epoch: int
    epochs: int
    loss: float
    reconstruction: float
    kl: float
    held_out: float
    images_per_second: float


@dataclass(frozen=True)
class Fitted:
    """The chosen weights (loaded into the model) and how they were found."""

    epoch: int
    epochs: int
    held_out: float
    active_units: int
    history: list[dict[str, float]]


Report = Callable[[Progress], None]


class Fitting:
    """One model on its way: what stays the same from epoch to epoch. `share`: of the budget of steps that it gets."""

    def __init__(
        self,
        fabric: Fabric,
        model: AutoEncoder,
        spec: TrainingSpec,
        pictures: Pictures,
        train: Indices,
        held: Indices,
        seed: int,
        share: float = 1.0,
    ) -> None:
        if len(train) < 2:
            raise TrainingError(f"{len(train)} picture(s) to train on are too few; add normal pictures")
        self.fabric, self.model, self.spec = fabric, model, spec
        self.pictures, self.train, self.held, self.seed = pictures, train, held, seed
        self.batch = min(spec.batch_size, len(train))
        self.batch -= self.batch % fabric.world_size
        if not self.batch:
            raise TrainingError(
                f"{fabric.world_size} processes share batches of {min(spec.batch_size, len(train))} pictures; use fewer"
            )
        # An epoch is a tenth of the budget at most: of a million pictures one pass would be the budget many times over,
        # and what happens only between epochs (checkpoints, the held-out loss) would never happen.
        self.steps_an_epoch = len(train) // self.batch
        if spec.epochs is None:
            self.steps_an_epoch = min(self.steps_an_epoch, max(1, spec.steps // 10))
        self.epochs = spec.epochs or max(1, math.ceil(spec.steps * share / self.steps_an_epoch))
        self.steps = self.epochs * self.steps_an_epoch
        self.has_dropout = any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules())
        model.lay_channels_last()
        optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
        self.wrapped, self.optimizer = fabric.setup(model, optimizer)

    def run(self, checkpoint: Path | None, report: Report) -> Fitted:
        """Train to the end, from `checkpoint` if it exists; the model is left with the chosen weights, in eval mode."""
        state = self._resume(checkpoint)
        saved = time.monotonic()
        for epoch in range(state.epoch, state.epoch if self._hopeless(state) else self.epochs):
            started = time.monotonic()
            losses = self._epoch(epoch)
            seconds = time.monotonic() - started
            self._measure(state, epoch, losses)
            rate = self.steps_an_epoch * self.batch / max(seconds, 1e-9)
            report(Progress(epoch + 1, self.epochs, *losses, state.history[-1]["held_out"], rate))
            due = time.monotonic() - saved >= self.spec.checkpoint_seconds or epoch + 1 == self.epochs
            if checkpoint is not None and due and self.fabric.is_global_zero:
                state.write(checkpoint)
                saved = time.monotonic()
            if self._hopeless(state):
                break
        if not state.best_epoch:
            remedy = f"-o training.learning_rate={self.spec.learning_rate / 4:g}"
            raise TrainingError(f"the held-out loss never was a number; lower the learning rate: {remedy}")
        self.model.load_state_dict(state.best)
        self.model.eval()
        return Fitted(state.best_epoch, state.epoch, state.best_loss, self._active_units(), state.history)

    def _hopeless(self, state: Checkpoint) -> bool:
        """Whether the held-out loss has not fallen for so long that going on would only learn the pictures by heart."""
        patience = self.spec.patience
        if self.spec.select == "last" or patience is None or not state.best_epoch:
            return False
        return state.epoch - state.best_epoch >= max(1, round(patience * self.epochs))

    def _resume(self, path: Path | None) -> Checkpoint:
        if path is None or not path.exists():
            return Checkpoint(0, self.model.state_dict(), self.optimizer.state_dict(), self.model.state_dict())
        state = Checkpoint.read(path)
        self.model.load_state_dict(state.weights)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state.optimizer["state"], "param_groups": groups})
        return state

    def _epoch(self, epoch: int) -> tuple[float, float, float]:
        """Train one epoch; mean (total, reconstruction, kl) in nats per image."""
        self.wrapped.train()
        order = torch.randperm(len(self.train), generator=generator_of(self.seed, "order", epoch)).numpy()
        sums = torch.zeros(3, dtype=torch.float64)
        pending: list[Loss] = []
        chosen = self.train[order[: self.steps_an_epoch * self.batch]]
        batches = self.pictures.batches(self.batch, chosen, drop_last=True)
        for i, (_, images) in enumerate(batches):
            pending.append(self._step(epoch * self.steps_an_epoch + i, images))
        for loss in pending:
            sums += torch.stack(list(loss)).double().cpu()
        total, reconstruction, kl = (sums / max(len(pending), 1)).tolist()
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss is no longer a number in epoch {epoch + 1}; lower it: -o training.learning_rate="
                f"{self.spec.learning_rate / 4:g}"
            )
        return total * math.prod(self.model.shape), reconstruction, kl

    def _step(self, step: int, images: Tensor) -> Loss:
        self._set_learning_rate(step)
        # Noise is drawn for the whole batch and cut by rank, so that it does not depend on how many ranks there are.
        noise = torch.randn(len(images), self.model.spec.latent.size, generator=generator_of(self.seed, "z", step))
        mine = slice(self.fabric.global_rank, None, self.fabric.world_size)
        x = normalise(images[mine], self.fabric.device)
        self.optimizer.zero_grad()
        with self._seeded(step):
            loss: Loss = self.wrapped(x, noise[mine].to(x.device), self.model.spec.latent.beta_at(step / self.steps))
        self.fabric.backward(loss.total)
        if self.spec.clip_norm is not None:
            self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=self.spec.clip_norm)
        self.optimizer.step()
        return Loss(loss.total.detach(), loss.reconstruction, loss.kl)

    def _seeded(self, step: int) -> AbstractContextManager[None]:
        """PyTorch's dropout draws from the global generator alone; seed that for the step and give it back."""
        return (
            _global_seed(seed_of(self.seed, f"dropout {self.fabric.global_rank}", step))
            if self.has_dropout
            else nullcontext()
        )

    def _set_learning_rate(self, step: int) -> None:
        warm = max(1, round(self.spec.warmup * self.steps))
        rate = self.spec.learning_rate * min(1.0, (step + 1) / warm)
        if self.spec.schedule == "cosine" and step >= warm:
            rate *= 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _measure(self, state: Checkpoint, epoch: int, losses: tuple[float, float, float]) -> None:
        """Bring `state` to the end of `epoch`, with the held-out loss when it is due."""
        every = max(1, self.epochs // _HELD_OUT_ROWS)
        last = epoch + 1 == self.epochs
        due = (epoch + 1) % every == 0 or last
        # Buffers differ a little between processes, and all must stop at the same epoch.
        known = state.history[-1]["held_out"] if state.history else float("nan")
        held = self.fabric.broadcast(self._held_out()) if due else known
        state.epoch, state.weights, state.optimizer = epoch + 1, self.model.state_dict(), self.optimizer.state_dict()
        row = zip(("epoch", "loss", "reconstruction", "kl", "held_out"), (epoch + 1, *losses, held), strict=True)
        state.history.append(dict(row))
        if due and (last if self.spec.select == "last" else held < state.best_loss):
            state.best, state.best_loss, state.best_epoch = deepcopy(state.weights), held, epoch + 1

    def _held_out(self) -> float:
        """The loss on held-out normals in nats per image, with full beta and always the same noise."""
        self.model.eval()
        total = 0.0
        with torch.inference_mode():
            for images in self._held_batches():
                noise = torch.randn(1, self.model.spec.latent.size, generator=generator_of(self.seed, "held out", 0))
                x = normalise(images, self.fabric.device)
                loss = self.model(x, noise.to(x.device), self.model.spec.latent.beta)
                total += float(loss.total) * math.prod(self.model.shape) * len(images)
        return total / len(self.held)

    def _active_units(self) -> int:
        with torch.inference_mode():
            total = torch.zeros(self.model.spec.latent.size, device=self.fabric.device)
            for images in self._held_batches():
                total += self.model.encode(normalise(images, self.fabric.device)).kl().sum(0)
        return int((total / len(self.held) > ACTIVE_NATS).sum())

    def _held_batches(self) -> Iterator[Tensor]:
        for _, images in self.pictures.batches(max(self.batch, 64), self.held):
            yield images


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """The global generators seeded for a while."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield

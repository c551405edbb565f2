"""Finding the weights of one model: AdamW on Lightning Fabric, resumable to the bit.

All randomness of epoch e and step s is drawn from generators seeded by (seed, e, s), never carried over; so a run that
was killed goes on from its last checkpoint and ends with the weights it would have had.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from anomaly_vae.checkpoints import Checkpoint
from anomaly_vae.error_scores import RelativeError
from anomaly_vae.errors import TrainingError
from anomaly_vae.known import Known
from anomaly_vae.objectives import Loss, Objective
from anomaly_vae.observations import observe
from anomaly_vae.recipe import TrainingSpec
from anomaly_vae.score_base import of_classes
from anomaly_vae.seeds import generator_of, seed_of
from anomaly_vae.tiling import Tiling

Indices = npt.NDArray[np.int64]

_HELD_OUT_TILES = 4
"""Of each held-out picture so many tiles are measured, always the same; it may have a hundred of them."""
_HELD_OUT_ROWS = 40
"""About how often the held-out loss is measured; a tiny set has thousands of epochs."""
_MEASURED = 512
"""So many pictures at most tell the mean and the deviation of a backbone's channels."""


@dataclass(frozen=True)
class Progress:
    """Where training stands after an epoch; losses in nats per image, `held_out` as last measured.

    `latent`: the cost of the code, called `cost_name`; NaN where a course does not compute it.
    """

    epoch: int
    epochs: int
    loss: float
    reconstruction: float
    latent: float
    held_out: float
    images_per_second: float
    cost_name: str = "KL"


@dataclass(frozen=True)
class Fitted:
    """The chosen weights (loaded into the model) and how they were found."""

    epoch: int
    epochs: int
    held_out: float
    active_units: int
    history: list[dict[str, float]]


Report = Callable[[Progress], None]


class Source(Protocol):
    """Where batches come from; `data.Pictures` is one."""

    def batches(
        self, batch_size: int, order: npt.ArrayLike | None = None, drop_last: bool = False
    ) -> Iterator[tuple[Indices, Tensor]]:
        """(indices, images (n, C, H, W): uint8, or floats taken as they are) in exactly the given order."""


class Fitting:
    """One model on its way: what stays the same from epoch to epoch. `share`: of the budget of steps that it gets.

    `labels`: for a conditional model the class of each picture of the source, int64. `tiling`: where the model sees one
    tile of a picture at a time. `known`: anomalies that it is shown beside them. `settings`: what its settings' names
    begin with.
    """

    def __init__(
        self,
        fabric: Fabric,
        objective: Objective,
        spec: TrainingSpec,
        pictures: Source,
        train: Indices,
        held: Indices,
        seed: int,
        share: float = 1.0,
        labels: Indices | None = None,
        tiling: Tiling | None = None,
        known: Known | None = None,
        settings: str = "",
    ) -> None:
        if len(train) < 2:
            raise TrainingError(f"{len(train)} picture(s) to train on are too few; add normal pictures")
        self.fabric, self.objective, self.model, self.spec = fabric, objective, objective.model, spec
        self.pictures, self.train, self.held, self.seed, self.tiling = pictures, train, held, seed, tiling
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.known, self.settings = known, settings
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
        self.has_dropout = any(isinstance(module, nn.modules.dropout._DropoutNd) for module in objective.modules())
        self.model.lay_channels_last()
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=spec.learning_rate, betas=spec.betas, weight_decay=spec.weight_decay
        )
        self.wrapped, self.optimizer = fabric.setup(objective, optimizer)

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
            held_out, cost_name = state.history[-1]["held_out"], self.model.law.cost_name
            report(Progress(epoch + 1, self.epochs, *losses, held_out, rate, cost_name))
            due = time.monotonic() - saved >= self.spec.checkpoint_seconds or epoch + 1 == self.epochs
            if checkpoint is not None and due and self.fabric.is_global_zero:
                state.write(checkpoint)
                saved = time.monotonic()
            if self._hopeless(state):
                break
        if not state.best_epoch:
            raise TrainingError(f"the held-out loss never was a number; lower the learning rate: {self._slower()}")
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
        """Train one epoch; mean (total, reconstruction, latent cost) in nats per image."""
        order = self._order(epoch)
        self.wrapped.train()
        sums = torch.zeros(3, dtype=torch.float64)
        pending: list[Loss] = []
        chosen = self.train[order[: self.steps_an_epoch * self.batch]]
        batches = self.pictures.batches(self.batch, chosen, drop_last=True)
        for i, (indices, images) in enumerate(batches):
            pending.append(self._step(epoch * self.steps_an_epoch + i, indices, images))
        for loss in pending:
            sums += torch.stack(list(loss)).double().cpu()
        if self.fabric.world_size > 1:
            # Of the whole batch, not of one process's part; and when it is no number, all processes stop.
            means = self.fabric.all_reduce(sums.float().to(self.fabric.device), reduce_op="mean")
            sums = torch.as_tensor(means).double().cpu()
        total, reconstruction, latent = (sums / max(len(pending), 1)).tolist()
        if not math.isfinite(total):
            raise TrainingError(f"the loss is no longer a number in epoch {epoch + 1}; lower it: {self._slower()}")
        return total * math.prod(self.model.shape), reconstruction, latent

    def _slower(self) -> str:
        return f"-o {self.settings}training.learning_rate={self.spec.learning_rate / 4:g}"

    def _order(self, epoch: int) -> Indices:
        """Positions in `train`: each once by chance, or drawn so that rare pictures come more often.

        Pictures that are left out make room for others to come twice.
        """
        generator, count, rarity = generator_of(self.seed, "order", epoch), len(self.train), self.spec.rarity
        trim = self.spec.trim if self.spec.trim is not None and epoch >= self.spec.trim.after * self.epochs else None
        if rarity is None and trim is None:
            return torch.randperm(count, generator=generator).numpy()
        self.wrapped.eval()
        weights = torch.ones(count, dtype=torch.float64)
        if rarity is not None:
            weights = rarity_weights(self._codes(self.train)[0], rarity.bins, rarity.smoothing)
        if trim is not None:
            weights[self._errors(self.train).argsort(descending=True)[: round(trim.share * count)]] = 0
        if rarity is not None:
            order = torch.multinomial(weights, count, replacement=True, generator=generator)
        else:
            kept = weights.nonzero()[:, 0]
            order = torch.cat([kept[torch.randperm(len(kept), generator=generator)] for _ in range(2)])[:count]
        # Buffers differ a little between processes, and all must take the same pictures.
        shared: Tensor = self.fabric.broadcast(order)
        return shared.cpu().numpy()

    def _step(self, step: int, indices: Indices, images: Tensor) -> Loss:
        self._set_learning_rate(step)
        if self.tiling is not None:
            images = self.tiling.drawn(images, generator_of(self.seed, "tiles", step))
        progress, extra = step / self.steps, 0
        self._prepare(progress)
        mine = slice(self.fabric.global_rank, None, self.fabric.world_size)
        x, label, known = self.model.pictures(images[mine]), self._label(indices[mine]), self._anomalies(step)
        if progress < self.objective.spec.encoder_share:
            extra = self.objective.spec.encoder_steps
        for i in range(extra):
            self._move(step, f" {i}", x, label, progress, [self.model.encoder])
        return self._move(step, "", x, label, progress, self.objective.learners(progress), known)

    def _anomalies(self, step: int) -> Tensor | None:
        """Known anomalies for this step, drawn for all processes and cut by rank."""
        exposure = self.objective.spec.exposure
        if self.known is None or exposure is None:
            return None
        world = self.fabric.world_size
        images = self.known.drawn(exposure.count(self.batch, world), generator_of(self.seed, "known", step))
        return self.model.pictures(images[self.fabric.global_rank :: world])

    def _prepare(self, progress: float) -> None:
        """A backbone that has learnt all it will is made ready once, by training pictures."""
        backbone = self.model.backbone
        if backbone is not None and progress >= backbone.share and not backbone.measured:
            some = self.train[:: -(-len(self.train) // _MEASURED)]
            backbone.prepare(self.model.pictures(images) for _, images in self._batches_of(some))

    def _move(
        self,
        step: int,
        name: str,
        x: Tensor,
        label: Tensor | None,
        progress: float,
        learners: Sequence[nn.Module] | None,
        known: Tensor | None = None,
    ) -> Loss:
        """One step of the optimiser, for the `learners` alone where they are given."""
        count = len(x) * self.fabric.world_size
        # Noise is drawn for the whole batch and cut by rank, so that it does not depend on how many ranks there are.
        noise = torch.randn(count, self.model.law.size, generator=generator_of(self.seed, f"z{name}", step))
        noise = noise[self.fabric.global_rank :: self.fabric.world_size].to(x.device)
        chance = seed_of(self.seed, f"chance{name} {self.fabric.global_rank}", step)
        self.optimizer.zero_grad()
        with self._seeded(f"dropout{name}", step):
            loss: Loss = self.wrapped(x, noise, progress, chance, label, known)
        self.fabric.backward(loss.total)
        if learners is not None:
            self._keep_still(learners)
        if self.spec.clip_norm is not None:
            self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=self.spec.clip_norm)
        self.optimizer.step()
        return Loss(loss.total.detach(), loss.reconstruction, loss.latent)

    def _keep_still(self, learners: Sequence[nn.Module]) -> None:
        """Without a gradient the optimiser leaves a weight alone, decay included."""
        moving = {id(weight) for module in learners for weight in module.parameters()}
        for weight in self.model.parameters():
            if id(weight) not in moving:
                weight.grad = None

    def _label(self, indices: Indices) -> Tensor | None:
        """Classes of these pictures on the device."""
        return None if self.labels is None else self.labels[torch.from_numpy(indices)].to(self.fabric.device)

    def _seeded(self, name: str, step: int) -> AbstractContextManager[None]:
        """PyTorch's dropout draws from the global generator alone; seed that for the step and give it back."""
        return (
            _global_seed(seed_of(self.seed, f"{name} {self.fabric.global_rank}", step))
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
        row = zip(("epoch", "loss", "reconstruction", "latent", "held_out"), (epoch + 1, *losses, held), strict=True)
        state.history.append(dict(row))
        if due and (last if self.spec.select == "last" else held < state.best_loss):
            state.best, state.best_loss, state.best_epoch = deepcopy(state.weights), held, epoch + 1

    def _held_out(self) -> float:
        """The loss on held-out normals in nats per image, at its full weights and always with the same noise."""
        self.wrapped.eval()
        total, count = 0.0, 0
        noise = torch.randn(1, self.model.law.size, generator=generator_of(self.seed, "held out", 0))
        with torch.no_grad():
            for indices, images in self._batches_of(self.held):
                x = self.model.pictures(images)
                loss = self.objective(x, noise.to(x).expand(len(x), -1), 1.0, 0, self._label(indices))
                total += float(loss.total) * math.prod(self.model.shape) * len(images)
                count += len(images)
        return total / count

    def _active_units(self) -> int:
        """How many latents tell the held-out normals apart."""
        return int(self.model.law.active(*self._codes(self.held)).sum())

    def _codes(self, chosen: Indices) -> tuple[Tensor, Tensor | None]:
        """Codes (n, D) and, where it falls apart into latents, their KL (n, D), on the CPU."""
        mu, kl = [], []
        with torch.inference_mode():
            for indices, images in self._batches_of(chosen):
                label = self._label(indices)
                posterior = self.model.encode(self.model.view(images), label).float()
                mu.append(posterior.mu.cpu())
                kl += [self.model.law.kl(posterior, posterior.mu).cpu()] if self.model.law.has_kl else []
        return torch.cat(mu), torch.cat(kl) if kl else None

    def _errors(self, chosen: Indices) -> Tensor:
        """Squared error of each picture rebuilt from its mean code, relative to its energy, (n,), on the CPU."""
        errors = []
        with torch.inference_mode():
            for indices, images in self._batches_of(chosen):
                seen = observe(self.model, self.model.view(images), self._label(indices))
                errors.append(of_classes(seen, lambda one: RelativeError()(one, {})).cpu())
        return torch.cat(errors)

    def _batches_of(self, chosen: Indices) -> Iterator[tuple[Indices, Tensor]]:
        generator = generator_of(self.seed, "held-out tiles", 0)
        for indices, images in self.pictures.batches(max(self.batch, 64), chosen):
            if self.tiling is None:
                yield indices, images
            else:
                for _ in range(_HELD_OUT_TILES):
                    yield indices, self.tiling.drawn(images, generator)


def rarity_weights(codes: Tensor, bins: int, smoothing: float) -> Tensor:
    """Weights (n,), summing to 1, inverse to the density of codes (n, D) in histograms of each latent (Amini 2019)."""
    low, high = codes.min(0).values, codes.max(0).values
    place = ((codes - low) / (high - low).clamp_min(1e-12) * bins).long().clamp(0, bins - 1)
    log_weight = torch.zeros(len(codes), dtype=torch.float64)
    for column in place.unbind(1):
        share = torch.bincount(column, minlength=bins).double() / len(codes)
        log_weight -= (share[column] + smoothing).log()
    return log_weight.softmax(0)


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """The global generators seeded for a while."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield

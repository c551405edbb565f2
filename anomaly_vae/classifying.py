"""The verb `classify`: what an encoder that learned without labels is worth when there are labels for a few pictures.

Three classifiers are made from the same labelled pictures: a multinomial logistic regression on the codes of the
encoder as it is (frozen); encoder and that linear head trained on together (fine-tuned; the head begins at the
regression, so that a random one does not spoil the encoder first, Kumar et al. 2022); and the same network from fresh
weights (scratch), trained exactly as the fine-tuned one. A code is the posterior mean mu (B, D).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_vae.data import DataSpec, Pictures, open_pictures
from anomaly_vae.engine import Engine
from anomaly_vae.errors import ConfigError
from anomaly_vae.labelling import Draw, Pool
from anomaly_vae.model import AutoEncoder
from anomaly_vae.seeds import generator_of, seed_of

Indices = npt.NDArray[np.int64]
Method = Literal["frozen", "fine-tuned", "scratch"]
METHODS: tuple[Method, ...] = ("frozen", "fine-tuned", "scratch")
STEPS = 200

_INVERSE_PENALTY = 0.1
"""scikit-learn's C. Ten labels are fitted perfectly by any of them; a strong penalty errs least on the rest."""
_ENCODER_RATE, _HEAD_RATE = 3e-4, 1e-3
_WEIGHT_DECAY = 1e-2
_BATCH = 64


@dataclass(frozen=True)
class Accuracy:
    """Shares of the test pictures named rightly, one for each draw of the labelled pictures."""

    labels: int
    method: Method
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the draws."""
        return float(np.mean(self.accuracies))

    @property
    def sd(self) -> float | None:
        """Standard deviation over the draws (of a sample); None for a single draw."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else None


@dataclass(frozen=True)
class Classified:
    """Accuracies, `METHODS` for each count of labels. `tested`: number of test pictures in each draw.

    `seen`: how many of these the detector was made from. `majority`: accuracy of always naming the commonest class.
    """

    classes: tuple[str, ...]
    steps: int
    tested: tuple[int, ...]
    majority: float
    seen: tuple[int, ...]
    rows: tuple[Accuracy, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for machines."""
        rows = [vars(row) | {"mean": row.mean, "sd": row.sd} for row in self.rows]
        return vars(self) | {"rows": rows, "gains": self.gains()}

    def gains(self) -> list[dict[str, Any]]:
        """How much more is named rightly fine-tuned than from scratch, draw by draw: the draws differ more than they.

        `mean`, `least` and `most` are differences of accuracies.
        """
        found = []
        for labels in sorted({row.labels for row in self.rows}):
            tuned, fresh = (
                next(np.array(row.accuracies) for row in self.rows if (row.labels, row.method) == (labels, method))
                for method in ("fine-tuned", "scratch")
            )
            by = tuned - fresh
            found.append(
                {"labels": labels, "mean": float(by.mean()), "least": float(by.min()), "most": float(by.max())}
            )
        return found

    def lines(self) -> list[str]:
        """What was measured, on how many pictures, and what the encoder brought."""
        low, high = min(self.tested), max(self.tested)
        count = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        draws = f"mean ± standard deviation over {len(self.tested)} draws" if len(self.tested) > 1 else "one draw"
        measured = (
            f"accuracy on {count} pictures of {len(self.classes)} classes, none of them a labelled one; {draws} of the "
            f"labelled pictures; {self.steps} steps; always naming the most frequent class gives {self.majority:.1%}"
        )
        gains = [
            f"{gain['labels']} labels: {100 * gain['mean']:+.1f} points "
            f"({100 * gain['least']:+.1f} to {100 * gain['most']:+.1f})"
            for gain in self.gains()
        ]
        return [measured, f"fine-tuned against scratch, draw by draw: {'; '.join(gains)}"]


class Classifier(nn.Module):
    """Codes, centred and scaled by constants, then a linear layer: uint8 images x (B, C, H, W) to logits (B, classes).

    One scale for all latents: their own, from a few pictures, would blow up those that say nothing of the picture.
    """

    def __init__(self, model: AutoEncoder, codes: Tensor, head: nn.Linear) -> None:
        super().__init__()
        self.model, self.head = model, head
        self.mean, self.scale = _scaling(codes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((self.model.encode(self.model.view(x)).mu.float() - self.mean) / self.scale)
        return logits


def classify(
    engine: Engine,
    root: Path | str,
    data: DataSpec | None = None,
    counts: Sequence[int] = (10, 50, 200),
    draws: int = 3,
    steps: int = STEPS,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Classified:
    """Measure the three classifiers for each count of labelled pictures, on pictures that are not labelled ones.

    Raises `ConfigError` for a conditional model, `DataError` for one class or too few pictures.
    """
    detector = engine.detector
    if getattr(detector.spec.model, "condition", None) is not None:
        raise ConfigError(
            "this model is conditional: its encoder wants the class that is to be found; "
            "give a bundle trained without model.condition"
        )
    if detector.spec.tiles is not None:
        raise ConfigError("this encoder sees tiles, not whole pictures; give a bundle trained without tiles")
    pictures = open_pictures(root, data or detector.spec.data, detector.image)
    pool = Pool.of(pictures, detector.seen)
    drawn = pool.draws(counts, [seed_of(seed, "labels", k) for k in range(draws)], str(root))
    measured = []
    for k, draw in enumerate(drawn):
        say(f"draw {k + 1} of {draws}: {len(draw.labelled)} labelled and {len(draw.test):,} test pictures")
        measured.append(_measure(engine, pictures, pool.labels, draw, counts, steps, seed_of(seed, "classify", k)))
    kinds = [(count, method) for count in counts for method in METHODS]
    return Classified(
        classes=pool.classes,
        steps=steps,
        tested=tuple(len(draw.test) for draw in drawn),
        majority=float(np.mean([np.bincount(pool.labels[draw.test]).max() / len(draw.test) for draw in drawn])),
        seen=tuple(draw.seen for draw in drawn),
        rows=tuple(Accuracy(*kind, tuple(found[i] for found in measured)) for i, kind in enumerate(kinds)),
        notes=tuple(_notes(engine, pictures, drawn)),
    )


def _measure(
    engine: Engine, pictures: Pictures, labels: Indices, draw: Draw, counts: Sequence[int], steps: int, seed: int
) -> list[float]:
    """Accuracies of one draw: `METHODS` for each count."""
    images, own = pictures.images(draw.labelled), torch.from_numpy(labels[draw.labelled])
    classifiers: list[Classifier] = []
    for count in counts:
        classifiers += _classifiers(engine, images[:count], own[:count], int(labels.max()) + 1, steps, seed)
    right = np.zeros(len(classifiers))
    with torch.inference_mode():
        # All of them see a batch while it is there: reading large pictures takes longer than a small network.
        for indices, batch in pictures.batches(engine.max_batch, draw.test):
            wanted = torch.from_numpy(labels[indices])
            right += [int((one(batch).argmax(1).cpu() == wanted).sum()) for one in classifiers]
    return [float(share) for share in right / len(draw.test)]


def _classifiers(
    engine: Engine, images: Tensor, labels: Tensor, classes: int, steps: int, seed: int
) -> tuple[Classifier, Classifier, Classifier]:
    """Frozen, fine-tuned, scratch, from uint8 images (n, C, H, W) and their classes (n,)."""
    frozen_model = engine.detector.members[0].model.eval()
    codes = _codes(frozen_model, images)
    frozen = Classifier(frozen_model, codes, _regression(codes, labels, classes)).to(engine.device)
    tuned = Classifier(deepcopy(frozen_model), codes, deepcopy(frozen.head)).to(engine.device)
    fresh_model = engine.detector.spec.model.build(frozen_model.picture_shape, seed_of(seed, "weights", 0))
    if frozen_model.backbone is not None and fresh_model.backbone is not None:
        # It stands still in all three: what is compared are encoders of the same features.
        fresh_model.backbone.load_state_dict(frozen_model.backbone.state_dict())
    fresh_model = fresh_model.to(engine.device).eval()
    codes = _codes(fresh_model, images)
    with _global_seed(seed_of(seed, "head", 0)):
        head = nn.Linear(codes.shape[1], classes)
    scratch = Classifier(fresh_model, codes, head).to(engine.device)
    for classifier in (tuned, scratch):
        _train(classifier, images, labels, steps, seed)
    return frozen, tuned, scratch


def _train(classifier: Classifier, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    """AdamW on the cross-entropy, by minibatches that `seed` draws; the encoder's rate is the smaller one."""
    device, generator = classifier.head.weight.device, generator_of(seed, "batches", 0)
    encoder = list(classifier.model.encoder.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": encoder, "lr": _ENCODER_RATE}, {"params": list(classifier.head.parameters()), "lr": _HEAD_RATE}],
        weight_decay=_WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    classifier.train()
    _hold_statistics(classifier)
    with _global_seed(seed_of(seed, "dropout", 0)):
        for _ in range(steps):
            chosen = torch.randperm(len(images), generator=generator)[:_BATCH]
            loss = F.cross_entropy(classifier(images[chosen]), labels[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    classifier.eval()


def _hold_statistics(module: nn.Module) -> None:
    """Keep batch normalisation at the statistics it has; its scale and shift still learn.

    Those of a few labelled pictures would replace what it measured on all that the detector was trained on, and a
    picture's class would hang on its batch mates in training. From scratch they harm outright: with moving statistics
    26% instead of 45% on MNIST with 10 labels, so that the comparison would flatter pre-training (53% and 54%).
    """
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


def _regression(codes: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Multinomial logistic regression on centred and scaled codes (n, D), as the linear layer it is."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = _scaling(codes)
    fitted = LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000)
    fitted.fit(((codes - mean) / scale).double().cpu().numpy(), labels.numpy())
    weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if classes == 2:  # there it says but the log-odds of the second class
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    head = nn.Linear(codes.shape[1], classes)
    head.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return head


def _scaling(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) of codes (n, D), and the root of their latents' mean variance ()."""
    mean = codes.mean(0)
    return mean, (codes - mean).square().mean().sqrt().clamp_min(1e-12)


def _codes(model: AutoEncoder, images: Tensor) -> Tensor:
    """Posterior means (n, D) of uint8 images (n, C, H, W), on the model's device."""
    with torch.no_grad():
        parts = torch.split(images, _BATCH)
        return torch.cat([model.encode(model.view(part)).mu.float() for part in parts])


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """PyTorch's layers and dropout draw from the global generators; seed them for a while and give them back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _notes(engine: Engine, pictures: Pictures, drawn: Sequence[Draw]) -> Iterator[str]:
    if len(engine.detector.members) > 1:
        yield f"the detector holds {len(engine.detector.members)} models; the encoder is that of the first"
    if engine.detector.spec.model.backbone is not None:
        yield "all three see the features of the detector's backbone, which stands still; only the encoder differs"
    if any(draw.seen for draw in drawn):
        most = max(draw.seen for draw in drawn)
        yield (
            f"up to {most:,} test pictures are among those the detector was made from (without their labels), since "
            "too few others remain; on new pictures frozen and fine-tuned may do worse"
        )
    if pictures.unreadable:
        yield f"skipped {len(pictures.unreadable):,} unreadable picture(s)"

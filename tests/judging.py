"""A judge of one-pixel pictures, a clock that tests move, and short ways to queue a picture."""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.batching import Batcher
from service.tickets import Ticket

SOON = 20.0  # seconds until a test that hangs is called broken


@dataclass(frozen=True)
class Columns:
    """What a judge returns: here a picture's score is its only pixel."""

    values: list[int]
    heat: Any
    heat_scale: float = 1.0
    latents: Any = None

    def row(self, index: int) -> dict[str, Any]:
        return {"score": self.values[index]}


class Judge:
    """Scores one-pixel pictures by their value; cannot stand `bad` values; can be held up, and can break for good."""

    def __init__(self, bad: frozenset[int] = frozenset(), open_: bool = True) -> None:
        self.bad = bad
        self.broken = False
        self.batches: list[list[int]] = []
        self.maps: list[bool] = []
        self.threads: set[int] = set()
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        if open_:
            self.gate.set()

    def __call__(self, images: Tensor, heatmaps: bool) -> Columns:
        self.threads.add(threading.get_ident())
        values = images.flatten().tolist()
        self.entered.release()
        assert self.gate.wait(SOON)
        if self.broken or self.bad & set(values):
            raise RuntimeError("cannot judge this")
        self.batches.append(values)
        self.maps.append(heatmaps)
        return Columns(values, np.array(values, np.float32).reshape(-1, 1, 1) if heatmaps else None)


class Clock:
    """A clock the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def picture(value: int) -> Tensor:
    return torch.full((1, 1, 1), value, dtype=torch.uint8)


def made(judge: Any, **options: Any) -> Batcher:
    return Batcher(lambda: (judge, picture(0)), **options)


def put(batcher: Batcher, value: int, **options: Any) -> Ticket:
    heatmap = options.pop("heatmap", False)
    with batcher.reserve(**options) as places:
        return places.submit(picture(value), heatmap=heatmap)


def held_up(judge: Judge, batcher: Batcher) -> Ticket:
    """Get the model busy with picture 1 until `judge.gate` opens."""
    ticket = put(batcher, 1)
    assert judge.entered.acquire(timeout=SOON)
    return ticket


def slowed(judge: Judge, clock: Clock, seconds: float) -> Any:
    """`judge`, for which every batch takes `seconds` of `clock`."""

    def slow(images: Tensor, heatmaps: bool) -> Columns:
        clock.now += seconds
        return judge(images, heatmaps)

    return slow

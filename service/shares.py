"""`Shares`: how the cores of a CPU are divided among batches that are judged at once, and the requests beside them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from service.tickets import Target

if TYPE_CHECKING:
    from torch import device

_REQUEST_SECONDS = 0.0005
"""What taking in a small picture and answering it costs a core."""
_FEW_CORES, _MOST_BATCHES, _TRIED = 4, 4, 4


class Shares:
    """How many `batches` are judged at once, and on how many cores each.

    Threads that share one batch wait for one another at every operation, each time for the one that the system has
    just put off for a request; batches beside one another do not. So each has one core where there are few, and there
    are as many as leave the requests their part. (On two cores even a single picture with nothing beside it takes twice
    as long on both.) A GPU is given one batch at a time.
    """

    def __init__(self, cores: int | None, batches: int | None, on: "device") -> None:
        self._cores, self._wanted = cores or torch.get_num_threads(), batches
        self._on_cpu = on.type == "cpu"
        self.batches, self._each = 1, self._cores

    @contextmanager
    def one(self) -> Iterator[None]:
        """Inside, the models are made as the threads of the batches will use them."""
        if self._on_cpu and self._cores <= _FEW_CORES:
            torch.set_num_threads(1)
        yield

    def settle(self, first: Target) -> None:
        """Divide the cores by how long the first model takes."""
        if not self._on_cpu:
            return
        part = 1.0 / (1.0 + _REQUEST_SECONDS / _seconds(first))
        fitting = min(_MOST_BATCHES, max(1, round(part * self._cores)))
        self.batches = self._wanted or fitting
        self._each = 1 if self._cores <= _FEW_CORES else max(1, (self._cores - 1) // self.batches)

    def take(self) -> None:
        """On each thread that judges: PyTorch knows for each how many cores it may use."""
        if self._on_cpu:
            torch.set_num_threads(self._each)


def _seconds(target: Target) -> float:
    """What a picture in a small batch takes on this thread, the better of two."""
    pictures = target.probe[None].expand(_TRIED, *target.probe.shape).contiguous()
    spent = []
    for _ in range(2):
        started = time.perf_counter()
        target.judge(pictures, False)
        spent.append((time.perf_counter() - started) / _TRIED)
    return max(1e-6, min(spent))

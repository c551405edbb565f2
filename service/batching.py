"""`Batcher`: request threads hand in single pictures; one thread owns the model and judges them in batches.

A request first reserves its places in the queue, so that a refusal costs no decoding. Whenever the model is idle and
a picture waits, a batch is launched at once. Threads sleep on one condition; nothing polls.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from anomaly_vae import AnomalyVaeError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Refusal = Literal["queue_full", "deadline", "draining", "failed"]
Failure = Literal["expired", "cancelled", "unscorable", "failed"]


class Judged(Protocol):
    """The columns a judge returns for a batch; `anomaly_vae.Judgement` is one."""

    @property
    def heat(self) -> "np.ndarray[Any, Any] | None": ...
    @property
    def heat_scale(self) -> float: ...
    def row(self, index: int, /) -> dict[str, Any]: ...


class Judge(Protocol):
    """uint8 (B, C, H, W) and whether heat maps are wanted -> columns of length B."""

    def __call__(self, images: "Tensor", heatmaps: bool, /) -> Judged: ...


class NotAccepted(AnomalyVaeError):
    """There is no place for this request; nothing was decoded or judged. `retry_after` is in seconds."""

    def __init__(self, reason: Refusal, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after


class NotScored(AnomalyVaeError):
    """An accepted picture that has no score: too late, withdrawn, impossible to judge, or the model is lost."""

    def __init__(self, reason: Failure, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Scored:
    """One picture's row, its heat map if asked for, and where its time went (seconds)."""

    row: dict[str, Any]
    heat: "np.ndarray[Any, Any] | None"
    heat_scale: float
    queued_seconds: float
    judge_seconds: float


class Ticket:
    """A picture in the queue; `result` waits for its verdict."""

    __slots__ = ("_batcher", "_done", "_failure", "_scored", "bulk", "deadline", "entered", "heatmap", "image")

    def __init__(
        self, batcher: "Batcher", image: "Tensor", *, heatmap: bool, bulk: bool, deadline: float | None, entered: float
    ) -> None:
        self._batcher = batcher
        self._done = threading.Event()
        self._scored: Scored | None = None
        self._failure: NotScored | None = None
        self.image = image
        self.heatmap = heatmap
        self.bulk = bulk
        self.deadline = deadline
        self.entered = entered

    def result(self) -> Scored:
        """Wait until judged or until the deadline; raises `NotScored`."""
        left = None if self.deadline is None else max(0.0, self.deadline - self._batcher.clock())
        if not self._done.wait(left):
            self._batcher.cancel(self, NotScored("expired"))
            raise NotScored("expired", "the deadline passed before the verdict")
        if self._failure is not None:
            raise self._failure
        assert self._scored is not None
        return self._scored

    @property
    def settled(self) -> bool:
        """Whether `result` need not wait."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Withdraw: its place is free at once if it still waits; if it is being judged, the verdict is dropped."""
        self._batcher.cancel(self, NotScored("cancelled"))

    def settle(self, outcome: Scored | NotScored) -> None:
        """Give the outcome to whoever waits; the first one counts."""
        if self._done.is_set():
            return
        if isinstance(outcome, NotScored):
            self._failure = outcome
        else:
            self._scored = outcome
        self._done.set()


class Reservation:
    """Places in the queue, held while the pictures are decoded; leaving the `with` block gives back unused ones."""

    def __init__(self, batcher: "Batcher", places: int, *, bulk: bool, deadline: float | None) -> None:
        self._batcher = batcher
        self._left = places
        self._bulk = bulk
        self._deadline = deadline

    def submit(self, image: "Tensor", *, heatmap: bool = False) -> Ticket:
        """Queue one uint8 (C, H, W) picture on one of the places."""
        assert self._left > 0, "more pictures than places were reserved"
        ticket = self._batcher.enqueue(image, heatmap=heatmap, bulk=self._bulk, deadline=self._deadline)
        self._left -= 1
        return ticket

    def skip(self) -> None:
        """Give back one place: its picture turned out to be none."""
        self._left -= 1
        self._batcher.give_back(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left, self._left = self._left, 0
        if left > 0:
            self._batcher.give_back(left)


class Batcher:
    """The bounded queue before one judge, which lives on this batcher's own thread from first to last.

    `start` runs there and returns the judge and a probe, a uint8 (C, H, W) picture known to be judged well: when a
    single picture fails, it tells a bad picture from a lost model. `until_started` waits for it. `extra_delay`
    (seconds) waits for a fuller batch, counted from the oldest picture. A bulk picture counts as having come
    `bulk_patience` seconds later than it did: it yields, but never starves.
    """

    def __init__(
        self,
        start: Callable[[], tuple[Judge, "Tensor"]],
        *,
        max_batch: int = 16,
        queue_size: int = 64,
        extra_delay: float = 0.0,
        bulk_patience: float = 0.5,
        on_batch: Callable[[int], None] = lambda _: None,
        on_lost: Callable[[Exception], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._start = start
        self._max_batch = max_batch
        self._queue_size = queue_size
        self._extra_delay = extra_delay
        self._bulk_patience = bulk_patience
        self._on_batch = on_batch
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._interactive: deque[Ticket] = deque()
        self._bulk: deque[Ticket] = deque()
        self._places_taken = 0
        self._running: list[Ticket] = []
        self._batch_seconds = 0.0
        self._draining = False
        self._lost = False
        self._error: Exception | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def until_started(self) -> None:
        """Wait until the first batch can be judged; raises whatever prevented it."""
        self._started.wait()
        if self._error is not None:
            raise self._error

    def reserve(
        self, places: int = 1, *, deadline: float | None = None, bulk: bool = False, beyond: bool = False
    ) -> Reservation:
        """Take `places` in the queue, all or none; `deadline` is on this batcher's clock. Raises `NotAccepted`.

        `beyond`: even where the queue is full, for callers who bound what they have in hand themselves.
        """
        with self._changed:
            if self._lost:
                raise NotAccepted("failed")
            if self._draining:
                raise NotAccepted("draining")
            if not beyond and self._places_taken + places > self._queue_size:
                raise NotAccepted("queue_full", self._wait_for(self._places_taken))
            # An idle model takes anything: a stale, too pessimistic estimate must be able to mend itself.
            idle = not self._running and not self._places_taken
            wait = 0.0 if idle else self._wait_for(self._places_taken + places)
            if deadline is not None and self.clock() + wait >= deadline:
                raise NotAccepted("deadline", wait)
            self._places_taken += places
        return Reservation(self, places, bulk=bulk, deadline=deadline)

    def depth(self) -> int:
        """Pictures that wait, those still being decoded included."""
        return self._places_taken

    def oldest_seconds(self) -> float:
        """How long the picture at the head of the queue has waited."""
        with self._changed:
            heads = [lane[0].entered for lane in (self._interactive, self._bulk) if lane]
        return max(0.0, self.clock() - min(heads)) if heads else 0.0

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new requests, finish the accepted ones; False if that took longer than `timeout` seconds."""
        self.drain()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def drain(self) -> None:
        """Refuse new requests from now on, without waiting for the accepted ones."""
        with self._changed:
            self._draining = True
            self._changed.notify()

    def enqueue(self, image: "Tensor", *, heatmap: bool, bulk: bool, deadline: float | None) -> Ticket:
        """Queue a picture on a reserved place; `Reservation.submit` calls this."""
        ticket = Ticket(self, image, heatmap=heatmap, bulk=bulk, deadline=deadline, entered=self.clock())
        with self._changed:
            if self._lost:
                self._places_taken -= 1
                ticket.settle(NotScored("failed", "the model is lost"))
            else:
                (self._bulk if bulk else self._interactive).append(ticket)
                self._changed.notify()
        return ticket

    def give_back(self, places: int) -> None:
        """Free reserved places that will not be used; `Reservation` calls this."""
        with self._changed:
            self._places_taken -= places
            self._changed.notify()

    def cancel(self, ticket: Ticket, outcome: NotScored) -> None:
        """Settle a ticket early; a waiting one leaves the queue at once."""
        with self._changed:
            lane = self._bulk if ticket.bulk else self._interactive
            if ticket in lane:
                lane.remove(ticket)
                self._places_taken -= 1
                self._changed.notify()
            ticket.settle(outcome)

    def _wait_for(self, places: int) -> float:
        batches = math.ceil(places / self._max_batch) + bool(self._running)
        return batches * self._batch_seconds

    def _work(self) -> None:
        try:
            self._judge, self._probe = self._start()
        except Exception as error:
            self._lost, self._error = True, error
            return
        finally:
            self._started.set()
        try:
            while batch := self._next_batch():
                self._judge_batch(batch)
                with self._changed:
                    self._running = []
        except Exception as error:  # whatever it is, nobody may be left waiting for this thread
            self._lose(error)

    def _next_batch(self) -> list[Ticket]:
        """Sleep until there is something to launch; an empty list means drained or lost."""
        with self._changed:
            while True:
                waiting = len(self._interactive) + len(self._bulk)
                if self._lost or (self._draining and not self._places_taken):
                    return []
                hold = self._hold(waiting) if waiting else None
                if hold is not None and hold <= 0:
                    self._running = self._take()
                    if self._running:
                        return self._running
                else:
                    self._changed.wait(hold)

    def _hold(self, waiting: int) -> float:
        if not self._extra_delay or waiting >= self._max_batch or self._draining:
            return 0.0
        oldest = min(lane[0].entered for lane in (self._interactive, self._bulk) if lane)
        return oldest + self._extra_delay - self.clock()

    def _take(self) -> list[Ticket]:
        """Dequeue up to a batch, dropping the expired; whoever came first goes first, bulk counting as later."""
        now = self.clock()
        taken: list[Ticket] = []
        while len(taken) < self._max_batch and (self._interactive or self._bulk):
            ticket = self._first_lane().popleft()
            self._places_taken -= 1
            if ticket.deadline is not None and ticket.deadline <= now:
                ticket.settle(NotScored("expired", "the deadline passed in the queue"))
            else:
                taken.append(ticket)
        return taken

    def _first_lane(self) -> deque[Ticket]:
        if not self._bulk:
            return self._interactive
        if not self._interactive or self._bulk[0].entered + self._bulk_patience < self._interactive[0].entered:
            return self._bulk
        return self._interactive

    def _judge_batch(self, tickets: list[Ticket]) -> None:
        """Judge and settle; a batch that fails is halved until only the pictures at fault fail."""
        started = self.clock()
        try:
            outcomes = self._outcomes(tickets, started)
        except Exception as error:
            if len(tickets) > 1:
                middle = len(tickets) // 2
                self._judge_batch(tickets[:middle])
                self._judge_batch(tickets[middle:])
            elif not self._lost and self._probe_passes():
                tickets[0].settle(NotScored("unscorable", f"{type(error).__name__}: {error}"))
            elif not self._lost:
                self._lose(error)
            return
        for ticket, outcome in zip(tickets, outcomes, strict=True):
            ticket.settle(outcome)
        self._on_batch(len(tickets))

    def _outcomes(self, tickets: list[Ticket], started: float) -> list[Scored]:
        import torch

        images = torch.stack([ticket.image for ticket in tickets])
        judged = self._judge(images, any(ticket.heatmap for ticket in tickets))
        seconds = self.clock() - started
        with self._changed:
            known = self._batch_seconds
            self._batch_seconds = known + 0.2 * (seconds - known) if known else seconds
        heat, scale = judged.heat, judged.heat_scale
        return [
            Scored(
                row=judged.row(index),
                # A copy, so that one kept map does not keep the whole batch's alive.
                heat=heat[index].copy() if ticket.heatmap and heat is not None else None,
                heat_scale=scale,
                queued_seconds=started - ticket.entered,
                judge_seconds=seconds,
            )
            for index, ticket in enumerate(tickets)
        ]

    def _probe_passes(self) -> bool:
        try:
            self._judge(self._probe[None], False)
        except Exception:
            return False
        return True

    def _lose(self, error: Exception) -> None:
        with self._changed:
            self._lost, self._error = True, error
            waiting = [*self._interactive, *self._bulk]
            self._interactive.clear()
            self._bulk.clear()
            self._places_taken -= len(waiting)
        self._settle_lost([*self._running, *waiting])
        self._on_lost(error)

    @staticmethod
    def _settle_lost(tickets: list[Ticket]) -> None:
        for ticket in tickets:
            ticket.settle(NotScored("failed", "the model is lost"))

"""`Batcher`: request threads hand in single pictures; one thread owns the model and judges them in batches.

A request first reserves its places in the queue, so that a refusal costs no decoding. Whenever the model is idle and
a picture waits, a batch is launched at once. Threads sleep on one condition; nothing polls.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from service.tickets import Also, Judge, NotAccepted, NotScored, Reservation, Scored, Target, Ticket

if TYPE_CHECKING:
    from torch import Tensor


class _Call:
    """Work for the models' thread that is no batch."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work, self.done = work, threading.Event()
        self.error: Exception | None = None


class Batcher:
    """The bounded queue before one device, whose models live on this batcher's own thread.

    `start` runs there and returns the first model (see `Target`); `until_started` waits for it. A batch is for one
    model: that of the picture that came first. `extra_delay` (seconds) waits for a fuller batch, counted from the
    oldest picture. A bulk picture counts as having come `bulk_patience` seconds later than it did: it yields, but never
    starves.
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
        self._calls: deque[_Call] = deque()
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

    def run(self, work: Callable[[], None]) -> None:
        """Do something on the models' thread, between two batches; raises what it raises, or `NotAccepted`."""
        call = _Call(work)
        with self._changed:
            if self._lost or self._draining:
                raise NotAccepted("failed" if self._lost else "draining")
            self._calls.append(call)
            self._changed.notify()
        call.done.wait()
        if call.error is not None:
            raise call.error

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

    def enqueue(
        self,
        image: "Tensor",
        target: Target | None,
        *,
        heatmap: bool,
        bulk: bool,
        deadline: float | None,
        also: Also | None = None,
    ) -> Ticket:
        """Queue a picture on a reserved place; `Reservation.submit` calls this."""
        ticket = Ticket(self, image, target, heatmap=heatmap, bulk=bulk, deadline=deadline, entered=self.clock())
        ticket.also = also
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
            self._first = Target(*self._start())
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
                del batch  # or it would keep its model in memory until the next one comes
        except Exception as error:  # whatever it is, nobody may be left waiting for this thread
            self._lose(error)

    def _next_batch(self) -> list[Ticket]:
        """Sleep until there is something to launch; an empty list means drained or lost."""
        with self._changed:
            while True:
                waiting = len(self._interactive) + len(self._bulk)
                if self._calls:
                    self._make(self._calls.popleft())
                    continue
                if self._lost or (self._draining and not self._places_taken):
                    return []
                hold = self._hold(waiting) if waiting else None
                if hold is not None and hold <= 0:
                    self._running = self._take()
                    if self._running:
                        return self._running
                else:
                    self._changed.wait(hold)

    def _make(self, call: "_Call") -> None:
        # Meanwhile requests go on to queue.
        self._changed.release()
        try:
            call.work()
        except Exception as error:  # it is for whoever called
            call.error = error
        finally:
            self._changed.acquire()
            call.done.set()

    def _hold(self, waiting: int) -> float:
        if not self._extra_delay or waiting >= self._max_batch or self._draining:
            return 0.0
        oldest = min(lane[0].entered for lane in (self._interactive, self._bulk) if lane)
        return oldest + self._extra_delay - self.clock()

    def _take(self) -> list[Ticket]:
        """Dequeue up to a batch for one model, dropping the expired; whoever came first goes first, bulk counting as
        later. Pictures for other models keep their places."""
        now = self.clock()
        taken: list[Ticket] = []
        passed: list[Ticket] = []
        while len(taken) < self._max_batch and (self._interactive or self._bulk):
            ticket = self._first_lane().popleft()
            if ticket.deadline is not None and ticket.deadline <= now:
                self._places_taken -= 1
                ticket.settle(NotScored("expired", "the deadline passed in the queue"))
            elif taken and self._target(ticket) is not self._target(taken[0]):
                passed.append(ticket)
            else:
                self._places_taken -= 1
                taken.append(ticket)
        for ticket in reversed(passed):
            (self._bulk if ticket.bulk else self._interactive).appendleft(ticket)
        return taken

    def _target(self, ticket: Ticket) -> Target:
        return ticket.target or self._first

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
            elif not self._lost and _probe_passes(self._target(tickets[0])):
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
        judged = self._target(tickets[0]).judge(images, any(ticket.heatmap for ticket in tickets))
        seconds = self.clock() - started
        with self._changed:
            known = self._batch_seconds
            self._batch_seconds = known + 0.2 * (seconds - known) if known else seconds
        heat, scale = judged.heat, judged.heat_scale
        rows = [judged.row(index) for index in range(len(tickets))]
        return [
            Scored(
                row=rows[index],
                # A copy, so that one kept map does not keep the whole batch's alive.
                heat=heat[index].copy() if ticket.heatmap and heat is not None else None,
                heat_scale=scale,
                also=None if ticket.also is None else ticket.also(ticket.image, rows[index]),
                queued_seconds=started - ticket.entered,
                judge_seconds=seconds,
            )
            for index, ticket in enumerate(tickets)
        ]

    def _lose(self, error: Exception) -> None:
        with self._changed:
            self._lost, self._error = True, error
            for call in self._calls:
                call.error = NotAccepted("failed")
                call.done.set()
            self._calls.clear()
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


def _probe_passes(target: Target) -> bool:
    try:
        target.judge(target.probe[None], False)
    except Exception:
        return False
    return True

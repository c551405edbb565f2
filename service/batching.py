"""`Batcher`: requests hand in single pictures; the models' own threads judge them in batches.

A request first reserves its places in the queue, so that a refusal costs no decoding. Whenever a thread is idle and a
picture waits, a batch is launched at once. Threads sleep on one condition; nothing polls.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from service.tickets import Also, Judge, NotAccepted, NotScored, Reservation, Scored, Target, Ticket

if TYPE_CHECKING:
    from torch import Tensor


class _Call:
    """Work for the models' first thread that is no batch."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work, self.done = work, threading.Event()
        self.error: Exception | None = None


class Batcher:
    """The bounded queue before one device, whose models live on this batcher's own threads.

    `start` runs on the first of them and returns the first model (see `Target`); `until_started` waits for it. A batch
    is for one model: that of the picture that came first. `extra_delay` (seconds) waits for a fuller batch, counted
    from the oldest picture. A bulk picture counts as having come `bulk_patience` seconds later than it did: it yields,
    but never starves. `threads`, asked once `start` is done, says how many batches are judged at once; each of these
    threads calls `began` before its first.
    """

    def __init__(
        self,
        start: Callable[[], tuple[Judge, "Tensor"]],
        *,
        max_batch: int = 16,
        queue_size: int = 64,
        extra_delay: float = 0.0,
        bulk_patience: float = 0.5,
        threads: Callable[[], int] = lambda: 1,
        began: Callable[[], None] = lambda: None,
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
        self._began = began
        self._on_batch = on_batch
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._interactive: deque[Ticket] = deque()
        self._bulk: deque[Ticket] = deque()
        self._places_taken = 0
        self._running: dict[int, list[Ticket]] = {}
        self._calls: deque[_Call] = deque()
        self._batch_seconds = 0.0
        self._draining = False
        self._lost = False
        self._error: Exception | None = None
        self._started = threading.Event()
        self._at_once = threads
        self._threads: list[threading.Thread] = []
        self._add_thread(self._begin)

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
        """Do something on the models' first thread, between two of its batches; raises what it raises, or
        `NotAccepted`."""
        call = _Call(work)
        with self._changed:
            if self._lost or self._draining:
                raise NotAccepted("failed" if self._lost else "draining")
            self._calls.append(call)
            self._changed.notify_all()
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
        until = None if timeout is None else time.monotonic() + timeout
        self.drain()
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def drain(self) -> None:
        """Refuse new requests from now on, without waiting for the accepted ones."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def enqueue(
        self,
        image: "Tensor",
        target: Target | None,
        *,
        heatmap: bool,
        bulk: bool,
        deadline: float | None,
        also: Also | None = None,
        wake: Callable[[], None] | None = None,
    ) -> Ticket:
        """Queue a picture on a reserved place; `Reservation.submit` calls this."""
        ticket = Ticket(self, image, target, heatmap=heatmap, bulk=bulk, deadline=deadline, entered=self.clock())
        ticket.also, ticket.wake = also, wake
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
            self._changed.notify_all()

    def cancel(self, ticket: Ticket, outcome: NotScored) -> None:
        """Settle a ticket early; a waiting one leaves the queue at once."""
        with self._changed:
            lane = self._bulk if ticket.bulk else self._interactive
            if ticket in lane:
                lane.remove(ticket)
                self._places_taken -= 1
                self._changed.notify_all()
            ticket.settle(outcome)

    def _wait_for(self, places: int) -> float:
        batches = math.ceil(places / self._max_batch) + len(self._running)
        return batches * self._batch_seconds / len(self._threads)

    def _add_thread(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=f"model-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _begin(self) -> None:
        try:
            self._first = Target(*self._start())
            for number in range(1, self._at_once()):
                self._add_thread(partial(self._work, number))
        except Exception as error:
            self._lost, self._error = True, error
            return
        finally:
            self._started.set()
        self._work(0)

    def _work(self, number: int) -> None:
        try:
            self._began()
            while batch := self._next_batch(number):
                self._judge_batch(batch)
                with self._changed:
                    del self._running[number]
                    if self._draining:
                        self._changed.notify_all()
                del batch  # or it would keep its model in memory until the next one comes
        except Exception as error:  # whatever it is, nobody may be left waiting for these threads
            self._lose(error)

    def _next_batch(self, number: int) -> list[Ticket]:
        """Sleep until there is something for this thread to launch; an empty list means drained or lost."""
        with self._changed:
            while True:
                waiting = len(self._interactive) + len(self._bulk)
                if self._calls and number == 0:
                    self._make(self._calls.popleft())
                    continue
                if self._lost or (self._draining and not self._places_taken):
                    return []
                hold = self._hold(waiting) if waiting else None
                if hold is not None and hold <= 0:
                    if taken := self._take():
                        self._running[number] = taken
                        return taken
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
        later. Pictures for other models keep their places, and other idle threads get their share."""
        now = self.clock()
        idle = len(self._threads) - len(self._running)
        size = min(self._max_batch, -(-(len(self._interactive) + len(self._bulk)) // idle))
        taken: list[Ticket] = []
        passed: list[Ticket] = []
        while len(taken) < size and (self._interactive or self._bulk):
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
        latents = [()] * len(tickets) if judged.latents is None else [tuple(one) for one in judged.latents.tolist()]
        return [
            Scored(
                row=rows[index],
                # A copy, so that one kept map does not keep the whole batch's alive.
                heat=heat[index].copy() if ticket.heatmap and heat is not None else None,
                heat_scale=scale,
                also=None if ticket.also is None else ticket.also(ticket.image, rows[index]),
                queued_seconds=started - ticket.entered,
                judge_seconds=seconds,
                latents=latents[index],
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
        running = [ticket for batch in self._running.values() for ticket in batch]
        self._settle_lost([*running, *waiting])
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

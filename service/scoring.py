"""From uploads to verdicts: reserve, decode, judge by the queue's model, keep; each picture fails on its own."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from anomaly_vae import BadImage, pick_device, regions_json
from service.archives import Entry, too_late
from service.batching import Batcher
from service.drawing import Style, heat_png, pictures
from service.errors import Problem
from service.keeping import Keeper
from service.metrics import Metrics
from service.models import Models
from service.options import Options
from service.refusals import failed, late, refused
from service.served import Served
from service.settings import ServiceSettings
from service.shares import Shares
from service.tickets import NotAccepted, NotScored, Reservation, Scored, Target, Ticket
from service.uploads import Upload

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
_BAD_IMAGE_STATUS = {
    "empty": HTTPStatus.BAD_REQUEST,
    "too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "too_many_pixels": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "unsupported_format": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
}


@dataclass(frozen=True)
class Asked:
    """A request to score: by which version of which model, until when (`time.monotonic()`), what is wanted, and whose
    it is."""

    served: Served
    deadline: float
    options: Options
    request_id: str
    source: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A picture's row as the request wants it, the id it is kept under, and the PNGs asked for, by name."""

    id: str
    row: dict[str, Any]
    pictures: dict[str, bytes | None]


class Scorer:
    """All models behind one queue; `score` may be called from any number of threads.

    `start` is called on the first of the threads that will own the models. Little of them may run elsewhere: every
    thread that computes has OpenMP threads of its own, and with more of them than cores every batch takes twice as
    long. See `Shares` for how many batches are judged at once.
    """

    def __init__(
        self,
        models: Models,
        start: Callable[[], Target],
        settings: ServiceSettings,
        metrics: Metrics,
        keeper: Keeper,
        on_lost: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self.models = models
        self._start_models, self._settings = start, settings
        self._metrics, self._keeper = metrics, keeper
        self._shares = Shares(settings.compute_threads, settings.batches_at_once, pick_device(settings.device))
        self._decoders = threading.BoundedSemaphore(settings.threads_for_decoding())
        self._batcher = Batcher(
            self._start,
            max_batch=settings.max_batch,
            queue_size=settings.queue_size,
            extra_delay=settings.extra_delay_ms / 1000,
            bulk_patience=settings.bulk_patience_ms / 1000,
            threads=lambda: self._shares.batches,
            began=self._shares.take,
            on_batch=metrics.batch,
            on_lost=on_lost,
        )
        self._batcher.until_started()
        models.started(self._batcher.run)
        metrics.watch_queue(self._batcher.depth, self._batcher.oldest_seconds)

    def _start(self) -> Target:
        with self._shares.one():
            first = self._start_models()
        self._shares.settle(first)
        return first

    def score(self, files: Sequence[Upload], asked: Asked) -> list[Verdict | Problem]:
        """One outcome a file, in order; raises `Problem` if all are refused.

        Several files share the bulk lane, so that a large request does not delay the single pictures of others.
        """
        tickets: list[Ticket | Problem] = []
        try:
            with self._places(len(files), asked) as places:
                for file in files:  # one by one: what is queued when a later one fails must be known
                    tickets.append(self._submit(places, file, asked))  # noqa: PERF401
            return [self._outcome(ticket, file, asked) for ticket, file in zip(tickets, files, strict=True)]
        except BaseException:
            for ticket in tickets:
                if isinstance(ticket, Ticket):
                    ticket.cancel()
            raise

    def begin(self, file: Upload, asked: Asked, wake: Callable[[], None]) -> Ticket:
        """Have one picture judged without waiting for it; `wake` is called when `finish` need not wait. Raises
        `Problem`."""
        with self._places(1, asked) as place:
            ticket = self._submit(place, file, asked, wake)
        if isinstance(ticket, Problem):
            raise ticket
        return ticket

    def finish(self, ticket: Ticket, file: Upload, asked: Asked) -> Verdict:
        """The outcome of what was begun; raises `Problem`."""
        outcome = self._outcome(ticket, file, asked)
        if isinstance(outcome, Problem):
            raise outcome
        return outcome

    def score_in_turn(
        self, entries: Iterable[Entry], asked: Asked
    ) -> Generator[tuple[str, Verdict | Problem], None, None]:
        """Name and outcome of each entry in order, while later ones are still being read.

        Where they cannot go on, the `Problem` is raised after the outcomes of what was accepted before. No more
        pictures wait at once than the settings allow, of no more bytes than a request may have.
        """
        in_hand: deque[tuple[Entry, Ticket | Problem]] = deque()
        end: Problem | None = None
        try:
            try:
                for entry in entries:
                    in_hand.append((entry, self._accepted(entry, asked)))
                    while in_hand and self._is_due(in_hand):
                        yield self._finished(in_hand.popleft(), asked)
            except Problem as problem:
                end = problem
            while in_hand:
                yield self._finished(in_hand.popleft(), asked)
            if end is not None:
                raise end
        finally:
            for _, ticket in in_hand:
                if isinstance(ticket, Ticket):
                    ticket.cancel()

    def heatmap(self, served: Served, image: "Tensor", png: bytes, style: Style, deadline: float) -> bytes:
        """PNG of the heat map of a uint8 (C, H, W) picture, kept as `png`, that the model has seen before; raises
        `Problem`."""
        return heat_png(style, *self._looked_at(served, image, deadline), served.detector.image, png)

    def regions(self, served: Served, image: "Tensor", png: bytes, deadline: float) -> list[dict[str, Any]]:
        """What is hot in such a picture, in pixels of `png`, which shows it; raises `Problem`."""
        scored, _ = self._looked_at(served, image, deadline)
        assert scored.heat is not None
        return regions_json(scored.heat, served.detector.image, png)

    def _looked_at(self, served: Served, image: "Tensor", deadline: float) -> tuple[Scored, Ticket]:
        try:
            with self._batcher.reserve(1, deadline=deadline) as place:
                ticket = place.submit(image, served.target, heatmap=True)
            scored = ticket.result()
        except NotAccepted as refusal:
            raise refused(refusal) from None
        except NotScored as failure:
            raise failed(failure) from None
        return scored, ticket

    def verdicts(self) -> int:
        """How many pictures this process has scored."""
        return self._metrics.verdicts()

    def drain(self) -> None:
        """Refuse new requests; the accepted ones go on."""
        self._batcher.drain()

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait for the accepted ones; False if `timeout` seconds were too few."""
        return self._batcher.close(timeout)

    def _accepted(self, entry: Entry, asked: Asked) -> Ticket | Problem:
        if isinstance(entry.content, Problem):
            self._metrics.rejected("bad_image")
            return entry.content
        with self._places(1, asked, in_turn=True) as place:
            return self._submit(place, Upload(entry.name, entry.content), asked)

    def _is_due(self, in_hand: deque[tuple[Entry, Ticket | Problem]]) -> bool:
        """Whether the first outcome is there already, or must be waited for before more is read."""
        first = in_hand[0][1]
        if isinstance(first, Problem) or first.settled or len(in_hand) >= self._settings.pictures_in_hand():
            return True
        held = sum(len(entry.content) for entry, _ in in_hand if isinstance(entry.content, bytes))
        return held >= self._settings.max_request_bytes

    def _finished(self, taken: tuple[Entry, Ticket | Problem], asked: Asked) -> tuple[str, Verdict | Problem]:
        entry, ticket = taken
        data = entry.content if isinstance(entry.content, bytes) else b""
        return entry.name, self._outcome(ticket, Upload(entry.name, data), asked)

    def _places(self, count: int, asked: Asked, in_turn: bool = False) -> Reservation:
        bulk = in_turn or count > 1
        try:
            return self._batcher.reserve(count, deadline=asked.deadline, bulk=bulk, beyond=in_turn)
        except NotAccepted as refusal:
            self._metrics.rejected(refusal.reason, count)
            raise too_late() if in_turn and refusal.reason == "deadline" else refused(refusal) from None

    def _submit(
        self, places: Reservation, file: Upload, asked: Asked, wake: Callable[[], None] | None = None
    ) -> Ticket | Problem:
        served = asked.served
        try:
            image = self._timed("decode", asked.deadline, lambda: served.prepare(file.data))
        except BadImage as error:
            places.skip()
            self._metrics.rejected("bad_image")
            status = _BAD_IMAGE_STATUS.get(error.code, HTTPStatus.UNPROCESSABLE_ENTITY)
            return Problem(status, error.code, str(error))
        except Problem as problem:
            places.skip()
            return problem
        options = asked.options
        also = options.also(served.own)
        return places.submit(image, served.target, heatmap=options.heat != "none", also=also, wake=wake)

    def _outcome(self, ticket: Ticket | Problem, file: Upload, asked: Asked) -> Verdict | Problem:
        if isinstance(ticket, Problem):
            return ticket
        # As it stands now, not when the request came: a policy may have changed meanwhile.
        served, options = self.models.current(asked.served), asked.options
        try:
            scored = ticket.result()
            row = served.policy.applied(_plain(scored.row), served.detector)
            spec, more, drawn = served.detector.image, {}, {}
            if scored.heat is not None:
                more["regions"] = regions_json(scored.heat, spec, file.data)
            if options.explain:
                more["explanation"] = scored.also["explanation"]
            if options.draws:
                work = partial(pictures, options, scored, ticket, spec, file.data)
                drawn = self._timed("draw", asked.deadline, work)
        except NotScored as failure:
            self._metrics.rejected("deadline" if failure.reason == "expired" else failure.reason)
            return failed(failure)
        except Problem as problem:
            return problem
        self._metrics.stage("queue", scored.queued_seconds)
        self._metrics.stage("judge", scored.judge_seconds)
        self._metrics.verdict(served.name, served.version, row["p_value"], row["outlier"], asked.source)
        number = self._keeper.keep(served, row, ticket.image, file, asked.request_id, asked.source, scored.latents)
        return Verdict(number, options.applied({**row, **more}, served.detector), drawn)

    def _timed(self, stage: str, deadline: float, work: Callable[[], _T]) -> _T:
        """Do CPU work of a request thread, no more of it at once than there are cores."""
        if not self._decoders.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self._metrics.rejected("deadline")
            raise late("the deadline passed before the picture was decoded")
        started = time.monotonic()
        try:
            return work()
        finally:
            self._decoders.release()
            self._metrics.stage(stage, time.monotonic() - started)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """The row as JSON can say it; raises `NotScored` for a score that is no number."""
    if not math.isfinite(row["score"]):
        raise NotScored("unscorable", f"the model's score is {row['score']}")
    parts = {name: value if math.isfinite(value) else None for name, value in row["parts"].items()}
    return {**row, "parts": parts}

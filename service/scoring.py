"""`Scorer`: files in, verdicts out, without a word of HTTP: places in the queue, decoding, the model, the counting."""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from anomaly_vae import BadImage, Engine, heatmap_png, regions_json
from service.batching import Batcher, Judge, NotAccepted, NotScored, Reservation, Scored, Ticket
from service.errors import Problem
from service.metrics import Metrics
from service.options import Options
from service.settings import ServiceSettings
from service.uploads import Upload

if TYPE_CHECKING:
    from torch import Tensor

    from anomaly_vae import Detector

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_BAD_IMAGE_STATUS = {
    "empty": HTTPStatus.BAD_REQUEST,
    "too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "too_many_pixels": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "unsupported_format": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
}


@dataclass(frozen=True)
class Verdict:
    """One picture's row as the library gives it, and its heat map as PNG where asked for."""

    row: dict[str, Any]
    heatmap: bytes | None


class Scorer:
    """One model behind its queue; `score` may be called from any number of threads.

    `load` is called on the thread that will own the model. Nothing of it may run elsewhere: a second thread that
    computes has OpenMP threads of its own, and with more of them than cores every batch takes twice as long.
    """

    def __init__(
        self,
        load: Callable[[], "Detector"],
        name: str,
        settings: ServiceSettings,
        metrics: Metrics,
        on_lost: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self.name = name
        self._load, self._settings = load, settings
        self._metrics = metrics
        self._decoders = threading.BoundedSemaphore(settings.threads_for_decoding())
        self._batcher = Batcher(
            self._start,
            max_batch=settings.max_batch,
            queue_size=settings.queue_size,
            extra_delay=settings.extra_delay_ms / 1000,
            bulk_patience=settings.bulk_patience_ms / 1000,
            on_batch=metrics.batch,
            on_lost=on_lost,
        )
        self._batcher.until_started()
        metrics.announce_model(name, self.detector.version, self.detector.policy.expected_false_alarm_rate)
        metrics.watch_queue(self._batcher.depth, self._batcher.oldest_seconds)

    def _start(self) -> tuple[Judge, "Tensor"]:
        import torch

        if self._settings.compute_threads is not None:
            torch.set_num_threads(self._settings.compute_threads)
        settings = self._settings
        engine = Engine(self._load(), settings.device, settings.max_batch, settings.precision)
        if engine.remark:
            _log.warning("%s", engine.remark)
        engine.warm()
        self.detector, self._prepare = engine.detector, engine.prepare
        image = engine.detector.image
        return engine.judge, torch.zeros((image.channels, image.height, image.width), dtype=torch.uint8)

    def score(
        self, files: Sequence[Upload], *, deadline: float, options: Options, source: str | None = None
    ) -> list[Verdict | Problem]:
        """One outcome a file, in order; raises `Problem` if all are refused.

        `deadline` is a `time.monotonic()`, `source` what the pictures are counted under.

        Several files share the bulk lane, so that a large request does not delay the single pictures of others.
        """
        tickets: list[Ticket | Problem] = []
        try:
            with self._places(len(files), deadline) as places:
                for file in files:  # one by one: what is queued when a later one fails must be known
                    tickets.append(self._submit(places, file.data, deadline, options.heat != "none"))  # noqa: PERF401
            pairs = zip(tickets, files, strict=True)
            return [self._outcome(ticket, file.data, deadline, options, source) for ticket, file in pairs]
        except BaseException:
            for ticket in tickets:
                if isinstance(ticket, Ticket):
                    ticket.cancel()
            raise

    def verdicts(self) -> int:
        """How many pictures this process has scored."""
        return self._metrics.verdicts()

    def drain(self) -> None:
        """Refuse new requests; the accepted ones go on."""
        self._batcher.drain()

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait for the accepted ones; False if `timeout` seconds were too few."""
        return self._batcher.close(timeout)

    def _places(self, count: int, deadline: float) -> Reservation:
        try:
            return self._batcher.reserve(count, deadline=deadline, bulk=count > 1)
        except NotAccepted as refusal:
            self._metrics.rejected(refusal.reason, count)
            raise _refused(refusal) from None

    def _submit(self, places: Reservation, data: bytes, deadline: float, heatmap: bool) -> Ticket | Problem:
        try:
            image = self._timed("decode", deadline, lambda: self._prepare(data))
        except BadImage as error:
            places.skip()
            self._metrics.rejected("bad_image")
            status = _BAD_IMAGE_STATUS.get(error.code, HTTPStatus.UNPROCESSABLE_ENTITY)
            return Problem(status, error.code, str(error))
        except Problem as late:
            places.skip()
            return late
        return places.submit(image, heatmap=heatmap)

    def _outcome(
        self, ticket: Ticket | Problem, data: bytes, deadline: float, options: Options, source: str | None
    ) -> Verdict | Problem:
        if isinstance(ticket, Problem):
            return ticket
        try:
            scored = ticket.result()
            row = _plain(scored.row)
            drawn = None
            if scored.heat is not None:
                row["regions"] = regions_json(scored.heat, self.detector.image, data)
                drawn = self._timed("draw", deadline, lambda: _drawn(scored, ticket)) if options.heat == "png" else None
        except NotScored as failure:
            self._metrics.rejected("deadline" if failure.reason == "expired" else failure.reason)
            return _failed(failure)
        except Problem as late:
            return late
        self._metrics.stage("queue", scored.queued_seconds)
        self._metrics.stage("judge", scored.judge_seconds)
        self._metrics.verdict(row["p_value"], row["outlier"], source)
        return Verdict(options.applied(row, self.detector), drawn)

    def _timed(self, stage: str, deadline: float, work: Callable[[], _T]) -> _T:
        """Do CPU work of a request thread, no more of it at once than there are cores."""
        if not self._decoders.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self._metrics.rejected("deadline")
            raise _late("the deadline passed before the picture was decoded")
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


def _drawn(scored: Scored, ticket: Ticket) -> bytes:
    assert scored.heat is not None
    return heatmap_png(scored.heat, scored.heat_scale, ticket.image.numpy())


def _late(message: str) -> Problem:
    return Problem(HTTPStatus.GATEWAY_TIMEOUT, "deadline_exceeded", message)


def _refused(refusal: NotAccepted) -> Problem:
    wait = refusal.retry_after
    if refusal.reason == "queue_full":
        message = "the queue is full; try again after the time in Retry-After"
        return Problem(HTTPStatus.TOO_MANY_REQUESTS, "queue_full", message, retry_after=wait)
    if refusal.reason == "deadline":
        message = f"the deadline is nearer than the queue is long ({wait * 1000:.0f} ms); try again later or allow more"
        return Problem(HTTPStatus.TOO_MANY_REQUESTS, "deadline_too_short", message, retry_after=wait)
    if refusal.reason == "draining":
        message = "this process is shutting down; send the request again to reach another"
        return Problem(HTTPStatus.SERVICE_UNAVAILABLE, "draining", message, retry_after=1.0)
    return _lost()


def _failed(failure: NotScored) -> Problem:
    if failure.reason == "expired":
        return _late(failure.detail)
    if failure.reason == "unscorable":
        _log.warning("a picture could not be judged: %s", failure.detail)
        message = "the model could not judge this picture, which it did for others; check or re-export it"
        return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "unscorable", message)
    return _lost()


def _lost() -> Problem:
    message = "the model stopped working and its process restarts; try again in a moment"
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, "model_failed", message, retry_after=5.0)

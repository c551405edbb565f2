"""What a client is told when its picture got no place in the queue, or no verdict."""

import logging
from http import HTTPStatus

from service.errors import Problem
from service.tickets import NotAccepted, NotScored

_log = logging.getLogger(__name__)


def late(message: str) -> Problem:
    return Problem(HTTPStatus.GATEWAY_TIMEOUT, "deadline_exceeded", message)


def refused(refusal: NotAccepted) -> Problem:
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


def failed(failure: NotScored) -> Problem:
    if failure.reason == "expired":
        return late(failure.detail)
    if failure.reason == "unscorable":
        _log.warning("a picture could not be judged: %s", failure.detail)
        message = "the model could not judge this picture, which it did for others; check or re-export it"
        return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "unscorable", message)
    return _lost()


def _lost() -> Problem:
    message = "the model stopped working and its process restarts; try again in a moment"
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, "model_failed", message, retry_after=5.0)

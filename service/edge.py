"""What holds for every request: its id, its key, its metrics, its headers, and no error in any shape but JSON."""

import logging
import math
import time
import uuid
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, g, request
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException

from service.access import guard, guard_pages
from service.allowance import Allowance
from service.bodies import answer
from service.database import reason_of
from service.errors import Problem
from service.keys import Key, Keyring
from service.logs import REQUESTS, told
from service.metrics import Metrics
from service.sessions import Sessions
from service.uploads import discard_body

_log, _requests = logging.getLogger(__name__), logging.getLogger(REQUESTS)
_REASONS = {
    HTTPStatus.BAD_REQUEST: "bad_request",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "bad_request",
    HTTPStatus.UNAUTHORIZED: "no_access",
    HTTPStatus.FORBIDDEN: "no_access",
}
_REASONS_BY_CODE = {"too_large": "too_large", "rate_limited": "rate_limited", "too_many_bytes": "rate_limited"}
"""Under which reason the refusal of a whole request is counted; the queue's own are counted where they are made."""


HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Of every answer, unless its route knows better."""
TLS_HEADERS = {"Strict-Transport-Security": "max-age=31536000"}


def install(
    app: Flask,
    metrics: Metrics,
    keyring: Keyring | None,
    most_bytes: int,
    allowance: Allowance,
    local: bool = False,
    sessions: Sessions | None = None,
) -> None:
    """Number, time and count every request of `app`, ask for its key where there is a keyring, and let no error leave
    it in any other shape than JSON. Without a keyring pages of other sites are kept out; see `guard_pages` for `local`.
    `sessions`: who is signed in needs no key.
    """

    @app.before_request
    def begin() -> None:
        g.started = time.monotonic()
        g.request_id = request_id_of(request.headers.get("X-Request-Id", ""))

    if keyring is None:
        guard_pages(app, local)
    guard(app, keyring, most_bytes, allowance, sessions)

    @app.after_request
    def end(response: Response) -> Response:
        if request.method == "GET" and response.mimetype == "application/json" and response.status_code == 200:
            # Who asks every few seconds is told so when nothing has changed.
            response.add_etag(weak=True)
            response.make_conditional(request)
        route = request.url_rule.rule if request.url_rule else "unmatched"
        seconds = time.monotonic() - g.started
        size, key = request.content_length, g.get("key")
        log_request(metrics, g.request_id, request.method, route, response.status_code, seconds, size, key)
        response.headers["X-Request-Id"] = g.request_id
        for header, value in HEADERS.items() if not request.is_secure else [*HEADERS.items(), *TLS_HEADERS.items()]:
            response.headers.setdefault(header, value)
        return response

    _answer_errors(app, metrics)


def _answer_errors(app: Flask, metrics: Metrics) -> None:
    @app.errorhandler(Problem)
    def refuse(problem: Problem) -> Response:
        count_refusal(metrics, problem)
        discard_body(request.environ)
        return failure(problem)

    @app.errorhandler(SQLAlchemyError)
    def store_down(error: SQLAlchemyError) -> Response:
        _log.error("the store failed a request: %s", reason_of(error), extra=told(request_id=g.request_id))
        message = "the store does not answer now; scoring goes on, and /ready says how the store stands"
        return failure(Problem(HTTPStatus.SERVICE_UNAVAILABLE, "store_down", message, retry_after=5.0))

    @app.errorhandler(HTTPException)
    def refuse_plain(error: HTTPException) -> Response:
        status = HTTPStatus(error.code or HTTPStatus.INTERNAL_SERVER_ERROR)
        response = failure(Problem(status, status.name.lower(), _said(error, status)))
        for name, value in error.get_headers(request.environ):
            if name == "Allow":
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def break_down(error: Exception) -> Response:
        return failure(broken(error, g.request_id))


def broken(error: Exception, request_id: str) -> Problem:
    """What a client is told of a fault of the service, which is logged."""
    _log.error("a request failed", exc_info=error, extra=told(request_id=request_id))
    message = "a fault of the service, not of the request; its log has the details under this request id"
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", message)


def count_refusal(metrics: Metrics, problem: Problem) -> None:
    """Count a request that is refused whole; what the queue refuses is counted where that is done."""
    reason = _REASONS_BY_CODE.get(problem.code) or _REASONS.get(problem.status)
    if reason:
        metrics.rejected(reason)


def log_request(
    metrics: Metrics, request_id: str, method: str, route: str, status: int, seconds: float, size: int | None,
    key: Key | None,
) -> None:  # fmt: skip
    """Count an answered request, and write it down where that is asked for."""
    metrics.request(route, method, status, seconds)
    if _requests.isEnabledFor(logging.INFO):
        fields = told(
            request_id=request_id,
            method=method,
            route=route,
            status=status,
            milliseconds=round(seconds * 1000, 1),
            bytes=size,
            key=key.name if key else None,
        )
        _requests.info("answered", extra=fields)


def failure(problem: Problem, results: Sequence[dict[str, Any]] = ()) -> Response:
    """The answer to what is refused, or failed."""
    body = failure_body(problem, g.request_id)
    if len(results) > 1:
        body["results"] = results
    response = answer(body, problem.status)
    response.headers.update(failure_headers(problem))
    return response


def failure_body(problem: Problem, request_id: str) -> dict[str, Any]:
    """The JSON of such an answer."""
    return {"error": {**problem.body(), "request_id": request_id}}


def failure_headers(problem: Problem) -> dict[str, str]:
    """When to come again, where that may help, and how to ask at all."""
    found = {}
    if problem.retry_after is not None:
        found["Retry-After"] = str(max(1, math.ceil(problem.retry_after)))
    if problem.status == HTTPStatus.UNAUTHORIZED:
        found["WWW-Authenticate"] = "Bearer"
    return found


def request_id_of(given: str) -> str:
    """The caller's own id where it is harmless, so that logs on both sides agree; else a new one."""
    if 1 <= len(given) <= 64 and given.isascii() and given.replace("-", "").replace("_", "").replace(".", "").isalnum():
        return given
    return uuid.uuid4().hex


def _said(error: HTTPException, status: HTTPStatus) -> str:
    if status == HTTPStatus.NOT_FOUND:
        return "there is nothing at this address; GET / lists what there is"
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(sorted(getattr(error, "valid_methods", None) or ()))
        return f"{request.method[:20]} is not served here; use {allowed}"
    return (error.description or status.phrase).splitlines()[0]

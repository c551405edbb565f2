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
from service.bodies import answer
from service.database import reason_of
from service.errors import Problem
from service.keys import Keyring
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


def install(
    app: Flask,
    metrics: Metrics,
    keyring: Keyring | None,
    most_bytes: int,
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
        g.request_id = _request_id()

    if keyring is None:
        guard_pages(app, local)
    guard(app, keyring, most_bytes, sessions)

    @app.after_request
    def end(response: Response) -> Response:
        if request.method == "GET" and response.mimetype == "application/json" and response.status_code == 200:
            # Who asks every few seconds is told so when nothing has changed.
            response.add_etag(weak=True)
            response.make_conditional(request)
        route = request.url_rule.rule if request.url_rule else "unmatched"
        seconds = time.monotonic() - g.started
        metrics.request(route, request.method, response.status_code, seconds)
        if _requests.isEnabledFor(logging.INFO):
            _requests.info("answered", extra=_told_of(route, response, seconds))
        response.headers["X-Request-Id"] = g.request_id
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        if request.is_secure:
            response.headers["Strict-Transport-Security"] = "max-age=31536000"
        return response

    _answer_errors(app, metrics)


def _answer_errors(app: Flask, metrics: Metrics) -> None:
    @app.errorhandler(Problem)
    def refuse(problem: Problem) -> Response:
        reason = _REASONS_BY_CODE.get(problem.code) or _REASONS.get(problem.status)
        if reason:
            metrics.rejected(reason)
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
        _log.error("a request failed", exc_info=error, extra=told(request_id=g.request_id))
        message = "a fault of the service, not of the request; its log has the details under this request id"
        return failure(Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", message))


def _told_of(route: str, response: Response, seconds: float) -> dict[str, Any]:
    return told(
        request_id=g.request_id,
        method=request.method,
        route=route,
        status=response.status_code,
        milliseconds=round(seconds * 1000, 1),
        bytes=request.content_length,
        key=g.key.name if g.get("key") else None,
    )


def failure(problem: Problem, results: Sequence[dict[str, Any]] = ()) -> Response:
    body: dict[str, Any] = {"error": {**problem.body(), "request_id": g.request_id}}
    if len(results) > 1:
        body["results"] = results
    response = answer(body, problem.status)
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(problem.retry_after)))
    return response


def _request_id() -> str:
    """The caller's own id where it is harmless, so that logs on both sides agree; else a new one."""
    given = request.headers.get("X-Request-Id", "")
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

"""The product's HTTP API as a blueprint; every answer is JSON, every error has a stable code and a request id."""

import base64
import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from flask import Blueprint, Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from service.access import guard, needs
from service.archives import BLOCK, archive_kind
from service.errors import Problem
from service.keys import Keyring, Role
from service.metrics import Metrics
from service.options import Options
from service.scoring import Scorer, Verdict
from service.settings import ServiceSettings
from service.streaming import Archives
from service.uploads import Upload, discard_body, peek, read_body, uploads

MAX_DEADLINE_MS = 600_000
_REASONS = {
    HTTPStatus.BAD_REQUEST: "bad_request",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "bad_request",
    HTTPStatus.UNAUTHORIZED: "no_access",
    HTTPStatus.FORBIDDEN: "no_access",
}
_REASONS_BY_CODE = {"too_large": "too_large", "rate_limited": "rate_limited", "too_many_bytes": "rate_limited"}
"""Under which reason the refusal of a whole request is counted; the queue's own are counted where they are made."""

USAGE = """anomaly-vae: is this picture like the normal ones? Model {name}, version {version}.

  curl --data-binary @picture.jpg {url}v1/score               one picture
  curl -F file=@a.jpg -F file=@b.jpg {url}v1/score            several
  curl --data-binary @many.zip {url}v1/score                  a zip, tar or tar.gz; answers line by line
  curl --data-binary @picture.jpg '{url}v1/score?heatmap=png' with a heat map (base64 PNG), boxes around what is hot
  curl --data-binary @picture.jpg '{url}v1/score?alpha=0.01'  judged at another rate of false alarms, this once

A result has `outlier` (the verdict), `p_value` (share of normal pictures at least as unusual) and `score` (higher is
more unusual). Header X-Deadline-Ms bounds the wait. Also here: /v1/models /ready /live /metrics
"""


def api(scorer: Scorer, settings: ServiceSettings, metrics: Metrics) -> Blueprint:
    """`POST /v1/score`, `GET /v1/models` and a page of plain text for people."""
    pages = Blueprint("api", __name__)
    archives = Archives(scorer, settings, metrics)
    most_bytes = max(settings.max_request_bytes, settings.max_archive_bytes)
    model = {"name": scorer.name, "version": scorer.detector.version}

    @pages.get("/")
    @needs(None)
    def usage() -> Response:
        return Response(USAGE.format(url=request.url_root, **model), mimetype="text/plain")

    @pages.get("/v1/models")
    @needs(Role.SCORE)
    def models() -> Response:
        detector = scorer.detector
        image = detector.image.model_dump(mode="json")
        return _json({"models": [{**model, "policy": asdict(detector.policy), "image": image}]})

    @pages.post("/v1/score")
    @needs(Role.SCORE)
    def score() -> Response:
        options = Options.of(request.args.items(multi=True), scorer.detector)
        if kind := archive_kind(peek(request.environ, BLOCK, most_bytes), request.mimetype):
            deadline = g.started + _deadline_ms(settings.archive_deadline_ms) / 1000
            return archives.answer(kind, model, _result, deadline=deadline, options=options)
        deadline = g.started + _deadline_ms(settings.deadline_ms) / 1000
        started = time.monotonic()
        body = read_body(request.environ, settings.max_request_bytes)
        files = uploads(body, request.content_type, settings.max_images_per_request)
        metrics.stage("read", time.monotonic() - started)
        source = g.key.source if g.key else None
        outcomes = scorer.score(files, deadline=deadline, options=options, source=source)
        return _scored(model, files, outcomes)

    return pages


def install(app: Flask, metrics: Metrics, keyring: Keyring | None, most_bytes: int) -> None:
    """Number, time and count every request of `app`, ask for its key where there is a keyring, and let no error leave
    it in any other shape than JSON."""

    @app.before_request
    def begin() -> None:
        g.started = time.monotonic()
        g.request_id = _request_id()

    guard(app, keyring, most_bytes)

    @app.after_request
    def end(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "unmatched"
        metrics.request(route, request.method, response.status_code, time.monotonic() - g.started)
        response.headers["X-Request-Id"] = g.request_id
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Content-Security-Policy"] = "default-src 'none'; frame-ancestors 'none'"
        response.headers["Referrer-Policy"] = "no-referrer"
        if request.is_secure:
            response.headers["Strict-Transport-Security"] = "max-age=31536000"
        return response

    @app.errorhandler(Problem)
    def refuse(problem: Problem) -> Response:
        reason = _REASONS_BY_CODE.get(problem.code) or _REASONS.get(problem.status)
        if reason:
            metrics.rejected(reason)
        discard_body(request.environ)
        return _error(problem)

    @app.errorhandler(HTTPException)
    def refuse_plain(error: HTTPException) -> Response:
        status = HTTPStatus(error.code or HTTPStatus.INTERNAL_SERVER_ERROR)
        response = _error(Problem(status, status.name.lower(), _said(error, status)))
        for name, value in error.get_headers(request.environ):
            if name == "Allow":
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def break_down(error: Exception) -> Response:
        app.logger.error("request %s failed", g.request_id, exc_info=error)
        message = "a fault of the service, not of the request; its log has the details under this request id"
        return _error(Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", message))


def _scored(model: dict[str, str], files: Sequence[Upload], outcomes: Sequence[Verdict | Problem]) -> Response:
    """200 where anything was scored; else the refusal all pictures share, or 422."""
    results = [
        _result(g.request_id, index, file.name, outcome)
        for index, (file, outcome) in enumerate(zip(files, outcomes, strict=True))
    ]
    problems = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
    if len(problems) < len(outcomes):
        return _json({"model": model, "results": results})
    if len(problems) == 1 or len({(problem.status, problem.code) for problem in problems}) == 1:
        return _error(problems[0], results)
    message = f"none of the {len(problems)} pictures could be scored; each result says why"
    return _error(Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "no_usable_image", message), results)


def _result(request_id: str, index: int, name: str | None, outcome: Verdict | Problem) -> dict[str, Any]:
    found: dict[str, Any] = {"id": f"{request_id}.{index}"}
    if name is not None:
        found["filename"] = name
    if isinstance(outcome, Problem):
        return {**found, "error": outcome.body()}
    found |= outcome.row
    if outcome.heatmap is not None:
        found["heatmap_png"] = base64.b64encode(outcome.heatmap).decode("ascii")
    return found


def _error(problem: Problem, results: Sequence[dict[str, Any]] = ()) -> Response:
    body: dict[str, Any] = {"error": {**problem.body(), "request_id": g.request_id}}
    if len(results) > 1:
        body["results"] = results
    response = _json(body, problem.status)
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(problem.retry_after)))
    return response


def _json(body: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(json.dumps(body, allow_nan=False) + "\n", status, mimetype="application/json")


def _deadline_ms(default: int) -> int:
    text = request.headers.get("X-Deadline-Ms")
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or not 1 <= int(text) <= MAX_DEADLINE_MS:
        message = f"X-Deadline-Ms must be a whole number of milliseconds from 1 to {MAX_DEADLINE_MS}"
        raise Problem(HTTPStatus.BAD_REQUEST, "bad_deadline", message)
    return int(text)


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

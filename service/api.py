"""`POST /v1/score`: pictures in, verdicts out."""

import base64
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from flask import Response, g, request
from sqlalchemy import RowMapping

from anomaly_vae import ImageSpec, decode
from anomaly_vae.answers import Scores
from service.archives import BLOCK, archive_kind
from service.asked import ScoreWanted
from service.bodies import answer, query_of
from service.codes import FOR_PICTURES
from service.drawing import Style
from service.edge import failure
from service.errors import Problem
from service.keys import Role
from service.metrics import Metrics
from service.options import Options
from service.routes import Route
from service.scoring import Asked, Scorer, Verdict
from service.served import Served
from service.settings import ServiceSettings
from service.streaming import Archives
from service.uploads import Upload, peek, read_body, uploads

if TYPE_CHECKING:
    from torch import Tensor

MAX_DEADLINE_MS = 600_000
TAKES = ("image/*", "multipart/form-data", "application/zip", "application/x-tar", "application/gzip")
USAGE = """anomaly-vae: is this picture like the normal ones? Model {name}, version {version}.

  curl --data-binary @picture.jpg {url}v1/score               one picture
  curl -F file=@a.jpg -F file=@b.jpg {url}v1/score            several
  curl --data-binary @many.zip {url}v1/score                  a zip, tar or tar.gz; answers line by line
  curl --data-binary @picture.jpg '{url}v1/score?heatmap=overlay'  with what is odd painted over (base64 PNG)
  curl --data-binary @picture.jpg '{url}v1/score?alpha=0.01'  judged at another rate of false alarms, this once

A result has `outlier` (the verdict), `p_value` (share of normal pictures at least as unusual) and `score` (higher is
more unusual). Header X-Deadline-Ms bounds the wait. Also here: /docs /openapi.json /v1/models /ready /metrics
"""


class ScorePages:
    """`POST /v1/score`, and what the pages on kept verdicts ask of the models."""

    def __init__(self, scorer: Scorer, settings: ServiceSettings, metrics: Metrics) -> None:
        self._scorer, self._settings, self._metrics = scorer, settings, metrics
        self._archives = Archives(scorer, settings, metrics)

    def routes(self) -> list[Route]:
        """That one."""
        lines = ("application/x-ndjson",)
        return [
            Route("POST", "/v1/score", Role.SCORE, self.score, "Score pictures", Scores, ScoreWanted, more=lines,
                  takes=TAKES, codes=FOR_PICTURES),
        ]  # fmt: skip

    def usage(self) -> Response:
        """A page of plain text for people."""
        return Response(USAGE.format(url=request.url_root, **self._scorer.models.pick().shown), mimetype="text/plain")

    def score(self) -> Response:
        settings = self._settings
        wanted = query_of(ScoreWanted)
        served = self._scorer.models.pick(wanted.model)
        options = Options.of(wanted, served, named=g.key is None or g.key.role >= Role.READ)
        archive = archive_kind(peek(request.environ, BLOCK, settings.most_bytes()), request.mimetype)
        longest = settings.archive_deadline_ms if archive else settings.deadline_ms
        deadline = g.started + deadline_ms(request.headers.get("X-Deadline-Ms"), longest) / 1000
        asked = Asked(served, deadline, options, g.request_id, g.key.source if g.key else None)
        if archive:
            return self._archives.answer(archive, asked, result)
        started = time.monotonic()
        body = read_body(request.environ, settings.max_request_bytes)
        files = uploads(body, request.content_type, settings.max_images_per_request)
        self._metrics.stage("read", time.monotonic() - started)
        return _scored(served.shown, files, self._scorer.score(files, asked))

    def heatmap(self, row: RowMapping, png: bytes, style: Style) -> bytes:
        """That of a kept verdict, by the version that made it, whatever normals rank it now; raises `Problem`."""
        served, seen = self._seen(row, png)
        return self._scorer.heatmap(served, seen, png, style, g.started + self._settings.deadline_ms / 1000)

    def regions(self, row: RowMapping, png: bytes) -> dict[str, Any]:
        """What is hot in its kept picture, as `heatmap`."""
        served, seen = self._seen(row, png)
        found = self._scorer.regions(served, seen, png, g.started + self._settings.deadline_ms / 1000)
        return {"width": seen.shape[2], "height": seen.shape[1], "regions": found}

    def _seen(self, row: RowMapping, png: bytes) -> tuple[Served, "Tensor"]:
        served = self._scorer.models.that_scored(row["model"], row["version"])
        image = served.detector.image
        return served, decode(png, ImageSpec(height=image.height, width=image.width, channels=image.channels))


def _scored(model: dict[str, str], files: Sequence[Upload], outcomes: Sequence[Verdict | Problem]) -> Response:
    """200 where anything was scored; else the refusal all pictures share, or 422."""
    results = [result(file.name, outcome) for file, outcome in zip(files, outcomes, strict=True)]
    problems = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
    if len(problems) < len(outcomes):
        return answer({"model": model, "results": results})
    if len(problems) == 1 or len({(problem.status, problem.code) for problem in problems}) == 1:
        return failure(problems[0], results)
    message = f"none of the {len(problems)} pictures could be scored; each result says why"
    return failure(Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "no_usable_image", message), results)


def result(name: str | None, outcome: Verdict | Problem) -> dict[str, Any]:
    """A picture's row in the answer."""
    found: dict[str, Any] = {} if name is None else {"filename": name}
    if isinstance(outcome, Problem):
        return {**found, "error": outcome.body()}
    found = {"id": outcome.id, **found, **outcome.row}
    for picture, png in outcome.pictures.items():
        found[picture] = None if png is None else base64.b64encode(png).decode("ascii")
    return found


def deadline_ms(text: str | None, default: int) -> int:
    """What the header of that name says; raises `Problem`."""
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or not 1 <= int(text) <= MAX_DEADLINE_MS:
        message = f"X-Deadline-Ms must be a whole number of milliseconds from 1 to {MAX_DEADLINE_MS}"
        raise Problem(HTTPStatus.BAD_REQUEST, "bad_deadline", message)
    return int(text)

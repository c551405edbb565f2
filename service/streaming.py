"""`Archives`: the answer to an archive, one line of JSON an entry, sent while later entries are still being scored."""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from http import HTTPStatus
from itertools import chain
from typing import IO, Any

from flask import Response, request

from service.access import count_body, count_until_closed
from service.archives import SMALL, Bounds, Entry, Kind, entries, too_late
from service.errors import Problem
from service.logs import told
from service.metrics import Metrics
from service.scoring import Asked, Scorer, Verdict
from service.settings import ServiceSettings
from service.uploads import spooled_body

_log = logging.getLogger(__name__)
Row = Callable[[str, Verdict | Problem], dict[str, Any]]
"""The name and outcome of a picture -> its row in the answer."""


class Archives:
    """So many archives at once as the settings say; each holds a request thread and room on the disk."""

    def __init__(self, scorer: Scorer, settings: ServiceSettings, metrics: Metrics) -> None:
        self._scorer, self._settings, self._metrics = scorer, settings, metrics
        self._places = threading.BoundedSemaphore(settings.max_archives)

    def answer(self, kind: Kind, asked: Asked, row: Row) -> Response:
        """Take in the whole archive, then answer line by line; raises `Problem` for what goes wrong before the first.

        Closing the answer, at its end or before, withdraws what still waits and deletes the archive.
        """
        lines = self._lines(kind, asked, row)
        first = next(lines)
        answer = Response(chain([first], lines), mimetype="application/x-ndjson")
        answer.headers["X-Accel-Buffering"] = "no"  # else nginx holds the lines back
        answer.call_on_close(lines.close)
        count_until_closed(answer)
        return answer

    def _lines(self, kind: Kind, asked: Asked, row: Row) -> Generator[str, None, None]:
        # From the second line on there is no request context any more.
        counts, said = Counter(scored=0, failed=0, outliers=0), 0
        with self._place(), self._spooled(asked.deadline) as file:
            found = self._entries(file, kind, asked.deadline)
            outcomes = self._scorer.score_in_turn(found, asked)
            with closing(outcomes):
                try:
                    for name, outcome in outcomes:
                        counts.update(_counted(outcome))
                        yield _line(row(name, outcome))
                        said += 1
                except Exception as error:
                    if not said:
                        raise
                    yield _line({"error": {**_told(error, asked.request_id).body(), "request_id": asked.request_id}})
                else:
                    yield _line({"summary": counts, "model": asked.served.shown})

    @contextmanager
    def _place(self) -> Iterator[None]:
        if not self._places.acquire(blocking=False):
            self._metrics.rejected("too_many_archives")
            message = f"{self._settings.max_archives} at a time is the most archives here; try again after Retry-After"
            raise Problem(HTTPStatus.TOO_MANY_REQUESTS, "too_many_archives", message, retry_after=5.0)
        try:
            yield
        finally:
            self._places.release()

    @contextmanager
    def _spooled(self, deadline: float) -> Iterator[IO[bytes]]:
        def received(size: int) -> None:
            count_body(size)
            if time.monotonic() >= deadline:
                self._metrics.rejected("deadline")
                raise too_late()

        started = time.monotonic()
        with spooled_body(request.environ, self._settings.max_archive_bytes, received) as file:
            self._metrics.stage("read", time.monotonic() - started)
            yield file

    def _entries(self, file: IO[bytes], kind: Kind, deadline: float) -> Iterator[Entry]:
        settings, size = self._settings, file.seek(0, 2)
        file.seek(0)
        expanded = max(SMALL, round(settings.max_expansion * size))
        bounds = Bounds(settings.max_archive_entries, settings.max_request_bytes, expanded, deadline)
        try:
            yield from entries(file, kind, bounds)
        except Problem as problem:
            self._metrics.rejected("deadline" if problem.code == "deadline_exceeded" else "bad_archive")
            raise


def _counted(outcome: Verdict | Problem) -> dict[str, int]:
    if isinstance(outcome, Problem):
        return {"failed": 1}
    return {"scored": 1, "outliers": int(outcome.row["outlier"])}


def _told(error: Exception, request_id: str) -> Problem:
    if isinstance(error, Problem):
        return error
    _log.error("a request failed in mid-answer", exc_info=error, extra=told(request_id=request_id))
    message = "a fault of the service, not of the request; its log has the details under this request id"
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", message)


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, allow_nan=False) + "\n"

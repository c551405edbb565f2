"""Scans of whole folders: their commands tell of them, pages list them and show their reports."""

from http import HTTPStatus
from typing import Any

from flask import Response, g, request
from sqlalchemy import RowMapping

from anomaly_vae.answers import Forgotten
from anomaly_vae.watch_answers import RowsTaken, Scan, ScanPage
from service import ids
from service.asked import RowsWanted, ScansWanted, ScanWanted
from service.bodies import answer, body_of, moment, query_of, who
from service.errors import Problem
from service.ids import Ids
from service.keys import Role
from service.metrics import SCANNED, Metrics
from service.models import Models
from service.routes import Route
from service.scans import Scans
from service.sent_rows import MOST_BYTES, OfScan, SentRows, rows_of
from service.store import Store
from service.uploads import read_body

_LINES = ("application/x-ndjson",)
_COUNTS = ("scored", "failed", "outliers", "expected_rate", "alpha")
_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval' blob:; worker-src blob:; "
    "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; media-src data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'"
)
"""A report brings its scripts along. They run, in an origin of their own that is nobody's: no cookie, no key, and
nothing of the service is within their reach, nor is any other address."""


class ScanPages:
    """Routes on scans. `source`: of those that say none; `most_bytes`: of a report."""

    def __init__(
        self, scans: Scans, names: Ids, store: Store, models: Models, metrics: Metrics, source: str, most_bytes: int
    ) -> None:
        self._scans, self._names, self._source, self._most_bytes = scans, names, source, most_bytes
        self._models, self._metrics = models, metrics
        self._rows = SentRows(scans, store, names, metrics)

    def routes(self) -> list[Route]:
        """All of them."""
        one, report, rows = "/v1/scans/<scan>", "/v1/scans/<scan>/report", "/v1/scans/<scan>/rows"
        bodies = ("empty", "too_large", "unsupported_media_type", "bad_content_length", "incomplete_body")
        score, read, admin, html = Role.SCORE, Role.READ, Role.ADMIN, ("text/html",)
        found = ("unknown_scan", "store_down")
        return [
            Route("POST", "/v1/scans", score, self.add_scan, "Tell of a scan", Scan, body=ScanWanted,
                  codes=("store_down", "not_yours")),
            Route("GET", "/v1/scans", read, self.scans, "Scans, the newest first", ScanPage, ScansWanted,
                  codes=("store_down",)),
            Route("GET", one, read, self.scan, "One scan", Scan, codes=found),
            Route("DELETE", one, admin, self.forget_scan, "Forget a scan and its report", Forgotten, codes=found),
            Route("PUT", report, score, self.set_report, "Its report: one HTML page that fetches nothing", Scan,
                  takes=html, codes=(*found, "not_yours", *bodies)),
            Route("GET", report, read, self.report, "Its report", html, codes=(*found, "no_report")),
            Route("POST", rows, score, self.add_rows, "Rows of its result, from the first on, each kept once",
                  RowsTaken, RowsWanted, takes=_LINES, codes=(*found, "not_yours", *bodies, "bad_rows", "too_many_rows",
                                                   "rows_missing")),
        ]  # fmt: skip

    def add_scan(self) -> Response:
        asked, number = body_of(ScanWanted), self._names.next()
        own = g.key.source if g.key else None
        told = asked.model_dump(exclude={"started", "finished", "source"})
        told |= {"started": asked.started.timestamp(), "finished": asked.finished.timestamp()}
        if asked.token is None:
            self._scans.add(number, who(), {**told, "source": asked.source or own or self._source})
        else:
            # Its rows count as verdicts do, so that whose they are is not for everybody to say.
            if own is not None and asked.source not in (None, own):
                message = f"the key {who()} is for pictures of the source {own}; name no other, or use another key"
                raise Problem(HTTPStatus.FORBIDDEN, "not_yours", message)
            told |= {"source": asked.source or own or SCANNED, "model": self._model_of(asked.model, asked.version)}
            number = self._scans.add_once(number, who(), told)
        found = self._found(ids.shown(number))
        self._expect_own(found)
        return answer(_shown(found))

    def add_rows(self, scan: str) -> Response:
        first, found = query_of(RowsWanted).first, self._found(scan)
        self._expect_own(found)
        if request.mimetype not in (*_LINES, ""):
            message = f"rows are lines of JSON, and these are said to be {request.mimetype[:40]}; send {_LINES[0]}"
            raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
        message = f"these rows are larger than {MOST_BYTES} bytes; send fewer at a time"
        body = read_body(request.environ, MOST_BYTES, message)
        if not body:
            raise Problem(HTTPStatus.BAD_REQUEST, "empty", "there are no rows; send lines of JSON as .ndjson has them")
        told = OfScan.of(found)
        rows = self._rows.add(told, first, rows_of(body, first, told))
        if rows is None:
            raise _unknown(scan)
        return answer({"rows": rows, "served": self._metrics.serves(told.model, told.version)})

    def _model_of(self, told: str, version: str) -> str:
        """What this service calls the model of a version that it serves; others are called as they were told."""
        names = [served.name for served in self._models.active() if served.version == version]
        return told if told in names or not names else names[0]

    def _expect_own(self, found: RowMapping) -> None:
        if g.key and g.key.role < Role.ADMIN and found["by"] != who():
            message = f"the scan was told of by {found['by']}; use that key, or one with the role admin"
            raise Problem(HTTPStatus.FORBIDDEN, "not_yours", message)

    def scans(self) -> Response:
        asked = query_of(ScansWanted)
        rows = self._scans.scans(ids.read(asked.cursor) if asked.cursor else None, asked.limit + 1)
        more = ids.shown(rows[asked.limit - 1]["id"]) if len(rows) > asked.limit else None
        return answer({"scans": [_shown(row) for row in rows[: asked.limit]], "next": more})

    def scan(self, scan: str) -> Response:
        return answer(_shown(self._found(scan)))

    def forget_scan(self, scan: str) -> Response:
        if not self._scans.forget(self._found(scan)["id"], who()):
            raise _unknown(scan)
        return answer({"forgotten": 1})

    def set_report(self, scan: str) -> Response:
        found = self._found(scan)
        self._expect_own(found)
        if request.mimetype not in ("text/html", ""):
            message = f"a report is an HTML page, and this is said to be {request.mimetype[:40]}; send text/html"
            raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
        message = f"the report is larger than {self._most_bytes} bytes; send a smaller one, or raise max_report_bytes"
        html = read_body(request.environ, self._most_bytes, message)
        if not html:
            raise Problem(HTTPStatus.BAD_REQUEST, "empty", "the report is empty; send the bytes of an HTML page")
        if not self._scans.set_report(found["id"], html):
            raise _unknown(scan)
        return answer(_shown(self._found(scan)))

    def report(self, scan: str) -> Response:
        html = self._scans.report(self._found(scan)["id"])
        if html is None:
            message = "no report of this scan was sent (PUT /v1/scans/ID/report)"
            raise Problem(HTTPStatus.NOT_FOUND, "no_report", message)
        response = Response(html, mimetype="text/html")
        response.headers["Content-Security-Policy"] = _POLICY
        return response

    def _found(self, name: str) -> RowMapping:
        number = ids.read(name)
        row = None if number is None else self._scans.scan(number)
        if row is None:
            raise _unknown(name)
        return row


def _shown(row: RowMapping) -> dict[str, Any]:
    return {
        "id": ids.shown(row["id"]),
        **{name: row[name] for name in ("name", "model", "version", "source", "by")},
        "started": moment(row["started"]),
        "finished": moment(row["finished"]),
        **{name: row[name] for name in _COUNTS},
        "has_report": bool(row["has_report"]),
        "rows": row["rows"] or 0,
    }


def _unknown(name: str) -> Problem:
    message = f"there is no scan {name[:40]!r}; it was deleted, or is older than is kept (max_scans, scan_days)"
    return Problem(HTTPStatus.NOT_FOUND, "unknown_scan", message)

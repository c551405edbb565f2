"""Scans of whole folders: their commands tell of them, pages list them and show their reports."""

from http import HTTPStatus
from typing import Any

from flask import Response, g, request
from sqlalchemy import RowMapping

from anomaly_vae.answers import Forgotten
from anomaly_vae.watch_answers import Scan, ScanPage
from service import ids
from service.asked import ScansWanted, ScanWanted
from service.bodies import answer, body_of, moment, query_of, who
from service.errors import Problem
from service.ids import Ids
from service.keys import Role
from service.routes import Route
from service.scans import Scans
from service.uploads import read_body

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

    def __init__(self, scans: Scans, names: Ids, source: str, most_bytes: int) -> None:
        self._scans, self._names, self._source, self._most_bytes = scans, names, source, most_bytes

    def routes(self) -> list[Route]:
        """All of them."""
        one, report = "/v1/scans/<scan>", "/v1/scans/<scan>/report"
        score, read, admin, html = Role.SCORE, Role.READ, Role.ADMIN, ("text/html",)
        found = ("unknown_scan", "store_down")
        return [
            Route("POST", "/v1/scans", score, self.add_scan, "Tell of a scan", Scan, body=ScanWanted,
                  codes=("store_down",)),
            Route("GET", "/v1/scans", read, self.scans, "Scans, the newest first", ScanPage, ScansWanted,
                  codes=("store_down",)),
            Route("GET", one, read, self.scan, "One scan", Scan, codes=found),
            Route("DELETE", one, admin, self.forget_scan, "Forget a scan and its report", Forgotten, codes=found),
            Route("PUT", report, score, self.set_report, "Its report: one HTML page that fetches nothing", Scan,
                  takes=html, codes=(*found, "not_yours", "empty", "too_large", "unsupported_media_type",
                                     "bad_content_length", "incomplete_body")),
            Route("GET", report, read, self.report, "Its report", html, codes=(*found, "no_report")),
        ]  # fmt: skip

    def add_scan(self) -> Response:
        asked, number = body_of(ScanWanted), self._names.next()
        source = asked.source or (g.key.source if g.key else None) or self._source
        told = asked.model_dump(exclude={"started", "finished", "source"})
        times = {"started": asked.started.timestamp(), "finished": asked.finished.timestamp()}
        self._scans.add(number, who(), {**told, **times, "source": source})
        return answer(_shown(self._found(ids.shown(number))))

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
        if g.key and g.key.role < Role.ADMIN and found["by"] != who():
            message = f"the scan was told of by {found['by']}; use that key, or one with the role admin"
            raise Problem(HTTPStatus.FORBIDDEN, "not_yours", message)
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
    }


def _unknown(name: str) -> Problem:
    message = f"there is no scan {name[:40]!r}; it was deleted, or is older than is kept (max_scans, scan_days)"
    return Problem(HTTPStatus.NOT_FOUND, "unknown_scan", message)

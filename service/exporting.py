"""All pages of verdicts at once, as CSV or lines of JSON, a few such answers at a time."""

import csv
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Generator
from http import HTTPStatus
from itertools import chain
from typing import Any

from flask import Response
from sqlalchemy import RowMapping

from service.errors import Problem
from service.records import Wanted
from service.store import Store

_PAGE = 500
_COLUMNS = ("id", "at", "request_id", "filename", "model", "version", "source", "score", "p_value", "outlier",
            "alpha", "policy_revision", "feedback")  # fmt: skip


class Exports:
    """At most so many at once, each on a request thread; `shown` is a verdict's row as clients see it.

    Between two pages one rests as long as a page took it, so that whoever scores finds the processor free as often.
    """

    def __init__(self, store: Store, shown: Callable[[RowMapping], dict[str, Any]], most: int) -> None:
        self._store, self._shown, self._most = store, shown, most
        self._places = threading.BoundedSemaphore(most)

    def answer(self, wanted: Wanted, before: int | None, most: int | None, form: str) -> Response:
        """The newest first, at most so many; raises `Problem` where there is no place for it."""
        write = _csv if form == "csv" else _lines
        parts = self._parts(wanted, before, most or sys.maxsize, write, _csv_head() if form == "csv" else "")
        # The first is made before the answer begins: a store that is down is an error, not an answer that breaks off.
        first = next(parts)
        response = Response(chain([first], parts), mimetype="text/csv" if form == "csv" else "application/x-ndjson")
        response.call_on_close(parts.close)
        return response

    def _parts(
        self, wanted: Wanted, before: int | None, left: int, write: Callable[[list[dict[str, Any]]], str], head: str
    ) -> Generator[str, None, None]:
        if not self._places.acquire(blocking=False):
            message = f"{self._most} at a time is the most exports here (max_exports); try again after Retry-After"
            raise Problem(HTTPStatus.TOO_MANY_REQUESTS, "too_many_exports", message, retry_after=5.0)
        try:
            while True:
                started, size = time.monotonic(), min(_PAGE, left)
                page = self._store.verdicts(wanted, before, size)
                text = head + write([self._shown(row) for row in page])
                took = time.monotonic() - started
                yield text
                left, head = left - len(page), ""
                if len(page) < size or not left:
                    return
                before = page[-1]["id"]
                time.sleep(min(took, 1.0))
        finally:
            self._places.release()


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _csv_head() -> str:
    text = io.StringIO()
    csv.writer(text).writerow(_COLUMNS)
    return text.getvalue()


def _csv(rows: list[dict[str, Any]]) -> str:
    """Lines without the parts, which differ from model to model."""
    text = io.StringIO()
    lines = csv.writer(text)
    for row in rows:
        row["feedback"] = row["feedback"]["label"] if row["feedback"] else ""
        row |= {name: _harmless(row[name] or "") for name in ("filename", "request_id")}
        lines.writerow([row[name] for name in _COLUMNS])
    return text.getvalue()


def _harmless(name: str) -> str:
    """A file name that no spreadsheet takes for a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name

"""What was scored: verdicts with their pictures and heat maps, rates, feedback and reviews."""

import json
import math
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from flask import Response
from sqlalchemy import Connection, RowMapping

from anomaly_vae.answers import Forgotten, Rates, ReviewPage, Verdict, VerdictPage, VerdictRegions
from service import ids
from service.asked import FeedbackWanted, ForgetWanted, HeatmapWanted, RatesWanted, ReviewWanted, VerdictsWanted
from service.auditing import note
from service.bodies import answer, body_of, moment, query_of, who
from service.codes import FOR_THE_QUEUE
from service.drawing import Style
from service.errors import Problem
from service.exporting import Exports
from service.keys import Role
from service.reviewing import Contradiction, Reviews, UnknownVerdict
from service.routes import Route
from service.store import Store, Wanted

_PAGE = 1000
_BUCKETS = 10_000
_FLUSH_SECONDS = 5.0
_SHOWN = 100
_Z = 1.959964


class VerdictPages:
    """Routes on what the store holds; `heatmap` draws that of a verdict's row and kept picture, or raises `Problem`.

    `regions` tells what is hot in it.
    """

    def __init__(
        self,
        store: Store,
        heatmap: Callable[[RowMapping, bytes, Style], bytes],
        flush: Callable[[float], bool],
        regions: Callable[[RowMapping, bytes], dict[str, Any]],
        most_exports: int = 2,
    ) -> None:
        self._exports = Exports(store, shown, most_exports)
        self._store, self._heatmap, self._flush, self._regions = store, heatmap, flush, regions
        self._reviews = Reviews(store.database)

    def routes(self) -> list[Route]:
        """All of them."""
        one, picture = "/v1/verdicts/<verdict>", "/v1/verdicts/<verdict>/image"
        read, admin, png = Role.READ, Role.ADMIN, ("image/png",)
        lines = ("application/x-ndjson", "text/csv")
        found, seen = ("unknown_verdict", "store_down"), ("unknown_verdict", "no_picture", "store_down")
        return [
            Route("GET", "/v1/verdicts", read, self.verdicts, "Verdicts, the newest first", VerdictPage,
                  VerdictsWanted, more=lines, codes=("store_down", "too_many_exports")),
            Route("DELETE", "/v1/verdicts", admin, self.forget_many, "Forget verdicts", Forgotten, ForgetWanted,
                  codes=("store_down",)),
            Route("GET", one, read, self.verdict, "One verdict", Verdict, codes=found),
            Route("DELETE", one, admin, self.forget, "Forget a verdict, its picture and feedback", Forgotten,
                  codes=found),
            Route("GET", picture, read, self.image, "What the model saw of its picture", png, codes=seen),
            Route("DELETE", picture, admin, self.forget_image, "Forget its picture alone", Forgotten, codes=seen),
            Route("GET", "/v1/verdicts/<verdict>/heatmap", read, self.heat, "Its heat map", png, HeatmapWanted,
                  codes=(*seen, "version_gone", *FOR_THE_QUEUE)),
            Route("GET", "/v1/verdicts/<verdict>/regions", read, self.hot, "Boxes around what is hot in it",
                  VerdictRegions, codes=(*seen, "version_gone", *FOR_THE_QUEUE)),
            Route("GET", "/v1/rates", read, self.rates, "Outlier rates over time", Rates, RatesWanted,
                  codes=("store_down",)),
            Route("POST", "/v1/feedback", read, self.feedback, "Say what a picture was", Verdict, body=FeedbackWanted,
                  codes=(*found, "contradiction")),
            Route("GET", "/v1/review", read, self.review, "Pictures to look at, drawn by chance", ReviewPage,
                  ReviewWanted, codes=("store_down",)),
        ]  # fmt: skip

    def verdicts(self) -> Response:
        asked = query_of(VerdictsWanted)
        if asked.format != "json":
            before = _number(asked.cursor) if asked.cursor else None
            return self._exports.answer(_wanted(asked), before, asked.limit, asked.format)
        limit = min(asked.limit or _SHOWN, _PAGE)
        rows = self._store.verdicts(_wanted(asked), _number(asked.cursor) if asked.cursor else None, limit + 1)
        more = ids.shown(rows[limit - 1]["id"]) if len(rows) > limit else None
        return answer({"verdicts": [shown(row) for row in rows[:limit]], "next": more})

    def forget_many(self) -> Response:
        asked = query_of(ForgetWanted)
        wanted = _wanted(asked)
        if wanted == Wanted():
            message = "say which verdicts to forget: give since, until, model, source or outlier"
            raise Problem(HTTPStatus.BAD_REQUEST, "bad_parameter", message)
        self._flushed()
        told = asked.model_dump(mode="json", exclude_none=True)
        gone, before, by = 0, None, who()

        def write(connection: Connection, count: int) -> None:
            note(connection, by, "forget", "many", told, {"forgotten": count})

        while rows := self._store.verdicts(wanted, before, _PAGE):
            before = rows[-1]["id"]
            gone += self._store.forget([row["id"] for row in rows], asked.pictures_only, write)
        self._store.compact()
        return answer({"forgotten": gone})

    def verdict(self, verdict: str) -> Response:
        return answer(shown(_found(self._store, verdict)))

    def forget(self, verdict: str) -> Response:
        return self._forgotten(verdict, _found(self._store, verdict), pictures_only=False)

    def image(self, verdict: str) -> Response:
        return Response(_picture(self._store, verdict)[1], mimetype="image/png")

    def forget_image(self, verdict: str) -> Response:
        return self._forgotten(verdict, _picture(self._store, verdict)[0], pictures_only=True)

    def _forgotten(self, verdict: str, row: RowMapping, pictures_only: bool) -> Response:
        by = who()

        def write(connection: Connection, count: int) -> None:
            note(connection, by, "forget", verdict, {"pictures_only": pictures_only}, {"forgotten": count})

        gone = self._store.forget([row["id"]], pictures_only, write)
        self._store.compact()
        return answer({"forgotten": gone})

    def _flushed(self) -> None:
        """What was answered already is kept, so that it can be forgotten; raises `Problem`."""
        if not self._flush(_FLUSH_SECONDS):
            message = "verdicts still wait for the store, and would be kept after this; try again when /ready says ok"
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "store_down", message, retry_after=5.0)

    def heat(self, verdict: str) -> Response:
        style = query_of(HeatmapWanted).style
        return Response(self._heatmap(*_picture(self._store, verdict), style), mimetype="image/png")

    def hot(self, verdict: str) -> Response:
        return answer(self._regions(*_picture(self._store, verdict)))

    def rates(self) -> Response:
        asked = query_of(RatesWanted)
        until = asked.until.timestamp() if asked.until else time.time() + 60
        since = asked.since.timestamp() if asked.since else until - 86_400
        if (until - since) / 60 > asked.minutes * _BUCKETS:
            message = f"that is more than {_BUCKETS:,} buckets; ask for more minutes a bucket, or a shorter span"
            raise Problem(HTTPStatus.BAD_REQUEST, "bad_parameter", message)
        rows = self._store.rates(since, until, asked.minutes, asked.model, asked.source)
        return answer(
            {
                "since": moment(since),
                "until": moment(until),
                "minutes": asked.minutes,
                "buckets": [_bucket(row) for row in rows],
                "p_values": self._store.histogram(since, until, asked.model, asked.source),
            }
        )

    def feedback(self) -> Response:
        said = body_of(FeedbackWanted)
        try:
            self._reviews.say(_number(said.verdict), said.label, said.note, who())
        except UnknownVerdict:
            raise _unknown(said.verdict) from None
        except Contradiction as error:
            raise Problem(HTTPStatus.CONFLICT, "contradiction", str(error)) from None
        return answer(shown(_found(self._store, said.verdict)))

    def review(self) -> Response:
        asked = query_of(ReviewWanted)
        rows = self._reviews.to_review(asked.model, asked.limit)
        return answer({"verdicts": [_to_review(row) for row in rows]})


def shown(row: RowMapping) -> dict[str, Any]:
    """A kept verdict as clients see it."""
    said = {"label": row["label"], "note": row["note"], "by": row["said_by"]}
    return {
        "id": ids.shown(row["id"]),
        "at": moment(ids.seconds_of(row["id"])),
        "request_id": row["request"],
        **{name: row[name] for name in ("filename", "model", "version", "source", "score", "p_value")},
        "outlier": bool(row["outlier"]),
        "alpha": row["alpha"],
        "policy_revision": row["policy"],
        "parts": json.loads(row["parts"]),
        "has_picture": bool(row["has_picture"]),
        "feedback": None if row["label"] is None else {**said, "at": moment(row["said_at"])},
    }


def wilson(outliers: int, scored: int) -> tuple[float, float]:
    """95% confidence interval of a rate (Wilson 1927)."""
    share, weight = outliers / scored, _Z**2 / scored
    middle, half = share + weight / 2, _Z * math.sqrt((share * (1 - share) + weight / 4) / scored)
    return max(0.0, (middle - half) / (1 + weight)), min(1.0, (middle + half) / (1 + weight))


def _bucket(row: RowMapping) -> dict[str, Any]:
    # PostgreSQL sums whole numbers to decimals.
    scored, outliers = int(row["scored"]), int(row["outliers"])
    return {
        "start": moment(int(row["bucket"]) * 60),
        "scored": scored,
        "outliers": outliers,
        "rate": outliers / scored,
        "band": wilson(outliers, scored),
        "expected_rate": float(row["expected"]) / scored,
    }


def _to_review(row: RowMapping) -> dict[str, Any]:
    number = row["id"]
    return {
        "id": ids.shown(number),
        "model": row["model"],
        "at": moment(ids.seconds_of(number)),
        "filename": row["filename"],
        "has_picture": bool(row["has_picture"]),
    }


def _wanted(asked: VerdictsWanted | ForgetWanted) -> Wanted:
    return Wanted(
        since=asked.since.timestamp() if asked.since else None,
        until=asked.until.timestamp() if asked.until else None,
        model=asked.model,
        source=asked.source,
        outlier=asked.outlier,
        p_value_at_most=asked.p_value_at_most if isinstance(asked, VerdictsWanted) else None,
    )


def _found(store: Store, name: str) -> RowMapping:
    number = ids.read(name)
    row = None if number is None else store.verdict(number)
    if row is None:
        raise _unknown(name)
    return row


def _picture(store: Store, name: str) -> tuple[RowMapping, bytes]:
    row = _found(store, name)
    png = store.picture(row["id"])
    if png is None:
        message = (
            "no picture of this verdict is kept; the settings images, keep_picture_days and review_share say which"
        )
        raise Problem(HTTPStatus.NOT_FOUND, "no_picture", message)
    return row, png


def _unknown(name: str) -> Problem:
    message = f"there is no verdict {name[:40]!r}; it was never kept, or is no longer (a moment after the reply it is)"
    return Problem(HTTPStatus.NOT_FOUND, "unknown_verdict", message)


def _number(name: str) -> int:
    number = ids.read(name)
    assert number is not None  # its type has made sure
    return number

"""`GET /v1/alarms` and their acknowledgement: each alarm in plain words, and what to do about it."""

import json
from http import HTTPStatus
from typing import Any

from flask import Response
from sqlalchemy import RowMapping

from anomaly_vae.drift import BLOCK, EVIDENCE, LEAST_EFFECT, SCORE, WINDOWS, RateAlarm
from anomaly_vae.watch_answers import Alarm, AlarmList
from service.alarms import KINDS, Alarms, Kind, NotRaised, UnknownAlarm, name_of
from service.bodies import answer, moment, who
from service.errors import Problem
from service.keys import Role
from service.routes import Route

_LEAST = WINDOWS[0] * BLOCK


class AlarmPages:
    """Routes on alarms."""

    def __init__(self, alarms: Alarms) -> None:
        self._alarms = alarms

    def routes(self) -> list[Route]:
        """Both of them."""
        return [
            Route("GET", "/v1/alarms", Role.READ, self.alarms, "Whether streams still look as calibration did",
                  AlarmList, codes=("store_down",)),
            Route("POST", "/v1/alarms/<alarm>:acknowledge", Role.ADMIN, self.acknowledge, "Begin an alarm anew", Alarm,
                  codes=("unknown_alarm", "not_raised", "store_down")),
        ]  # fmt: skip

    def alarms(self) -> Response:
        return answer({"alarms": [shown(row, kind) for row in self._alarms.rows() for kind in KINDS]})

    def acknowledge(self, alarm: str) -> Response:
        try:
            return answer(shown(*self._alarms.acknowledge(alarm, who())))
        except UnknownAlarm:
            message = (
                f"there is no alarm {alarm[:40]!r} of what is active now; GET /v1/alarms lists those that there are"
            )
            raise Problem(HTTPStatus.NOT_FOUND, "unknown_alarm", message) from None
        except NotRaised:
            message = "this alarm is not raised, so that there is nothing to acknowledge; what it has seen is kept"
            raise Problem(HTTPStatus.CONFLICT, "not_raised", message) from None


def shown(row: RowMapping, kind: Kind) -> dict[str, Any]:
    """An alarm as clients see it."""
    packed = json.loads(row["rate"])
    rate = RateAlarm.unpacked(packed)
    since = row[f"{kind}_raised"]
    told = {
        "id": name_of(row, kind),
        **{name: row[name] for name in ("model", "version", "source")},
        "kind": kind,
        "raised": since is not None,
        "since": None if since is None else moment(since),
        "observed_rate": _share(rate.outliers, rate.images),
        "expected_rate": packed["expected"],
        "tolerated_rate": rate.tolerated,
        "recent_rate": _share(rate.recent_outliers, rate.recent_images),
        "recent_images": rate.recent_images,
        "promised": packed["promised"],
        "examples": json.loads(row["examples"])[kind] if since is not None else [],
    }
    return told | (_rate(row, rate, packed["promised"]) if kind == "rate" else _shift(row))


def _rate(row: RowMapping, rate: RateAlarm, promised: bool) -> dict[str, Any]:
    return {
        "evidence": rate.evidence,
        "limit": EVIDENCE,
        "images": rate.images,
        "part": None,
        "effect": None,
        "message": _of_raised_rate(row, rate) if row["rate_raised"] is not None else _of_quiet_rate(rate, promised),
    }


def _of_raised_rate(row: RowMapping, rate: RateAlarm) -> str:
    shift = json.loads(row["shift"])
    of = f"{rate.recent_outliers} of the last {rate.recent_images} pictures are outliers"
    found = f"More outliers: {of}, where up to {rate.tolerated:.2%} would be explained. "
    if row["shift_raised"] is not None:
        return found + (
            "Most pictures have changed as well (see the shift alarm of this source): look at the camera, the lighting "
            "and the product first. When it is mended, or the model recalibrated, acknowledge both."
        )
    if shift["shifts"] and rate.recent_images >= _LEAST:
        return found + (
            "Most pictures look as before, so these are more defects, or a few of a new kind, rather than the camera: "
            "look at the examples, act on the line, then acknowledge."
        )
    return found + (
        f"Whether most pictures have changed cannot be told before {_LEAST} of them: look at the examples. When it is "
        "dealt with, acknowledge."
    )


def _of_quiet_rate(rate: RateAlarm, promised: bool) -> str:
    if rate.tolerated >= 1:
        return "So few calibration pictures explain any rate of outliers: calibrate with more normal pictures."
    of = f"{rate.outliers} of {rate.images} pictures are outliers"
    found = f"No alarm: {of}, up to {rate.tolerated:.2%} would be explained."
    unproven = " With K-fold or grouped calibration the bound on false alarms is not proven."
    return found + ("" if promised else unproven)


def _shift(row: RowMapping) -> dict[str, Any]:
    shift = json.loads(row["shift"])
    worst = shift["raised"] or max(shift["shifts"], key=lambda one: abs(one["effect"]) / one["limit"], default=None)
    return {
        "evidence": None,
        "limit": LEAST_EFFECT if worst is None else worst["limit"],
        "images": shift["images"] if worst is None else worst["images"],
        "part": None if worst is None else worst["part"],
        "effect": None if worst is None else worst["effect"],
        "message": _of_shift(shift, worst),
    }


def _of_shift(shift: dict[str, Any], worst: dict[str, Any] | None) -> str:
    if not shift["names"]:
        return "The calibration pictures are too few, or too alike, to tell what most pictures should be: add more."
    alone = "" if shift["names"] != [SCORE] else (
        " Only the score is watched: neither parts nor latents of this version's calibration pictures are known (a "
        "recalibration, or a bundle of an older version: train it again)."
    )  # fmt: skip
    if worst is None:
        return f"Too few pictures yet: {shift['images']} of {_LEAST}.{alone}"
    move = f"{worst['effect']:+.2f} in {worst['part']} over {worst['images']} pictures, limit {worst['limit']:.2f}"
    if not shift["raised"]:
        return f"No alarm: most pictures look as the calibration pictures did. The largest move is {move}.{alone}"
    return (
        f"Most pictures have changed ({move}), not only a few: look at camera, lighting, lens, compression and "
        "product. Mend it, or, if pictures are to look so from now on, review some and recalibrate, or train again. "
        f"Until then verdicts do not keep their rate of false alarms.{alone}"
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None

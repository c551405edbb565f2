"""Models and what operators decide of them: which bundle, which policy, which calibration; and the log of it all."""

import json
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

import numpy as np
from flask import Response

from anomaly_vae import CalibrationError, ConfigError
from anomaly_vae.answers import Audit, Model, ModelList, PolicyBook, Preview, Recalibrated, Retired
from service.asked import (
    ActivateWanted,
    AuditWanted,
    LoadWanted,
    PolicyWanted,
    PreviewWanted,
    RecalibrateWanted,
    RetireWanted,
)
from service.auditing import changes
from service.bodies import answer, body_of, moment, query_of, who
from service.decisions import Decided, PolicyChoice, Sample
from service.errors import Problem
from service.keys import Role
from service.models import Models
from service.policies import InForce
from service.reviewing import Reviewed, Reviews
from service.routes import Route
from service.served import Served
from service.store import Store

_LOOKING = ("unknown_model", "no_store", "store_down")
_READING = (
    "bundle_replaced",
    "no_models_folder",
    "unknown_bundle",
    "bad_bundle",
    "no_memory",
    "load_timeout",
    "loading",
)
_CHANGING = ("not_loaded", "no_store", "store_down", "conflict", "policy_not_supported")


class ModelPages:
    """Routes on models. Without a `store` they can be looked at, and no more."""

    def __init__(self, models: Models, store: Store | None) -> None:
        self._models, self._store = models, store

    def routes(self) -> list[Route]:
        """All of them."""
        one, policy = "/v1/models/<model>", "/v1/models/<model>/policy"
        score, read, admin = Role.SCORE, Role.READ, Role.ADMIN
        return [
            Route("GET", "/v1/models", score, self.models, "All models", ModelList),
            Route("GET", one, score, self.model, "One model", Model, codes=("unknown_model",)),
            Route("POST", f"{one}:load", admin, self.load, "Load a bundle beside", Model, body=LoadWanted,
                  codes=(*_READING, *_CHANGING)),
            Route("POST", f"{one}:activate", admin, self.activate, "Answer by it", Model, body=ActivateWanted,
                  codes=_CHANGING),
            Route("POST", f"{one}:rollback", admin, self.rollback, "Answer by the one before again", Model,
                  codes=("unknown_model", "nothing_before", *_READING, *_CHANGING)),
            Route("POST", f"{one}:retire", admin, self.retire, "Forget a version, or a model", Retired,
                  body=RetireWanted, codes=(*_LOOKING, "not_loaded", "in_use", "conflict")),
            Route("GET", policy, read, self.policy, "The policy and its history", PolicyBook, codes=_LOOKING),
            Route("PUT", policy, admin, self.set_policy, "Judge by another policy", PolicyBook, body=PolicyWanted,
                  codes=(*_LOOKING, "alpha_not_supported", "conflict")),
            Route("POST", f"{policy}:preview", read, self.preview, "Try a policy on the last verdicts", Preview,
                  body=PreviewWanted, codes=(*_LOOKING, "alpha_not_supported")),
            Route("POST", f"{policy}:rollback", admin, self.rollback_policy, "Judge by the policy before again",
                  PolicyBook, codes=(*_LOOKING, "nothing_before", "alpha_not_supported", "bad_parameter", "conflict")),
            Route("POST", f"{one}:recalibrate", admin, self.recalibrate, "Rank among the reviewed normals",
                  Recalibrated, body=RecalibrateWanted,
                  codes=(*_LOOKING, "too_few_reviewed", "not_independent", "nothing_before", "conflict")),
            Route("GET", "/v1/audit", admin, self.audit, "Who changed what", Audit, AuditWanted,
                  codes=("no_store", "store_down")),
        ]  # fmt: skip

    def models(self) -> Response:
        shown = [self._shown(served) for served in self._models.active()]
        return answer({"models": shown, "bundles": self._models.bundles()})

    def model(self, model: str) -> Response:
        return answer(self._shown(self._models.pick(model)))

    def load(self, model: str) -> Response:
        asked = body_of(LoadWanted)
        loaded = self._models.load(model, asked.bundle)
        if asked.activate:
            self._models.activate(model, loaded.version, who())
        return answer(self._shown(loaded))

    def activate(self, model: str) -> Response:
        return answer(self._shown(self._models.activate(model, body_of(ActivateWanted).version, who())))

    def rollback(self, model: str) -> Response:
        return answer(self._shown(self._models.rollback(model, who())))

    def retire(self, model: str) -> Response:
        gone = self._models.retire(model, body_of(RetireWanted).version, who())
        left = [one.version for one in self._models.loaded(model)]
        return answer({"name": model, "retired": gone, "loaded": left})

    def policy(self, model: str) -> Response:
        return self._policy(self._models.pick(model))

    def set_policy(self, model: str) -> Response:
        asked = body_of(PolicyWanted)
        return self._policy(self._changed(model, PolicyChoice(asked.alpha, asked.mode, asked.threshold)))

    def rollback_policy(self, model: str) -> Response:
        self._models.pick(model)
        book = self._models.decisions.policies(model)
        if not book:
            raise Problem(HTTPStatus.CONFLICT, "nothing_before", f"the policy of {model} was never changed")
        return self._policy(self._changed(model, book[1].choice if len(book) > 1 else PolicyChoice()))

    def preview(self, model: str) -> Response:
        asked, served = body_of(PreviewWanted), self._models.pick(model)
        policy = _policy_of(served, PolicyChoice(asked.alpha, asked.mode, asked.threshold))
        rows = self._kept().ranks(model, asked.last)
        crossed = served.detector.calibration.crossed
        # Crosswise ranks cannot be told from scores, so that only those count that were told by them.
        ours = {served.version} if crossed else self._versions(served)
        scores = [score for version, score, _ in rows if version in ours]
        ranks = [rank for version, _, rank in rows if version in ours]
        if scores and not crossed:
            # Some may be of versions that were ranked otherwise.
            ranks = served.detector.calibration.p_values(scores).tolist()
        now, then = (sum(one.outliers(served.detector, scores, ranks)) if scores else 0
                     for one in (served.policy, policy))  # fmt: skip
        shown = {"verdicts": len(scores), "flagged_now": now, "flagged_then": then}
        return answer({"policy": asdict(policy), **shown})

    def recalibrate(self, model: str) -> Response:
        asked, served = body_of(RecalibrateWanted), self._models.pick(model)
        reviewed = Reviews(self._kept().database).reviewed(model, sorted(self._versions(served)))
        if asked.undo:
            if served.version == served.base:
                raise Problem(HTTPStatus.CONFLICT, "nothing_before", f"{model} is ranked by its bundle's own normals")
            before, after = self._models.recalibrate(model, None, who())
            return answer(_recalibrated(True, reviewed, before, after))
        count = len(reviewed.normal_scores)
        if count < asked.minimum:
            message = (
                f"{count} of {reviewed.drawn} pictures drawn for review are known to be normal, and it takes "
                f"{asked.minimum}; review more of them (GET /v1/review)"
            )
            raise Problem(HTTPStatus.CONFLICT, "too_few_reviewed", message)
        if served.policy.mode == "guaranteed" and not asked.independent:
            message = (
                "the policy guarantees its rate, which takes pictures of which no two belong together, and feedback "
                'does not tell; say "independent": true if so, or set the mode average first'
            )
            raise Problem(HTTPStatus.CONFLICT, "not_independent", message)
        sample = Sample(reviewed.normal_scores, reviewed.normal_files, asked.independent)
        try:
            if asked.preview:
                before, after = self._models.would_be(model, sample)
            else:
                before, after = self._models.recalibrate(model, sample, who())
        except (CalibrationError, ConfigError) as error:
            message = f"the policy in force needs more reviewed normals: {error}"
            raise Problem(HTTPStatus.CONFLICT, "too_few_reviewed", message) from None
        return answer(_recalibrated(not asked.preview, reviewed, before, after))

    def audit(self) -> Response:
        asked = query_of(AuditWanted)
        rows = changes(self._kept().database, asked.cursor, asked.limit + 1)
        shown = [
            {
                **{name: row[name] for name in ("number", "by", "action", "subject")},
                "at": moment(row["at"]),
                "before": json.loads(row["before"]),
                "after": json.loads(row["after"]),
            }
            for row in rows[: asked.limit]
        ]
        return answer({"changes": shown, "next": shown[-1]["number"] if len(rows) > asked.limit else None})

    def _changed(self, model: str, choice: PolicyChoice) -> Served:
        _policy_of(self._models.pick(model), choice)
        return self._models.set_policy(model, choice, who())

    def _policy(self, served: Served) -> Response:
        book = self._models.decisions.policies(served.name)
        return answer({"policy": asdict(served.policy), "revisions": [_decision(one) for one in book]})

    def _kept(self) -> Store:
        _ = self._models.decisions
        assert self._store is not None
        return self._store

    def _versions(self, served: Served) -> set[str]:
        """All versions that give the same scores: those of the bundle, whatever normals ranked it."""
        book = self._models.decisions.calibrations(served.name, served.base)
        return {served.base, *(one.choice.version for one in book)}

    def _shown(self, served: Served) -> dict[str, Any]:
        return {
            **served.shown,
            "bundle": served.bundle,
            "base_version": served.base,
            "default": served.name == self._models.first,
            "loaded": [one.version for one in self._models.loaded(served.name)],
            "n": served.detector.calibration.n,
            "policy": asdict(served.policy),
            "image": served.detector.image.model_dump(mode="json"),
        }


def _policy_of(served: Served, choice: PolicyChoice) -> InForce:
    try:
        return InForce.of(served.detector, choice)
    except CalibrationError as error:
        raise Problem(HTTPStatus.BAD_REQUEST, "alpha_not_supported", str(error)) from None
    except ConfigError as error:
        raise Problem(HTTPStatus.BAD_REQUEST, "bad_parameter", str(error)) from None


def _decision(decided: Decided[PolicyChoice]) -> dict[str, Any]:
    choice = {name: getattr(decided.choice, name) for name in ("alpha", "mode", "threshold")}
    return {"revision": decided.revision, "by": decided.by, "at": moment(decided.at), **choice}


def _recalibrated(applied: bool, reviewed: Reviewed, before: Served, after: Served) -> dict[str, Any]:
    return {
        "applied": applied,
        "drawn": reviewed.drawn,
        "judged": reviewed.judged,
        "unclear": reviewed.unclear,
        "normal": len(reviewed.normal_scores),
        "before": _ranking(before, reviewed),
        "after": _ranking(after, reviewed),
    }


def _ranking(served: Served, reviewed: Reviewed) -> dict[str, Any]:
    scores, detector = reviewed.normal_scores, served.detector
    flagged = None
    if len(scores) and not detector.calibration.crossed:
        ranks, n = detector.calibration.p_values(scores), detector.calibration.n
        # Each among the others, as a new picture would be: a normal that calibrates stands beside itself.
        itself = np.isin(scores, detector.calibration.scores[0])
        ranks = np.where(itself, (ranks * (n + 1) - 1) / n, ranks)
        flagged = sum(served.policy.outliers(detector, scores.tolist(), ranks.tolist())) / len(scores)
    return {
        "version": served.version,
        "normals": detector.calibration.n,
        "expected_false_alarm_rate": served.policy.expected_false_alarm_rate,
        "band": served.policy.band,
        "flagged_normals": flagged,
    }

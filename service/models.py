"""The models that a service answers for: what each is now, what it was before, and how it becomes another.

A request picks a model once and is scored, ranked and judged by what it picked, whatever is activated meanwhile.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Any

from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from anomaly_vae import AnomalyVaeError, CalibrationError, ConfigError, Detector
from service import memory
from service.auditing import latest
from service.database import Database, reason_of
from service.decisions import ACTIONS, Activation, Decided, Decisions, PolicyChoice, Recalibration, Sample
from service.errors import Problem
from service.loading import Loading
from service.policies import BY_THRESHOLD, InForce
from service.served import NAME, Bundles, Served
from service.shelf import Shelf, Told
from service.tickets import Target

_log = logging.getLogger(__name__)
COMMAND_LINE = "command line"


class Models:
    """What is served under which name. Changes are decided in the store, so that all processes that share it agree.

    `loading` bounds how long a request waits for a bundle; `since` is when the command was started, in seconds since
    1970.
    """

    def __init__(
        self, bundles: Bundles, database: Database | None, told: Told, loading: Loading, since: float = math.inf
    ) -> None:
        self._bundles, self._loading = bundles, loading
        self._database, self._since = database, since
        self._decisions = Decisions(database) if database else None
        self._started = False
        self._changing = threading.Lock()
        self._shelf = Shelf(told)
        self._remarks: dict[str, str] = {}
        self._given: Activation | None = None
        self._seen = -1

    # --- what there is ----------------------------------------------------------------------------------------------

    def pick(self, name: str | None = None) -> Served:
        """The active version of a model, the first one's unless named; raises `Problem`."""
        served = self._shelf.active(self.first if name is None else name)
        if served is None:
            known = ", ".join(self._shelf.names())
            message = f"there is no model {str(name)[:64]!r}; there are {known}"
            raise Problem(HTTPStatus.NOT_FOUND, "unknown_model", message)
        return served

    def current(self, picked: Served) -> Served:
        """What was picked under the policy in force now, which may be another than when it was picked."""
        now = self._shelf.active(picked.name)
        return now if now is not None and now.target is picked.target else picked

    def that_scored(self, name: str, version: str) -> Served:
        """A loaded version that gives the scores that `version` gave; raises `Problem`."""
        for one in self.loaded(name):
            book = self.decisions.calibrations(name, one.base)
            if version in (one.version, one.base, *(decided.choice.version for decided in book)):
                return one
        message = f"version {version} of {name} is not loaded any more; load its bundle to see what it saw"
        raise Problem(HTTPStatus.GONE, "version_gone", message)

    def active(self) -> list[Served]:
        """All models, by name."""
        found = (self._shelf.active(name) for name in self._shelf.names())
        return [served for served in found if served is not None]

    def loaded(self, name: str) -> list[Served]:
        """Versions of a model in memory, the active one among them."""
        return self._shelf.loaded(name)

    def bundles(self) -> list[str]:
        """Names of the bundles that may be loaded."""
        return self._bundles.names()

    @property
    def decisions(self) -> Decisions:
        """The books; raises `Problem` where the service keeps none."""
        if self._decisions is None:
            message = "this service keeps no store, and a change would be forgotten; start it with -o store=PATH"
            raise Problem(HTTPStatus.CONFLICT, "no_store", message)
        return self._decisions

    # --- starting and staying up to date ----------------------------------------------------------------------------

    def start(self, name: str, bundle: str, detector: Detector) -> Target:
        """Serve the command line's detector, or what was activated since in its stead, and all other models that were;
        the latter once the store can be read. Runs on the models' thread.
        """
        self.first, self._given = name, Activation(bundle, detector.version)
        self._shelf.put(self._bundles.made(name, bundle, detector))
        try:
            self.refresh()
        except SQLAlchemyError as error:
            _log.warning("what was decided before cannot be read from the store yet: %s", reason_of(error))
        # Whatever it is then: a target of its own would keep the first version in memory for ever.
        return Target(lambda images, heat: self.pick().target.judge(images, heat), self.pick().target.probe)

    def started(self, warm: Callable[[Callable[[], None]], None]) -> None:
        """From now on models are warmed by this, which does work on the models' thread."""
        self._bundles.warm, self._started = warm, True

    def refresh(self) -> None:
        """Do what other processes decided, and what was decided before this one started; cheap where nothing was."""
        if self._decisions is None or self._database is None:
            return
        number = self._latest()
        if number != self._seen:
            if self._given is not None:
                self._note_start(self.first, self._given)
                self._given = None
            for model in sorted({*self._decisions.models(), *self._shelf.names()}):
                self._catch_up(model)
            for model, versions, at in self._decisions.retirements(self._seen):
                with self._changing:
                    idle = self._shelf.idle(model)
                    self._shelf.drop(model, [one for one in idle if one.version in versions and one.since < at])
            self._seen = number

    def _latest(self) -> int:
        return latest(self._database, ACTIONS) if self._database is not None else 0

    def _note_start(self, name: str, given: Activation) -> None:
        """Another bundle on the command line than last time is a decision as well; the same one is none."""
        assert self._decisions is not None
        book = self._decisions.activations(name)
        last = next((one.choice for one in book if one.by == COMMAND_LINE), None)
        ended = bool(book) and book[0].choice.retired
        # A process that is started again after it died decides nothing, whatever its command line said long ago.
        if ended or (last != given and not (book and book[0].at > self._since)):
            before = book[0].choice.version if book else None
            self._decisions.activate(name, given, COMMAND_LINE, before, given.version)

    def _catch_up(self, name: str) -> None:
        """Bring one model to what the books say of it; what cannot be done is logged once, and it stays as it is."""
        assert self._decisions is not None
        book = self._decisions.activations(name)
        now = self._shelf.active(name)
        if now is None and (not book or book[0].by == COMMAND_LINE or book[0].choice.retired):
            return  # what another command line served is for that one to serve
        try:
            found = None
            if book and not book[0].choice.retired and (now is None or book[0].choice.version != now.base):
                found = self._found(name, book[0].choice)
            with self._changing:
                self._bring(name, book, found)
            self._remarks.pop(name, None)
        except (AnomalyVaeError, Problem) as error:
            if self._remarks.get(name) != str(error):
                _log.warning("the model %s stays as it is: %s", name, error)
            self._remarks[name] = str(error)

    def _bring(self, name: str, book: list[Decided[Activation]], found: Served | None) -> None:
        assert self._decisions is not None
        if len(self._decisions.activations(name)) != len(book):
            return  # decided anew meanwhile, which the next look finds
        if book and book[0].choice.retired:
            if name != self.first:
                self._shelf.end(name)
        elif found is not None:
            self._shelf.put(self._decided(found))
        elif (now := self._shelf.active(name)) is not None:
            self._shelf.put(self._decided(now))

    # --- changes ----------------------------------------------------------------------------------------------------

    def load(self, name: str, bundle: str) -> Served:
        """Load and warm a bundle beside what is active, under a name that may be new; raises `Problem`."""
        _ = self.decisions
        if not NAME.fullmatch(name):
            message = f"{name[:64]!r} cannot name a model; use up to 64 letters, digits, dots, dashes and underscores"
            raise Problem(HTTPStatus.BAD_REQUEST, "bad_parameter", message)
        version = self._bundles.version(bundle)
        at_hand = next((one for one in self.loaded(name) if (one.base, one.bundle) == (version, bundle)), None)
        served = at_hand or self._read(name, bundle)
        with self._changing:
            served = self._decided(served)
            self._shelf.remember(served)
        memory.release()  # of what had to go for it, and of what reading it took
        return served

    def activate(self, name: str, version: str, by: str) -> Served:
        """Answer by a loaded version from the next request on; raises `Problem`."""
        with self._changing:
            return self._activated(self._that_is(name, version), by)

    def rollback(self, name: str, by: str) -> Served:
        """Go back to the bundle that was active before the present one; raises `Problem`."""
        now = self.pick(name)
        earlier = [one.choice for one in self.decisions.activations(name)]
        earlier = [choice for choice in earlier if not choice.retired and choice.version != now.base]
        if not earlier:
            message = f"{name} was never another bundle, so there is nothing to go back to"
            raise Problem(HTTPStatus.CONFLICT, "nothing_before", message)
        found = self._found(name, earlier[0])
        with self._changing:
            if self.pick(name).base != now.base:
                raise _conflict()
            return self._activated(found, by)

    def retire(self, name: str, version: str | None, by: str) -> list[str]:
        """Forget a version that is not active or (None) a whole model, and free its memory; which versions are gone.

        Raises `Problem`.
        """
        if not self.loaded(name):
            self.pick(name)
        with self._changing:
            gone = self._model_retired(name, by) if version is None else self._version_retired(name, version, by)
        memory.release()  # now that nothing here holds any of it
        return gone

    def _version_retired(self, name: str, version: str, by: str) -> list[str]:
        chosen = self._that_is(name, version)
        if chosen not in self._shelf.idle(name):
            message = f"{chosen.version} is what {name} answers by; activate another version first"
            raise Problem(HTTPStatus.CONFLICT, "in_use", message)
        self._kept(lambda: self.decisions.retire(name, chosen.version, by, self._versions(name)))
        self._shelf.drop(name, [chosen])
        return [chosen.version]

    def _model_retired(self, name: str, by: str) -> list[str]:
        if name == self.first:
            message = f"{name} is the command line's model, which answers where none is named, and cannot be retired"
            raise Problem(HTTPStatus.CONFLICT, "in_use", message)
        gone = self._versions(name)
        self._kept(lambda: self.decisions.retire(name, None, by, gone))
        self._shelf.end(name)
        return gone

    def set_policy(self, name: str, choice: PolicyChoice, by: str) -> Served:
        """Judge by another policy from the next verdict on; raises `Problem`."""
        with self._changing:
            now = self.pick(name)
            choice = choice if choice.threshold is None else replace(choice, base=now.base)
            after = InForce.of(now.detector, choice, base=now.base)
            revision = self._kept(
                lambda: self.decisions.set_policy(name, choice, by, _told_of(now.policy), _told_of(after))
            )
            return self._shelf.put(replace(now, policy=replace(after, revision=revision)))

    def recalibrate(self, name: str, sample: Sample | None, by: str) -> tuple[Served, Served]:
        """Rank among other normals, or None: among the bundle's own again. What it was, and what it is now.

        Raises `Problem`, and `CalibrationError` where the sample does not support the policy.
        """
        with self._changing:
            before, made = self.would_be(name, sample)
            choice = Recalibration(before.base, made.version, sample)
            revision = self._kept(lambda: self.decisions.recalibrate(name, choice, by, _ranked(before), _ranked(made)))
            return before, self._shelf.put(replace(made, calibration=revision))

    def would_be(self, name: str, sample: Sample | None) -> tuple[Served, Served]:
        """What a model is, and what it would be recalibrated; as `recalibrate`."""
        before = self.pick(name)
        made = before.ranked(sample, at=time.time())
        if before.policy.mode != BY_THRESHOLD:
            # The rate in force must go on, whatever larger one so few scores would support.
            InForce.of(made.detector, PolicyChoice(before.policy.alpha, before.policy.mode))
        return before, replace(made, policy=InForce.of(made.detector, *self._choice(name), made.base))

    def _activated(self, chosen: Served, by: str) -> Served:
        now = self._shelf.active(chosen.name)
        chosen = self._decided(chosen, strict=True)
        choice = Activation(chosen.bundle, chosen.base)
        before = None if now is None else now.version
        self._kept(lambda: self.decisions.activate(chosen.name, choice, by, before, chosen.version))
        return self._shelf.put(chosen)

    def _kept(self, decide: Callable[[], int]) -> int:
        try:
            return decide()
        except IntegrityError:
            raise _conflict() from None
        except SQLAlchemyError as error:
            _log.error("a change cannot be kept: %s", reason_of(error))
            message = "the store cannot be written now, so nothing was changed; try again when /ready says it is back"
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "store_down", message, retry_after=5.0) from None

    # --- making -----------------------------------------------------------------------------------------------------

    def _read(self, name: str, bundle: str) -> Served:
        work = partial(self._bundles.read, name, bundle)
        return self._loading.run(f"loading {bundle}", work, self._arrived) if self._started else work()

    def _arrived(self, served: Served) -> None:
        """It was loaded when nobody waited for it any more."""
        with self._changing:
            self._shelf.remember(served)
        self._seen = -1  # so that it is activated, where that was decided

    def _decided(self, served: Served, strict: bool = False) -> Served:
        """A version as the books have it: its calibration, then its policy.

        A policy that its calibration does not support is refused where `strict`, else the bundle's own stands in.
        """
        if self._decisions is None:
            return served
        book = self._decisions.calibrations(served.name, served.base)
        if book and book[0].revision != served.calibration:
            served = served.ranked(book[0].choice.sample, book[0].revision, book[0].at)
        choice, revision = self._choice(served.name)
        if revision == served.policy.revision:
            return served
        try:
            return replace(served, policy=InForce.of(served.detector, choice, revision, served.base))
        except (CalibrationError, ConfigError) as error:
            if strict:
                message = f"the policy in force does not suit version {served.version}: {error}"
                raise Problem(HTTPStatus.CONFLICT, "policy_not_supported", message) from None
            _log.warning("%s %s is judged by its own policy: %s", served.name, served.version, error)
            return replace(served, policy=InForce.of(served.detector))

    def _choice(self, name: str) -> tuple[PolicyChoice, int]:
        """The policy that the books have, and its revision."""
        policies = self.decisions.policies(name)
        return (policies[0].choice, policies[0].revision) if policies else (PolicyChoice(), 0)

    def _found(self, name: str, wanted: Activation) -> Served:
        """What was activated once, from memory or from its folder; raises `Problem`."""
        at_hand = next((one for one in self.loaded(name) if one.base == wanted.version), None)
        if at_hand is not None:
            return at_hand
        # The manifest tells what it is: what was put in its place need not be read whole, again and again.
        there = self._bundles.version(wanted.bundle)
        if there != wanted.version:
            message = f"the bundle {wanted.bundle} is version {there} now, not {wanted.version}; put that one back"
            raise Problem(HTTPStatus.CONFLICT, "bundle_replaced", message)
        return self._read(name, wanted.bundle)

    def _that_is(self, name: str, version: str) -> Served:
        chosen = next((one for one in self.loaded(name) if version in (one.version, one.base)), None)
        if chosen is None:
            there = ", ".join(self._versions(name)) or "none"
            message = f"version {version[:16]!r} of {name[:64]} is not loaded ({there} is); load its bundle first"
            raise Problem(HTTPStatus.CONFLICT, "not_loaded", message)
        return chosen

    def _versions(self, name: str) -> list[str]:
        return [one.version for one in self.loaded(name)]


def _conflict() -> Problem:
    message = "somebody else changed this model at the same moment; look again and repeat the request"
    return Problem(HTTPStatus.CONFLICT, "conflict", message)


def _told_of(policy: InForce) -> dict[str, Any]:
    return {"alpha": policy.alpha, "mode": policy.mode, "threshold": policy.threshold}


def _ranked(served: Served) -> dict[str, Any]:
    rate = served.policy.expected_false_alarm_rate
    return {"version": served.version, "normals": served.detector.calibration.n, "expected_false_alarm_rate": rate}

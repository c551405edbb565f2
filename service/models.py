"""The models that a service answers for: what each is now, what it was before, and how it becomes another.

A request picks a model once and is scored, ranked and judged by what it picked, whatever is activated meanwhile.
"""

import logging
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from anomaly_vae import AnomalyVaeError, BundleError, CalibrationError, ConfigError, Detector, Engine
from service.auditing import latest
from service.database import Database, reason_of
from service.decisions import ACTIONS, Activation, Decisions, PolicyChoice, Recalibration
from service.errors import Problem
from service.policies import BY_THRESHOLD, InForce
from service.refusals import refused
from service.tickets import NotAccepted, Target

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
COMMAND_LINE = "command line"
_MOST_LOADED = 3
"""Versions of one model in memory: what it is, what it was, and what it may become."""


@dataclass(frozen=True, eq=False)
class Served:
    """One version of a model, loaded and warm. `bundle`: its folder's name; `own`: the detector as that bundle has it.

    `calibration` is the revision that ranks `detector`, 0 for the bundle's own.
    """

    name: str
    bundle: str
    own: Detector
    detector: Detector
    prepare: "Callable[[bytes], Tensor]"
    target: Target
    policy: InForce
    calibration: int = 0

    @property
    def version(self) -> str:
        """As shown everywhere."""
        return self.detector.version

    @property
    def base(self) -> str:
        """The bundle's own version."""
        return self.own.version

    @property
    def shown(self) -> dict[str, str]:
        """In replies."""
        return {"name": self.name, "version": self.version}


class Models:
    """What is served under which name. Changes are decided in the store, so that all processes that share it agree.

    `told` hears of every version that comes into force; `folder` holds the bundles that may be loaded by name; `since`
    is when the command was started, in seconds since 1970.
    """

    def __init__(
        self,
        engine: Callable[[Detector], Engine],
        open_bundle: Callable[[Path], Detector],
        folder: Path | None,
        database: Database | None,
        told: Callable[[Served], None],
        since: float = math.inf,
    ) -> None:
        self._engine, self._open, self._folder, self._told = engine, open_bundle, folder, told
        self._database, self._since = database, since
        self._decisions = Decisions(database) if database else None
        self._warm: Callable[[Callable[[], None]], None] = lambda work: work()
        self._changing = threading.Lock()
        self._active: dict[str, Served] = {}
        self._loaded: dict[str, list[Served]] = {}
        self._given: Activation | None = None
        self._seen = -1

    # --- what there is ----------------------------------------------------------------------------------------------

    def pick(self, name: str | None = None) -> Served:
        """The active version of a model, the first one's unless named; raises `Problem`."""
        served = self._active.get(self.first if name is None else name)
        if served is None:
            known = ", ".join(sorted(self._active))
            message = f"there is no model {str(name)[:64]!r}; there are {known}"
            raise Problem(HTTPStatus.NOT_FOUND, "unknown_model", message)
        return served

    def current(self, picked: Served) -> Served:
        """What was picked under the policy in force now, which may be another than when it was picked."""
        now = self._active.get(picked.name)
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
        return [self._active[name] for name in sorted(self._active)]

    def loaded(self, name: str) -> list[Served]:
        """Versions of a model in memory, the active one among them."""
        return list(self._loaded.get(name, ()))

    def bundles(self) -> list[str]:
        """Names of the bundles that may be loaded."""
        if self._folder is None:
            return []
        return sorted(path.parent.name for path in self._folder.glob("*/bundle.yaml"))

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
        self._put(self._made(name, bundle, detector, detector))
        try:
            self.refresh()
        except SQLAlchemyError as error:
            _log.warning("what was decided before cannot be read from the store yet: %s", reason_of(error))
        return self._active[name].target

    def started(self, warm: Callable[[Callable[[], None]], None]) -> None:
        """From now on models are warmed by this, which does work on the models' thread."""
        self._warm = warm

    def refresh(self) -> None:
        """Do what other processes decided, and what was decided before this one started; cheap where nothing was."""
        if self._decisions is None or self._database is None:
            return
        number = self._latest()
        if number != self._seen:
            with self._changing:
                if self._given is not None:
                    self._note_start(self.first, self._given)
                    self._given = None
                for model in sorted({*self._decisions.models(), *self._active}):
                    self._catch_up(model)
                self._seen = number

    def _latest(self) -> int:
        return latest(self._database, ACTIONS) if self._database is not None else 0

    def _note_start(self, name: str, given: Activation) -> None:
        """Another bundle on the command line than last time is a decision as well; the same one is none."""
        assert self._decisions is not None
        book = self._decisions.activations(name)
        last = next((one.choice for one in book if one.by == COMMAND_LINE), None)
        # A process that is started again after it died decides nothing, whatever its command line said long ago.
        if last != given and not (book and book[0].at > self._since):
            before = book[0].choice.version if book else None
            self._decisions.activate(name, given, COMMAND_LINE, before, given.version)

    def _catch_up(self, name: str) -> None:
        """Bring one model to what the books say of it; what cannot be done is logged, and it stays as it is."""
        assert self._decisions is not None
        book = self._decisions.activations(name)
        now = self._active.get(name)
        if now is None and book[0].by == COMMAND_LINE:
            return  # what another command line served is for that one to serve
        try:
            if book and (now is None or book[0].choice.version != now.base):
                self._put(self._found(name, book[0].choice))
            elif now is not None:
                self._put(self._decided(now))
        except (AnomalyVaeError, Problem) as error:
            _log.warning("the model %s stays as it is: %s", name, error)

    # --- changes ----------------------------------------------------------------------------------------------------

    def load(self, name: str, bundle: str) -> Served:
        """Load and warm a bundle beside what is active, under a name that may be new; raises `Problem`."""
        _ = self.decisions
        if not _NAME.fullmatch(name):
            message = f"{name[:64]!r} cannot name a model; use up to 64 letters, digits, dots, dashes and underscores"
            raise Problem(HTTPStatus.BAD_REQUEST, "bad_parameter", message)
        with self._changing:
            served = self._read(name, bundle)
            self._remember(served)
        return served

    def activate(self, name: str, version: str, by: str) -> Served:
        """Answer by a loaded version from the next request on; raises `Problem`."""
        with self._changing:
            chosen = next((one for one in self.loaded(name) if version in (one.version, one.base)), None)
            if chosen is None:
                there = ", ".join(one.version for one in self.loaded(name)) or "none"
                message = f"version {version[:16]!r} of {name[:64]} is not loaded ({there} is); load its bundle first"
                raise Problem(HTTPStatus.CONFLICT, "not_loaded", message)
            return self._activated(chosen, by)

    def rollback(self, name: str, by: str) -> Served:
        """Go back to the bundle that was active before the present one; raises `Problem`."""
        now = self.pick(name)
        with self._changing:
            earlier = [one.choice for one in self.decisions.activations(name) if one.choice.version != now.base]
            if not earlier:
                message = f"{name} was never another bundle, so there is nothing to go back to"
                raise Problem(HTTPStatus.CONFLICT, "nothing_before", message)
            return self._activated(self._found(name, earlier[0]), by)

    def set_policy(self, name: str, choice: PolicyChoice, by: str) -> Served:
        """Judge by another policy from the next verdict on; raises `Problem`."""
        with self._changing:
            now = self.pick(name)
            choice = choice if choice.threshold is None else replace(choice, base=now.base)
            after = InForce.of(now.detector, choice, base=now.base)
            revision = self._kept(
                lambda: self.decisions.set_policy(name, choice, by, _told_of(now.policy), _told_of(after))
            )
            return self._put(replace(now, policy=replace(after, revision=revision)))

    def recalibrate(self, name: str, scores: Floats | None, by: str) -> tuple[Served, Served]:
        """Rank among other normals' scores, or None: among the bundle's own again. What it was, and what it is now.

        Raises `Problem`, and `CalibrationError` where the scores do not support the policy.
        """
        with self._changing:
            before, made = self.would_be(name, scores)
            choice = Recalibration(before.base, made.version, scores)
            revision = self._kept(lambda: self.decisions.recalibrate(name, choice, by, _ranked(before), _ranked(made)))
            return before, self._put(replace(made, calibration=revision))

    def would_be(self, name: str, scores: Floats | None) -> tuple[Served, Served]:
        """What a model is, and what it would be recalibrated; as `recalibrate`."""
        before = self.pick(name)
        own = before.own
        made = self._made(name, before.bundle, own, own if scores is None else own.recalibrated(scores))
        if before.policy.mode != BY_THRESHOLD:
            # The rate in force must go on, whatever larger one so few scores would support.
            InForce.of(made.detector, PolicyChoice(before.policy.alpha, before.policy.mode))
        return before, replace(made, policy=InForce.of(made.detector, *self._choice(name), made.base))

    def _activated(self, chosen: Served, by: str) -> Served:
        now = self._active.get(chosen.name)
        chosen = self._decided(chosen, strict=True)
        choice = Activation(chosen.bundle, chosen.base)
        before = None if now is None else now.version
        self._kept(lambda: self.decisions.activate(chosen.name, choice, by, before, chosen.version))
        return self._put(chosen)

    def _kept(self, decide: Callable[[], int]) -> int:
        try:
            return decide()
        except IntegrityError:
            message = "somebody else changed this model at the same moment; look again and repeat the request"
            raise Problem(HTTPStatus.CONFLICT, "conflict", message) from None
        except SQLAlchemyError as error:
            _log.error("a change cannot be kept: %s", reason_of(error))
            message = "the store cannot be written now, so nothing was changed; try again when /ready says it is back"
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "store_down", message, retry_after=5.0) from None

    # --- making -----------------------------------------------------------------------------------------------------

    def _read(self, name: str, bundle: str) -> Served:
        if self._folder is None:
            message = "this service has no folder of bundles; start it with -o models=FOLDER"
            raise Problem(HTTPStatus.CONFLICT, "no_models_folder", message)
        place = self._folder / bundle
        if not _NAME.fullmatch(bundle) or not (place / "bundle.yaml").is_file():
            there = ", ".join(self.bundles()) or "none"
            message = f"there is no bundle {bundle[:64]!r} in the folder of models; there is {there}"
            raise Problem(HTTPStatus.NOT_FOUND, "unknown_bundle", message)
        try:
            opened = self._open(place)
            made = self._made(name, bundle, opened, opened)
        except (BundleError, ConfigError) as error:
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "bad_bundle", str(error)) from None
        return self._decided(made)

    def _made(self, name: str, bundle: str, own: Detector, detector: Detector, calibration: int = 0) -> Served:
        import torch

        engine = self._engine(detector)
        try:
            self._warm(engine.warm)
        except NotAccepted as refusal:
            raise refused(refusal) from None
        image = detector.image
        probe = torch.zeros((image.channels, image.height, image.width), dtype=torch.uint8)
        target, policy = Target(engine.judge, probe), InForce.of(engine.detector)
        return Served(name, bundle, own, engine.detector, engine.prepare, target, policy, calibration)

    def _decided(self, served: Served, strict: bool = False) -> Served:
        """A version as the books have it: its calibration, then its policy.

        A policy that its calibration does not support is refused where `strict`, else the bundle's own stands in.
        """
        if self._decisions is None:
            return served
        book, own = self._decisions.calibrations(served.name, served.base), served.own
        if book and book[0].revision != served.calibration:
            scores = book[0].choice.scores
            detector = own if scores is None else own.recalibrated(scores)
            served = self._made(served.name, served.bundle, own, detector, book[0].revision)
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
            return self._decided(at_hand)
        read = self._read(name, wanted.bundle)
        if read.base != wanted.version:
            message = f"the bundle {wanted.bundle} is version {read.base} now, not {wanted.version}; put that one back"
            raise Problem(HTTPStatus.CONFLICT, "bundle_replaced", message)
        return read

    def _put(self, served: Served) -> Served:
        """Make it what its name stands for."""
        before = self._active.get(served.name)
        self._active[served.name] = served
        self._remember(served)
        if before is not served:
            self._told(served)
        return served

    def _remember(self, served: Served) -> None:
        """Keep it in memory, and what is active, and what was last beside them."""
        others = [one for one in self._loaded.get(served.name, ()) if one.base != served.base]
        others.sort(key=lambda one: one is self._active.get(served.name))
        self._loaded[served.name] = [*others, served][-_MOST_LOADED:]


def _told_of(policy: InForce) -> dict[str, Any]:
    return {"alpha": policy.alpha, "mode": policy.mode, "threshold": policy.threshold}


def _ranked(served: Served) -> dict[str, Any]:
    rate = served.policy.expected_false_alarm_rate
    return {"version": served.version, "normals": served.detector.calibration.n, "expected_false_alarm_rate": rate}

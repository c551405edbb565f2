"""Putting the service together: models behind one queue, the store, metrics and all routes in one Flask application."""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flask import Flask
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import SQLAlchemyError

from anomaly_vae import Detector, Engine
from service.api import ScorePages
from service.edge import install
from service.health import HealthPages, Readiness
from service.ids import Ids
from service.keeping import Keeper
from service.keys import Keyring
from service.metrics import Metrics
from service.models import Models
from service.models_api import ModelPages
from service.openapi import Described
from service.recorder import Recorder
from service.routes import PathPart, Route, blueprint
from service.scans import KeptScans, Scans
from service.scans_api import ScanPages
from service.scoring import Scorer
from service.settings import ServiceSettings
from service.store import Kept, Store
from service.upkeep import Upkeep
from service.verdicts_api import VerdictPages

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0
"""How often a process asks the store whether another one decided anything."""


@dataclass(frozen=True)
class Running:
    """What has to be ended in good order."""

    scorer: Scorer
    recorder: Recorder | None
    store: Store | None
    upkeep: Upkeep | None
    ending: threading.Event

    def close(self, timeout: float) -> tuple[bool, bool]:
        """Finish what was accepted, and keep what is to be kept; whether both were done in so many seconds."""
        until = time.monotonic() + timeout
        self.ending.set()
        finished = self.scorer.close(timeout)
        kept = True
        if self.recorder is not None:
            # A store that is well takes a moment for what waits, however late the pictures were done.
            ended = self.recorder.close(max(5.0, until - time.monotonic()))
            kept = ended and not self.recorder.standing()["lost_verdicts"]
        if self.upkeep is not None:
            self.upkeep.close()
        if self.store is not None and kept:
            self.store.close()
        return finished, kept


def create_app(
    settings: ServiceSettings,
    name: str,
    load: Callable[[], Detector],
    open_bundle: Callable[[Path], Detector] = Detector.load,
    *,
    store: Store | None = None,
    readiness: Readiness | None = None,
    registry: CollectorRegistry | None = None,
    on_lost: Callable[[Exception], None] = lambda _: None,
    since: float = math.inf,
) -> Flask:
    """The Flask application, warmed up; `app.extensions["running"]` drains and closes it.

    `load` returns the first detector, of the bundle `name`, and is called on the models' own thread; `open_bundle`
    loads others by name. A given `readiness` is left to the caller to make ready; without one the application is ready
    at once. `on_lost` is called when no model can judge any more and the process should end. `since`: when the command
    was started (seconds since 1970), where this process may not be its first.
    """
    keyring = Keyring(settings.keys) if settings.keys else None
    stands, registry = readiness or Readiness(), registry or CollectorRegistry()
    metrics = Metrics(registry, settings.source)
    recorder = _recorder(store, settings, metrics)

    def lost(error: Exception) -> None:
        stands.become("failed")
        on_lost(error)

    def engine(detector: Detector) -> Engine:
        made = Engine(detector, settings.device, settings.max_batch, settings.precision)
        if made.remark:
            _log.warning("%s", made.remark)
        return made

    models = Models(
        engine, open_bundle, settings.models, store.database if store else None,
        lambda served: metrics.in_force(served.name, served.version, served.policy.expected_false_alarm_rate),
        since,
    )  # fmt: skip
    ids = Ids()
    upkeep = Upkeep(store, ids) if store else None
    keeper = Keeper(recorder, ids, settings.source, settings.images, settings.review_share)
    model = settings.model or name
    scorer = Scorer(models, lambda: models.start(model, name, load()), settings, metrics, keeper, lost)
    running = Running(scorer, recorder, store, upkeep, threading.Event())
    if store is not None:
        threading.Thread(target=_follow, args=(models, running.ending), name="follower", daemon=True).start()
    if recorder is not None:
        stands.tell("store", recorder.standing)
    app = Flask("service", static_folder=None)
    app.url_map.strict_slashes = False
    app.url_map.converters["default"] = PathPart
    install(app, metrics, keyring, settings.max_request_bytes, local=not settings.allow_remote)
    groups = _groups(running, settings, metrics, ids)
    groups["Health"] = HealthPages(stands, registry).routes()
    described = Described(groups, secured=keyring is not None)
    routes = [*described.routes(), *(route for group in groups.values() for route in group)]
    app.register_blueprint(blueprint("api", routes))
    app.extensions["running"] = running
    if readiness is None:
        stands.become("ready")
    return app


def _groups(running: Running, settings: ServiceSettings, metrics: Metrics, ids: Ids) -> dict[str, list[Route]]:
    """All routes of the product, by what they are about."""
    scores, store = ScorePages(running.scorer, settings, metrics), running.store
    groups = {"Pictures": scores.routes(), "Models and policies": ModelPages(running.scorer.models, store).routes()}
    if store is not None and running.recorder is not None:
        groups["Verdicts"] = VerdictPages(store, scores.heatmap, running.recorder.flush, settings.max_exports).routes()
        scans = Scans(store.database, KeptScans(settings.max_scans, settings.scan_days))
        groups["Scans"] = ScanPages(scans, ids, settings.source, settings.max_report_bytes).routes()
    return groups


def _recorder(store: Store | None, settings: ServiceSettings, metrics: Metrics) -> Recorder | None:
    if store is None:
        return None
    picture_bytes = None if settings.picture_megabytes is None else settings.picture_megabytes << 20
    counted = settings.minute_counts_days, settings.hour_counts_days
    kept = Kept(settings.verdict_days, settings.picture_days, picture_bytes, *counted)
    return Recorder(store, metrics, kept, settings.flush_ms / 1000, settings.store_buffer)


def _follow(models: Models, ending: threading.Event) -> None:
    """Do what other processes decide; a database tells nobody of its own accord."""
    while not ending.wait(_LOOK_SECONDS):
        try:
            models.refresh()
        except SQLAlchemyError:
            # The recorder says that the store is down; what was decided last still holds.
            continue
        except Exception:  # whatever it is, later decisions must be followed
            _log.exception("what another process decided cannot be followed")

"""Putting the service together: models behind one queue, the store, metrics and all routes in one Flask application."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from flask import Flask
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.middleware.proxy_fix import ProxyFix

from anomaly_vae import Detector, Engine
from service.alarms_api import AlarmPages
from service.allowance import Allowance
from service.api import ScorePages
from service.calibration_api import CalibrationPages
from service.edge import install
from service.front import Front
from service.health import HealthPages, Readiness
from service.ids import Ids
from service.keeping import Keeper
from service.keys import Keyring
from service.loading import Loading
from service.metrics import Metrics
from service.models import Models
from service.models_api import ModelPages
from service.openapi import Described
from service.pages import WebPages
from service.quick import Quick
from service.recorder import Recorder
from service.routes import PathPart, Route, blueprint
from service.scans import KeptScans, Scans
from service.scans_api import ScanPages
from service.scoring import Scorer
from service.served import Bundles, Served
from service.sessions import Sessions
from service.settings import ServiceSettings
from service.shelf import Told
from service.store import Kept, Store
from service.upkeep import Upkeep
from service.verdicts_api import VerdictPages
from service.watching import Watching

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


def _unchecked(path: Path) -> Detector:
    return Detector.load(path, checked=False)


def create_app(
    settings: ServiceSettings,
    name: str,
    load: Callable[[], Detector],
    open_bundle: Callable[[Path], Detector] = _unchecked,
    *,
    store: Store | None = None,
    readiness: Readiness | None = None,
    registry: CollectorRegistry | None = None,
    on_lost: Callable[[Exception], None] = lambda _: None,
    since: float = math.inf,
) -> Flask:
    """The Flask application, warmed up; `app.extensions["running"]` drains and closes it, and `["front"]` is what a
    server calls (see `Front`).

    `load` returns the first detector, of the bundle `name`, and is called on the models' own thread; `open_bundle`
    loads others by name, whose probes are then scored on that thread. A given `readiness` is left to the caller to make
    ready; without one the application is ready at once. `on_lost` is called when no model can judge any more and the
    process should end. `since`: when the command was started (seconds since 1970), where this process may not be its
    first.
    """
    keyring = Keyring(settings.keys) if settings.keys else None
    stands, registry = readiness or Readiness(), registry or CollectorRegistry()
    metrics = Metrics(registry, settings.source, settings.base_rates)
    watching = Watching(store.database, registry, settings.base_rates) if store else None
    recorder = _recorder(store, settings, metrics, watching)

    def lost(error: Exception) -> None:
        stands.become("failed")
        on_lost(error)

    def engine(detector: Detector) -> Engine:
        made = Engine(detector, settings.device, settings.max_batch, settings.precision)
        if made.remark:
            _log.warning("%s", made.remark)
        return made

    def in_force(served: Served) -> None:
        _tell(metrics, served, keyring.sources() if keyring else ())
        if watching is not None:
            watching.in_force(served)

    bundles = Bundles(settings.models, open_bundle, engine, settings.device, settings.max_batch, time.time)
    told, loading = Told(in_force, metrics.gone), Loading(settings.load_seconds)
    models = Models(bundles, store.database if store else None, told, loading, since)
    ids = Ids()
    upkeep = Upkeep(store, ids) if store else None
    keeper = Keeper(recorder, ids, settings.source, settings.images, settings.review_share)
    model = settings.model or name
    scorer = Scorer(models, lambda: models.start(model, name, load()), settings, metrics, keeper, lost)
    running = Running(scorer, recorder, store, upkeep, threading.Event())
    if watching is not None:
        threading.Thread(target=_follow, args=(models, watching, running.ending), name="follower", daemon=True).start()
    if recorder is not None:
        stands.tell("store", recorder.standing)
    app = Flask("service", static_folder=None)
    app.url_map.strict_slashes = False
    app.url_map.converters["default"] = PathPart
    allowance, local = Allowance(), not settings.allow_remote
    sessions = Sessions(keyring, store.database if store else None, settings.session_hours) if keyring else None
    install(app, metrics, keyring, settings.max_request_bytes, allowance, local=local, sessions=sessions)
    quick = Quick(scorer, settings, metrics, keyring, allowance)
    groups = _groups(running, settings, metrics, watching, sessions, ids)
    groups["Health"] = HealthPages(stands, registry).routes()
    described = Described(groups, secured=keyring is not None)
    routes = [*described.routes(), *(route for group in groups.values() for route in group)]
    app.register_blueprint(blueprint("api", routes))
    if (proxies := settings.trusted_proxies) > 0:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=proxies, x_proto=proxies)  # type: ignore[method-assign]
    app.extensions["running"] = running
    app.extensions["front"] = Front(app, quick, settings.threads_for_requests(), settings.body_seconds)
    if readiness is None:
        stands.become("ready")
    return app


def _tell(metrics: Metrics, served: Served, sources: Iterable[str]) -> None:
    rate, detector = served.policy.expected_false_alarm_rate, served.detector
    metrics.in_force(served.name, served.version, rate, detector.calibration.n, detector.calibrated_at, sources)


def _groups(
    running: Running,
    settings: ServiceSettings,
    metrics: Metrics,
    watching: Watching | None,
    sessions: Sessions | None,
    ids: Ids,
) -> dict[str, list[Route]]:
    """All routes of the product, by what they are about."""
    scores, store, models = ScorePages(running.scorer, settings, metrics), running.store, running.scorer.models
    groups = {
        "Pictures": scores.routes(),
        "Models and policies": [*ModelPages(models, store).routes(), *CalibrationPages(models, store).routes()],
    }
    if store is not None and running.recorder is not None:
        flush, exports = running.recorder.flush, settings.max_exports
        groups["Verdicts"] = VerdictPages(store, scores.heatmap, flush, scores.regions, exports).routes()
        scans = Scans(store.database, KeptScans(settings.max_scans, settings.scan_days))
        groups["Scans"] = ScanPages(
            scans, ids, store, models, metrics, settings.source, settings.max_report_bytes
        ).routes()
    if watching is not None:
        groups["Alarms"] = AlarmPages(watching.alarms).routes()
    rules = [route.rule for group in groups.values() for route in group]
    groups["The page"] = WebPages(sessions, scores.usage, rules).routes()
    return groups


def _recorder(
    store: Store | None, settings: ServiceSettings, metrics: Metrics, watching: Watching | None
) -> Recorder | None:
    if store is None or watching is None:
        return None
    picture_bytes = None if settings.picture_megabytes is None else settings.picture_megabytes << 20
    counted = settings.minute_counts_days, settings.hour_counts_days
    kept = Kept(settings.verdict_days, settings.picture_days, picture_bytes, *counted)
    flush_seconds, also = settings.flush_ms / 1000, watching.alarms.count
    return Recorder(store, metrics, kept, flush_seconds, settings.store_buffer, also=also)


def _follow(models: Models, watching: Watching, ending: threading.Event) -> None:
    """Do what other processes decide; a database tells nobody of its own accord."""
    while not ending.wait(_LOOK_SECONDS):
        try:
            models.refresh()
            watching.refresh()
        except SQLAlchemyError:
            # The recorder says that the store is down; what was decided last still holds.
            continue
        except Exception:  # whatever it is, later decisions must be followed
            _log.exception("what another process decided cannot be followed")

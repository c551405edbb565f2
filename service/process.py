"""Running the service under granian (`serve`), and the `serve` command.

The command's process stays light: it never touches torch, only watches over one worker process, which loads the model
after it was started (a process forked after CUDA was initialised cannot use CUDA) and is started again if it dies.
Imports of anything heavy are therefore inside functions.
"""

import asyncio
import errno
import logging
import math
import multiprocessing
import multiprocessing.util
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from anomaly_vae import Detector
    from service.app import Running
    from service.front import Front
    from service.health import Readiness
    from service.settings import ServiceSettings
    from service.store import Store

_FAREWELL_SECONDS = 15
"""What keeping the last verdicts may take beyond the time to judge them."""


def serve(bundle: Path, settings: "ServiceSettings") -> None:
    """Serve a bundle until SIGTERM or Ctrl-C, then finish what was accepted; raises `AnomalyVaeError`."""
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces, Loops
    from granian.log import LogLevels

    from anomaly_vae import AnomalyVaeError

    with _claimed(settings.host, settings.port, "port") as main:
        port = main.getsockname()[1]
        with _claimed(settings.host, settings.separate_health_port(port), "health_port") as health:
            place = Place(bundle, settings, port, health.getsockname()[1], time.time())
            _say_that_it_starts(bundle)
            lifeline, held = multiprocessing.Pipe(duplex=False)
            told, report = multiprocessing.Pipe(duplex=False)
            server = Granian(
                "service.process",
                address=settings.host,
                port=port,
                interface=Interfaces.RSGI,
                loop=Loops.asyncio,
                http=HTTPModes.http1,
                websockets=False,
                backlog=settings.backlog,
                backpressure=settings.backlog,
                respawn_failed_workers=True,
                workers_kill_timeout=math.ceil(settings.drain_seconds + _FAREWELL_SECONDS),
                log_level=LogLevels.error,
                ssl_cert=settings.tls_certificate,
                ssl_key=settings.tls_key,
            )
            code = _until_stopped(server, partial(_load, place, lifeline, held, report))
    if told.poll():
        code, message = told.recv()
    elif code:
        message = "the process that holds the model keeps dying; its last words are above"
    if code:
        error = AnomalyVaeError(message)
        error.exit_code = code
        raise error


def _say_that_it_starts(bundle: Path) -> None:
    """Many large models take many seconds until they answer; a bundle that is not there has its own line."""
    if (bundle / "bundle.yaml").is_file():
        sys.stderr.write(f"starting: loading {bundle} and warming it up; several large models take a while\n")
        sys.stderr.flush()


def serve_command(
    bundle: Annotated[Path, typer.Argument(help="Folder of a trained detector.", show_default=False)],
    config: Annotated[Path | None, typer.Option(help="YAML settings; see configs/service.yaml.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes any free one.", show_default="8765")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", show_default="auto")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--override", "-o", metavar="KEY=VALUE", help="Any other setting.")
    ] = None,
) -> None:
    """Serve a detector over HTTP until Ctrl-C: POST pictures to /v1/score, get calibrated verdicts."""
    from service.settings import ServiceSettings

    given = {"host": host, "port": port, "device": device}
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    serve(bundle, ServiceSettings.load(config, [*options, *(override or [])]))


@dataclass(frozen=True)
class Place:
    """What is served where; the ports are those really taken."""

    bundle: Path
    settings: "ServiceSettings"
    port: int
    health_port: int
    started: float

    def url(self, port: int) -> str:
        host = self.settings.host
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def address(self) -> str:
        """Where the service answers."""
        url = self.url(self.port)
        return url.replace("http:", "https:", 1) if self.settings.tls_certificate else url


def _until_stopped(server: Any, loader: Callable[[], "Front"]) -> int:
    try:
        server.serve(target_loader=loader, wrap_loader=False)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _claimed(host: str, port: int, setting: str) -> socket.socket:
    """A socket that keeps a port without listening, for the worker to share; raises `ConfigError` if it is taken.

    The server shares ports (SO_REUSEPORT), so that without this a second service on the same port would silently get
    every other request of the first.
    """
    from anomaly_vae import ConfigError

    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
            taken = alone.getsockname()
        shared = socket.socket(family)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind(taken)
    except OSError as error:
        what = f"{host}:{port} cannot be listened on ({error.strerror})"
        if setting == "health_port":
            what += ", the port after --port, for health and metrics; set -o health_port=0 for any free one"
        elif error.errno == errno.EACCES:
            what += "; ports below 1024 need root: choose a higher one"
        else:
            what += "; stop what uses it or choose another --port, 0 for any free one"
        raise ConfigError(f"{setting}: {what}") from None
    return shared


def _load(place: Place, lifeline: Connection, held: Connection, report: Connection) -> "Front":
    """The application, in the worker process; what goes wrong is reported to the command's process, which ends."""
    from anomaly_vae import AnomalyVaeError

    # Until granian takes them over: the handlers inherited from the command's process would lose a SIGTERM.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    held.close()
    try:
        return _start(place, lifeline)
    except AnomalyVaeError as error:
        report.send((error.exit_code, str(error)))
    except Exception as error:
        traceback.print_exc()
        report.send((1, f"the service could not start: {type(error).__name__}: {error}"))
    os.kill(os.getppid(), signal.SIGTERM)
    while True:
        signal.pause()


def _start(place: Place, lifeline: Connection) -> "Front":
    # How long OpenMP's threads spin before they sleep; it is read when torch is first imported. On two cores a picture
    # then takes 4 ms, or 6 beside other programs; without spinning 8 and 4, with ten times more 4 and 30.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    import prometheus_client

    from service.app import create_app
    from service.health import Readiness, serve_health
    from service.logs import start_logging
    from service.store import Store

    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series and tell what process_start_time tells
    settings = place.settings
    start_logging(settings.logs, settings.log_requests)
    readiness, registry = Readiness(), prometheus_client.CollectorRegistry()
    serve_health(settings.host, place.health_port, readiness, registry)
    place_of_store = settings.place_of_store(place.bundle)
    app = create_app(
        settings,
        place.bundle.resolve().name,
        lambda: _opened(place.bundle, settings.device),
        lambda path: _opened(path, settings.device, checked=False),
        store=Store(place_of_store, patient=True) if place_of_store else None,
        readiness=readiness,
        registry=registry,
        on_lost=_give_up,
        since=place.started,
    )
    running: Running = app.extensions["running"]
    armed = _drain_first(readiness, running, lifeline)
    # Whatever ends this process, the accepted pictures are judged first.
    multiprocessing.util.Finalize(None, _farewell, args=(running, settings.drain_seconds), exitpriority=1)
    threading.Thread(target=_announce, args=(place, running, readiness, armed), name="announce", daemon=True).start()
    front: Front = app.extensions["front"]
    return front


def _opened(path: Path, device: str, checked: bool = True) -> "Detector":
    """A bundle's detector; raises `ConfigError` for one whose scores take seconds a picture. `checked`: see `load`."""
    from anomaly_vae import ConfigError, Detector, pick_device

    detector = Detector.load(path, pick_device(device), checked)
    if detector.spec.offline:
        raise ConfigError(f"{path} holds scores too slow for a service (offline: true); use anomaly-vae scan")
    return detector


def _give_up(error: Exception) -> None:
    """The model is lost: end this process in good order; the command's process starts another."""
    logging.getLogger(__name__).error("the model cannot judge any more: %s: %s", type(error).__name__, error)
    os.kill(os.getpid(), signal.SIGTERM)


def _drain_first(readiness: "Readiness", running: "Running", lifeline: Connection) -> threading.Event:
    """Be unready from the instant a signal to stop comes, or the command's process is gone (`lifeline` ends); then
    let granian stop, which is told once: told twice, as by Ctrl-C and its parent, it hangs for good.

    The event tells when signals are heard.
    """
    from granian import _signals

    install: Callable[..., Any] = _signals.set_loop_signals

    def install_ours(loop: asyncio.AbstractEventLoop) -> Any:
        stop = install(loop)

        def drain() -> None:
            if stopping.is_set():
                return  # two signals may come before the first is heard
            stopping.set()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            # The loop would give signals back to the system when it closes. A further one, and after Ctrl-C the
            # command's process sends one at once, would then kill this process while it keeps what was accepted.
            loop.remove_signal_handler = lambda sig: False  # type: ignore[method-assign]
            readiness.become("draining")
            running.scorer.drain()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, drain)
        threading.Thread(target=_watch, args=(lifeline,), name="lifeline", daemon=True).start()
        armed.set()
        return stop

    armed, stopping = threading.Event(), threading.Event()
    _signals.set_loop_signals = install_ours
    return armed


def _watch(lifeline: Connection) -> None:
    """Once the command's process is gone, whatever ended it, end this one as it would have."""
    wait([lifeline])
    os.kill(os.getpid(), signal.SIGTERM)


def _announce(place: Place, running: "Running", readiness: "Readiness", armed: threading.Event) -> None:
    """Be ready, and say so, once signals are heard and the front door itself answers."""
    armed.wait()
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(place.settings.host, place.settings.host)  # noqa: S104
    until = time.monotonic() + 60
    while True:
        try:
            with socket.create_connection((host, place.port), timeout=5):
                break
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
    readiness.become("ready")
    _say(_welcome(place, running))


def _welcome(place: Place, running: "Running") -> str:
    served, url = running.scorer.models.pick(), place.address
    policy, store = served.policy, running.store
    others = [one.name for one in running.scorer.models.active() if one.name != served.name]
    return f"""ready: model {served.name}, version {served.version}{f" (and {', '.join(others)})" if others else ""}
  address  {url}
  try      curl -F file=@picture.jpg {url}/v1/score
  verdict  outlier when p <= {policy.alpha:g} ({policy.mode}): {policy.expected_false_alarm_rate:.2%} false alarms
  store    {_told_of(store)}
  health   {place.url(place.health_port)}/ready, metrics at /metrics
  stop     Ctrl-C; what was accepted is finished first
"""


def _told_of(store: "Store | None") -> str:
    if store is None:
        return "none: verdicts are not kept (store: none)"
    return store.database.shown + ("" if store.database.opened else " cannot be reached yet: verdicts wait in memory")


def _farewell(running: "Running", drain_seconds: float) -> None:
    finished, kept = running.close(drain_seconds)
    lost = ("" if finished else ", some accepted ones not") + ("" if kept else "; some verdicts could not be kept")
    _say(f"stopped: {running.scorer.verdicts()} pictures scored{lost}\n")


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

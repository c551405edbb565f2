"""Whether this process lives and may be sent requests, and its metrics: on the main port, and on a port of its own.

The port of its own has its own threads, so that it answers while every request thread is busy, and before there is a
model.
"""

import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Literal
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from flask import Flask, Response, jsonify
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from anomaly_vae.answers import Live, Ready
from service.bodies import answer
from service.keys import Role
from service.routes import Route, blueprint

State = Literal["loading", "ready", "draining", "failed"]


class Readiness:
    """Where a process stands: loading, ready, then draining or failed, from which there is no way back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: State = "loading"
        self._more: dict[str, Callable[[], Any]] = {}

    @property
    def state(self) -> State:
        return self._state

    def tell(self, name: str, standing: Callable[[], Any]) -> None:
        """Say with every answer how something beside the model stands, which keeps nobody from scoring."""
        self._more[name] = standing

    def told(self) -> dict[str, Any]:
        """What `tell` named, as it stands now."""
        return {name: standing() for name, standing in list(self._more.items())}

    def become(self, state: State) -> None:
        """Move on; a process that drains or failed never becomes ready again."""
        with self._lock:
            if self._state in {"loading", "ready"}:
                self._state = state


class HealthPages:
    """Routes on how the process stands. All but the metrics are open to everybody."""

    def __init__(self, readiness: Readiness, registry: CollectorRegistry) -> None:
        self._readiness, self._registry = readiness, registry

    def routes(self) -> list[Route]:
        """All of them; `/live` and `/ready` for short."""
        metrics = (CONTENT_TYPE_LATEST.partition(";")[0],)
        return [
            *(Route("GET", rule, None, self.live, "Whether the process lives", Live)
              for rule in ("/live", "/v2/health/live")),
            *(Route("GET", rule, None, self.ready, "Whether pictures are taken: 503 unless they are", Ready, busy=Ready)
              for rule in ("/ready", "/v2/health/ready")),
            Route("GET", "/metrics", Role.READ, self.metrics, "Metrics for Prometheus", metrics),
        ]  # fmt: skip

    def live(self) -> Response:
        return answer({"live": True})

    def ready(self) -> Response:
        state = self._readiness.state
        status = HTTPStatus.OK if state == "ready" else HTTPStatus.SERVICE_UNAVAILABLE
        return answer({"ready": state == "ready", "state": state, **self._readiness.told()}, status)

    def metrics(self) -> Response:
        return Response(generate_latest(self._registry), content_type=CONTENT_TYPE_LATEST)


def serve_health(host: str, port: int, readiness: Readiness, registry: CollectorRegistry) -> int:
    """Serve the health pages on their own port and threads until the process ends; returns the port."""
    app = Flask("service.health", static_folder=None)
    app.register_blueprint(blueprint("health", HealthPages(readiness, registry).routes()))
    app.register_error_handler(404, lambda error: (jsonify(error={"code": "not_found", "message": str(error)}), 404))
    server = _HealthServer((host, port), _QuietHandler)
    server.set_app(app)
    threading.Thread(target=server.serve_forever, args=(3600.0,), name="health", daemon=True).start()
    return int(server.server_address[1])


class _HealthServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        if hasattr(socket, "SO_REUSEPORT"):  # a successor binds while its predecessor still drains
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        TCPServer.server_bind(self)  # not HTTPServer's, which asks the DNS for a name nobody needs
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _QuietHandler(WSGIRequestHandler):
    timeout = 5  # a client that sends nothing holds its thread no longer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        pass

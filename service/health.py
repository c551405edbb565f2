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

from flask import Blueprint, Flask, Response, jsonify
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from service.access import needs
from service.keys import Role

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


def health_pages(readiness: Readiness, registry: CollectorRegistry) -> Blueprint:
    """`/v2/health/live`, `/v2/health/ready` (503 unless ready), `/metrics`, and `/live` and `/ready` for short."""
    pages = Blueprint("health", __name__)

    @pages.get("/v2/health/live")
    @pages.get("/live")
    @needs(None)
    def live() -> Response:
        return jsonify(live=True)

    @pages.get("/v2/health/ready")
    @pages.get("/ready")
    @needs(None)
    def ready() -> tuple[Response, HTTPStatus]:
        state = readiness.state
        status = HTTPStatus.OK if state == "ready" else HTTPStatus.SERVICE_UNAVAILABLE
        return jsonify(ready=state == "ready", state=state, **readiness.told()), status

    @pages.get("/metrics")
    @needs(Role.READ)
    def metrics() -> Response:
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)

    return pages


def serve_health(host: str, port: int, readiness: Readiness, registry: CollectorRegistry) -> int:
    """Serve the health pages on their own port and threads until the process ends; returns the port."""
    app = Flask("service.health", static_folder=None)
    app.register_blueprint(health_pages(readiness, registry))
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

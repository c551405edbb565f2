"""The whole application in the tests' own process, for what cannot be seen from outside: threads, memory, openings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flask import Flask
from flask.testing import FlaskClient
from prometheus_client import CollectorRegistry, generate_latest

from anomaly_vae import Detector
from service.app import Running, create_app
from service.models import Models
from service.settings import ServiceSettings
from service.store import Store


class Inside:
    """An application with a store. Settings are as for `serve`."""

    def __init__(
        self, bundle: Path, store: Path, open_bundle: Callable[[Path], Detector] | None = None, **settings: Any
    ) -> None:
        wanted = ServiceSettings(device="cpu", models=bundle.parent, **{"flush_ms": 1.0, **settings})
        more = {} if open_bundle is None else {"open_bundle": open_bundle}
        self.registry = CollectorRegistry()
        self.app: Flask = create_app(
            wanted, bundle.name, lambda: Detector.load(bundle), store=Store(str(store)), registry=self.registry, **more
        )
        self.running: Running = self.app.extensions["running"]
        self.client: FlaskClient = self.app.test_client()

    @property
    def models(self) -> Models:
        return self.running.scorer.models

    def __call__(self, method: str, path: str, status: int = 200, **more: Any) -> Any:
        """The JSON of an answer with that status."""
        reply = self.client.open(path, method=method, **more)
        assert reply.status_code == status, reply.text
        return reply.json

    def score(self, *pictures: bytes, model: str = "") -> list[dict[str, Any]]:
        query = f"?model={model}" if model else ""
        found: list[dict[str, Any]] = []
        for data in pictures:
            found += self("POST", f"/v1/score{query}", data=data)["results"]
        assert self.running.recorder is not None
        assert self.running.recorder.flush(20)
        return found

    def metrics(self) -> str:
        return generate_latest(self.registry).decode()

    def close(self) -> None:
        assert self.running.close(30) == (True, True)


@contextmanager
def inside(*given: Any, **more: Any) -> Iterator[Inside]:
    """`Inside`, closed in the end."""
    found = Inside(*given, **more)
    try:
        yield found
    finally:
        found.close()

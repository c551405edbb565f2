"""`Problem`: the one way a request is refused, and the shape every client sees of it."""

from http import HTTPStatus
from typing import Any

from anomaly_vae import AnomalyVaeError


class Problem(AnomalyVaeError):
    """What a client is told: an HTTP status, a stable `code` for machines and one line for people.

    `retry_after` (seconds) is given where trying again later is the remedy.
    """

    def __init__(self, status: HTTPStatus, code: str, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON value under `error`."""
        found: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.retry_after is not None:
            found["retry_after_ms"] = max(1, round(self.retry_after * 1000))
        return found

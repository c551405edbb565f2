"""The same detector behind LitServe, for benchmarks/serve.py: python serve_litserve.py BUNDLE PORT SETTINGS(json)."""

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["GOMP_SPINCOUNT"] = "2000"  # as the service has it

import litserve  # type: ignore[import-not-found]
import torch

from anomaly_vae import Detector, Engine


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Pictures come as base64 in JSON, since it reads no raw bodies; all else is the library's own."""

    def __init__(self, bundle: Path, threads: int, precision: str, native: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self._bundle, self._threads, self._precision, self._native = bundle, threads, precision, native

    def setup(self, device: str) -> None:
        """In each worker process: load the detector."""
        torch.set_num_threads(self._threads)
        self._engine = Engine(Detector.load(self._bundle), device, self.max_batch_size, self._precision)
        if self._native:
            self._engine.warm()

    def decode_request(self, request: dict[str, str]) -> torch.Tensor:
        """A picture as the engine takes it."""
        return self._engine.prepare(base64.b64decode(request["image"]))

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Pictures side by side."""
        return torch.stack(inputs)

    def predict(self, images: torch.Tensor) -> list[dict[str, Any]]:
        """A row for each picture."""
        judged = self._engine.judge(images)
        return [judged.row(i) for i in range(len(judged))]

    def unbatch(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """They are apart already."""
        return rows

    def encode_response(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row is JSON already."""
        return row


if __name__ == "__main__":
    settings = json.loads(sys.argv[3])
    api = Api(
        Path(sys.argv[1]),
        settings["threads"],
        settings["precision"],
        settings["native"],
        max_batch_size=settings["max_batch"],
        batch_timeout=settings["batch_timeout"],
    )
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=settings["workers"])
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="error")

"""Sends a finished scan to a service: its counts, its rows in batches, its report.

The service knows how many rows it has, and takes none but the next: what was sent before, by whichever go, is passed
over, and a batch whose answer was lost may be sent again.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from anomaly_vae.client import Client
from anomaly_vae.errors import AnomalyVaeError, ConfigError, ServiceError
from anomaly_vae.retrying import Retries
from anomaly_vae.scan_outbox import Unsent

_ROWS, _BYTES = 500, 1 << 20
"""A batch is sent when it has so many rows, or would have more bytes than this."""
_PATIENCE = Retries(times=100, seconds=60.0)
"""A service that is restarted meanwhile is waited for."""
_TOLD_SECONDS = 10.0
_LONGEST_PATH, _LONGEST_ERROR = 20_000, 2000
_NO_ACCESS = (401, 403)

Tell = Callable[[str], None]


def check(url: str, key: str | None, tell: Tell) -> None:
    """Before hours of scanning: refuse an address or a key that cannot be right; one that does not answer may later."""
    try:
        with Client(url, key, timeout=10.0, retries=Retries(times=0)) as client:
            client.models()
    except ServiceError as error:
        if error.status in _NO_ACCESS:
            raise ConfigError(f"--send-to {url}: {error}") from None
        tell(f"{url} does not take the scan now ({error}); it is asked again when the result is written")


def send(url: str, key: str | None, unsent: Unsent, tables: Iterator[pa.Table], tell: Tell) -> str:
    """All that the service lacks; a line that says what it has now. `tables`: the rows of the result.

    Raises `AnomalyVaeError` in one line where the service refused, or stayed away.
    """
    count, rows = unsent.scan.scored + unsent.scan.failed, 0
    try:
        with Client(url, key, retries=_PATIENCE) as client:
            scan = client.add_scan(unsent.scan)
            rows, served, told = scan.rows, True, time.monotonic()
            if unsent.rows:
                for batch in _batches(tables, scan.rows):
                    taken = client.add_rows(scan.id, rows, batch)
                    rows, served = taken.rows, taken.served
                    if time.monotonic() - told >= _TOLD_SECONDS:
                        told = time.monotonic()
                        tell(f"{rows:,} of {count:,} rows sent to {url}")
            client.set_report(scan.id, unsent.page)
    except ServiceError as error:
        had = f" ({rows:,} of {count:,} rows sent)" if unsent.rows else ""
        what = f"the result is written, but {url} was not told of it{' all' if rows else ''}{had}: {error}"
        untold = AnomalyVaeError(f"{what}; mend that and repeat the command, which sends what is missing")
        untold.exit_code = error.exit_code
        raise untold from None
    with_rows = f" with {rows:,} rows of the source {scan.source}" if unsent.rows else ""
    unseen = f"; it does not serve version {scan.version}, so that Prometheus does not count them"
    return f"told {url} of it, as scan {scan.id}{with_rows}{'' if served else unseen}"


def _batches(tables: Iterator[pa.Table], skipped: int) -> Iterator[bytes]:
    """Lines of JSON from that row on."""
    lines: list[bytes] = []
    size = 0
    for table in tables:
        here = min(skipped, len(table))
        skipped -= here
        for start in range(here, len(table), _ROWS):
            for row in table.slice(start, _ROWS).to_pylist():
                line = json.dumps(_sendable(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"
                if lines and (len(lines) == _ROWS or size + len(line) > _BYTES):
                    yield b"".join(lines)
                    lines, size = [], 0
                lines.append(line)
                size += len(line)
    if lines:
        yield b"".join(lines)


def _sendable(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON and the service's bounds can have it."""
    score, path, error = row["score"], row["path"], row["error"]
    if score is not None and not math.isfinite(score):
        row, error = {**row, **dict.fromkeys(("score", "p_value", "outlier"))}, f"the model's score is {score}"
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
              for name, value in row.items()}  # fmt: skip
    return {**finite, "path": path[-_LONGEST_PATH:], "error": None if error is None else error[:_LONGEST_ERROR]}

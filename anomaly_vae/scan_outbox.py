"""A finished scan that a service shall have: kept beside its result until the service has all of it.

It lies in the folder of the scan's ledger, and is written before the result gets its name: whoever is killed at any
moment after that finds it again, and the service, which goes by the same token, takes no row twice.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from anomaly_vae.bundle import write_durably
from anomaly_vae.errors import DataError
from anomaly_vae.paths import printable
from anomaly_vae.scan_calls import FinishedScan

_TOLD, _PAGE = "unsent.json", "unsent.html"


@dataclass(frozen=True)
class Unsent:
    """`rows`: whether the service shall have them too. `facts`: what the command said of the scan."""

    scan: FinishedScan
    rows: bool
    facts: Mapping[str, Any]
    page: bytes


class Outbox:
    """Of the scan into `out` whose ledger lies in `folder`; `kind`: what tells it from scans of another kind.

    Whoever uses it holds the ledger's lock.
    """

    def __init__(self, folder: Path, out: Path, kind: Mapping[str, Any]) -> None:
        self._folder, self._out, self._kind = folder, out, dict(kind)

    def put(self, result: Path, unsent: Unsent) -> Unsent:
        """Keep it, for a result that is written and will get its name next; as it is kept, with a token."""
        scan = replace(unsent.scan, token=secrets.token_hex(16), started=_text(unsent.scan.started),
                       finished=_text(unsent.scan.finished))  # fmt: skip
        told = {"kind": self._kind, "result": _mark(result), "scan": asdict(scan), "rows": unsent.rows,
                "facts": dict(unsent.facts)}  # fmt: skip
        write_durably(self._folder / _PAGE, unsent.page)
        write_durably(self._folder / _TOLD, json.dumps(told, indent=1).encode())
        return replace(unsent, scan=scan)

    def left(self) -> Unsent | None:
        """What an earlier go left; None where there is nothing, or the result is another one by now.

        Raises `DataError` where it is of a scan of another kind.
        """
        try:
            told = json.loads((self._folder / _TOLD).read_bytes())
            if told["result"] != _mark(self._out):
                return None
        except FileNotFoundError:
            return None
        if told["kind"] != self._kind:
            what = (
                f"the scan into {printable(self._out)} before this one is of another kind, and not all of it was sent"
            )
            raise DataError(f"{what}; repeat it as it was to send the rest, or give --fresh to begin anew")
        page = (self._folder / _PAGE).read_bytes()
        return Unsent(FinishedScan(**told["scan"]), told["rows"], told["facts"], page)

    def clear(self) -> None:
        """There is nothing to send any more."""
        for name in (_TOLD, _PAGE):
            (self._folder / name).unlink(missing_ok=True)


def _mark(result: Path) -> list[int]:
    """By which a result is known again."""
    found = result.stat()
    return [found.st_size, found.st_mtime_ns]


def _text(moment: datetime | str) -> str:
    return moment if isinstance(moment, str) else moment.astimezone().isoformat()

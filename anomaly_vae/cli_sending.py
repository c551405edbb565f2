"""`scan --send-to`: the scan gets to a service when its result is written, or when the command is repeated."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomaly_vae import console
from anomaly_vae.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from anomaly_vae.scan_calls import FinishedScan
    from anomaly_vae.scan_outbox import Outbox, Unsent
    from anomaly_vae.scanning import Scan

KEY = "ANOMALY_VAE_KEY"


class Sending:
    """How a scan gets to the service at `url`, now or when its command is repeated; None: to none.

    `source`: what its rows are shown under.
    """

    def __init__(self, url: str | None, source: str | None, rows: bool, bundle: Path) -> None:
        self._url, self._source, self._rows = url, source, rows
        self._key = os.environ.get(KEY)
        # What a service would not take for a name, a folder may have.
        self._model = re.sub(r"[^A-Za-z0-9._-]", "-", bundle.resolve().name).lstrip("._-")[:64] or "model"
        self._outbox: Outbox | None = None
        self._unsent: Unsent | None = None

    def check(self) -> None:
        """Before hours of scanning rather than after them."""
        from anomaly_vae.scan_sending import check

        if self._url is None:
            if self._source is not None:
                raise ConfigError("--send-as is what a service shows rows under; add --send-to URL")
            return
        if self._source is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self._source):
            raise ConfigError(
                f"--send-as {self._source!r}: a source has up to 64 letters, digits, and . _ - in between"
            )
        check(self._url, self._key, console.note)

    def finished_before(self, scan: "Scan", out: Path, anew: bool) -> dict[str, Any] | None:
        """What was said of the same scan when it was finished, if it was not sent to its end; None otherwise.

        `anew`: it is forgotten, since all rows there are will be sent again.
        """
        from anomaly_vae.scan_outbox import Outbox

        kind = {**scan.kind, "model": self._model, "sent_as": self._source, "rows": self._rows}
        self._outbox = Outbox(scan.ledger.folder, out, kind)
        if not anew and self._url is not None:
            self._unsent = self._outbox.left()
        if self._unsent is None:
            self._outbox.clear()
            return None
        console.note(f"this scan was finished before; {self._url} gets what it lacks of it (--fresh begins anew)")
        return dict(self._unsent.facts)

    def keeping(
        self, told: "Callable[[str, str | None], FinishedScan]", facts: dict[str, Any], page: str
    ) -> "Callable[[Path], None] | None":
        """Keeps the scan for the service once its result is written; `told`: of that model and source."""
        from anomaly_vae.scan_outbox import Unsent

        if self._url is None:
            return None

        def keep(result: Path) -> None:
            assert self._outbox is not None
            unsent = Unsent(told(self._model, self._source), self._rows, facts, page.encode(errors="backslashreplace"))
            self._unsent = self._outbox.put(result, unsent)

        return keep

    def send(self, scan: "Scan") -> None:
        """Send it; then nothing of it is kept but the result."""
        from anomaly_vae.scan_sending import send

        if self._url is None or self._unsent is None:
            return
        console.note(send(self._url, self._key, self._unsent, scan.written(), console.note))
        scan.ledger.forget()

"""What both clients can do with scans of whole folders; `client` and `async_client` say how they are asked."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from anomaly_vae.answers import Forgotten
from anomaly_vae.asking import Ask, Moment, get, page_of, post
from anomaly_vae.errors import DataError
from anomaly_vae.watch_answers import RowsTaken, Scan, ScanPage

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class FinishedScan:
    """What a service is told of a scan.

    `version`: the model's, as its bundle says. `source`: by default the key's. `scored`, `failed` and `outliers` count
    pictures. `expected_rate`: of outliers, were all pictures normal. `token`: 32 hex digits made up at random, for a
    scan whose rows follow (`add_rows`); told again, it finds the scan that there is.
    """

    name: str
    model: str
    version: str
    source: str | None = None
    started: Moment
    finished: Moment
    scored: int
    failed: int
    outliers: int
    expected_rate: float
    alpha: float
    token: str | None = None


class ScanCalls(ABC):
    """Scans, for `Client`."""

    def add_scan(self, scan: FinishedScan) -> Scan:
        """Tell of a scan that came to its end."""
        return self._do(_added(scan))

    def add_rows(self, scan: str, first: int, lines: bytes) -> RowsTaken:
        """Send rows of a scan's result, lines of JSON as `scan --out x.ndjson` writes them, up to 1,000 at a time;
        `first`: the place of the first of them, from 0. What is there already is passed over."""
        return self._do(_with_rows(scan, first, lines))

    def set_report(self, scan: str, report: bytes | Path) -> Scan:
        """Send a scan's report: an HTML page that fetches nothing, or the path of one."""
        return self._do(_reported(scan, report))

    def scans(self, limit: int | None = None) -> Iterator[Scan]:
        """Scans, the newest first: all, or `limit` of them."""
        cursor, left = None, limit
        while left is None or left > 0:
            page = self._do(get("/v1/scans", ScanPage, {"cursor": cursor, "limit": page_of(left)}))
            yield from page.scans
            cursor, left = page.next, None if left is None else left - len(page.scans)
            if cursor is None:
                return

    def scan(self, scan: str) -> Scan:
        """One scan."""
        return self._do(get(_path(scan), Scan))

    def report(self, scan: str) -> bytes:
        """A scan's report, as HTML."""
        return self._do(get(_path(scan, "/report"), bytes))

    def forget_scan(self, scan: str) -> int:
        """Forget a scan and its report; how many there are no longer."""
        return self._do(Ask("DELETE", _path(scan), Forgotten)).forgotten

    @abstractmethod
    def _do(self, ask: Ask[_T]) -> _T: ...


class AsyncScanCalls(ABC):
    """Scans, for `AsyncClient`."""

    async def add_scan(self, scan: FinishedScan) -> Scan:
        """Tell of a scan that came to its end."""
        return await self._do(_added(scan))

    async def add_rows(self, scan: str, first: int, lines: bytes) -> RowsTaken:
        """Send rows of a scan's result, lines of JSON as `scan --out x.ndjson` writes them, up to 1,000 at a time;
        `first`: the place of the first of them, from 0. What is there already is passed over."""
        return await self._do(_with_rows(scan, first, lines))

    async def set_report(self, scan: str, report: bytes | Path) -> Scan:
        """Send a scan's report: an HTML page that fetches nothing, or the path of one."""
        return await self._do(_reported(scan, report))

    async def scans(self, limit: int | None = None) -> AsyncIterator[Scan]:
        """Scans, the newest first: all, or `limit` of them."""
        cursor, left = None, limit
        while left is None or left > 0:
            page = await self._do(get("/v1/scans", ScanPage, {"cursor": cursor, "limit": page_of(left)}))
            for scan in page.scans:
                yield scan
            cursor, left = page.next, None if left is None else left - len(page.scans)
            if cursor is None:
                return

    async def scan(self, scan: str) -> Scan:
        """One scan."""
        return await self._do(get(_path(scan), Scan))

    async def report(self, scan: str) -> bytes:
        """A scan's report, as HTML."""
        return await self._do(get(_path(scan, "/report"), bytes))

    async def forget_scan(self, scan: str) -> int:
        """Forget a scan and its report; how many there are no longer."""
        return (await self._do(Ask("DELETE", _path(scan), Forgotten))).forgotten

    @abstractmethod
    async def _do(self, ask: Ask[_T]) -> _T: ...


def _path(scan: str, rest: str = "") -> str:
    return f"/v1/scans/{quote(scan, safe='')}{rest}"


def _added(scan: FinishedScan) -> Ask[Scan]:
    def text(moment: Moment) -> str:
        return moment if isinstance(moment, str) else moment.astimezone().isoformat()

    times = {"started": text(scan.started), "finished": text(scan.finished)}
    ask = post("/v1/scans", Scan, **{**asdict(scan), **times})
    return replace(ask, repeatable=scan.token is not None)


def _with_rows(scan: str, first: int, lines: bytes) -> Ask[RowsTaken]:
    headers = {"Content-Type": "application/x-ndjson"}
    return Ask("POST", _path(scan, "/rows"), RowsTaken, {"first": first}, content=lines, headers=headers,
               repeatable=True)  # fmt: skip


def _reported(scan: str, report: bytes | Path) -> Ask[Scan]:
    if isinstance(report, bytes):
        return _sent(scan, report)
    try:
        return _sent(scan, report.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read the report {report} ({error.strerror}); give the path of a file") from None


def _sent(scan: str, html: bytes) -> Ask[Scan]:
    headers = {"Content-Type": "text/html"}
    return Ask("PUT", _path(scan, "/report"), Scan, content=html, headers=headers, repeatable=True)

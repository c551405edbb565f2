"""`Quick`: one picture sent as a request's plain body, scored without a thread of its own.

Most requests are of this kind, and most of what Flask and a thread a request would cost them is avoided here: the event
loop takes the picture in, and one call from the models' threads hands it the verdicts of a whole batch. Whatever is
not plain (forms, archives, heat maps, browsers) is left to Flask, and means the same there.
"""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import parse_qsl

from anomaly_vae import BadImage, peek
from service.access import admitted, is_own, presented_in
from service.allowance import Allowance
from service.api import deadline_ms, result
from service.archives import BLOCK, archive_kind
from service.asked import ScoreWanted
from service.bodies import parsed_query
from service.bridge import Incoming
from service.edge import (
    HEADERS,
    TLS_HEADERS,
    broken,
    count_refusal,
    failure_body,
    failure_headers,
    log_request,
    request_id_of,
)
from service.errors import Problem
from service.keys import Key, Keyring, Role
from service.metrics import Metrics
from service.options import Options
from service.scoring import Asked, Scorer
from service.settings import ServiceSettings
from service.tickets import Ticket
from service.uploads import RAW_KINDS, Upload, broken_body, slow_body

RULE = "/v1/score"
MOST_BYTES = 1 << 20
"""Of a body that is taken in here: as many as there are connections may wait at once."""
_SMALL_BYTES, _SMALL_PIXELS = 64 << 10, 512 * 512
"""What takes less time to decode than to hand to another thread."""
_NOT_PLAIN = ("transfer-encoding", "expect", "cookie", "origin", "sec-fetch-site")


class Headers(Protocol):
    """A request's headers by their names in small letters."""

    def get(self, key: str, default: Any = None) -> Any: ...
    def __contains__(self, key: str) -> bool: ...


@dataclass(frozen=True)
class Plain:
    """A request that can be answered here."""

    headers: Headers
    secure: bool
    query: str
    kind: str
    size: int
    started: float


@dataclass(frozen=True)
class Answer:
    """To be sent."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Quick:
    """`POST /v1/score` for one plain picture. `bind` it to the loop before the first."""

    def __init__(
        self,
        scorer: Scorer,
        settings: ServiceSettings,
        metrics: Metrics,
        keyring: Keyring | None,
        allowance: Allowance,
    ) -> None:
        self._scorer, self._settings, self._metrics = scorer, settings, metrics
        self._keyring, self._allowance = keyring, allowance
        self._decoders = ThreadPoolExecutor(settings.threads_for_decoding(), thread_name_prefix="decode")
        self._wakes: _Wakes | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop that requests come on."""
        self._wakes = _Wakes(loop)

    def plain(self, scope: Any) -> Plain | None:
        """The request, if it is one for here; nothing has been read of it yet."""
        headers: Headers = scope.headers
        if scope.method != "POST" or scope.path != RULE or any(name in headers for name in _NOT_PLAIN):
            return None
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()) or not 0 < int(length) <= self._most_bytes():
            return None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind and not kind.startswith("image/") and kind not in RAW_KINDS:
            return None
        if not self._can_ask(headers):
            return None
        return Plain(headers, self._is_secure(scope), scope.query_string, kind, int(length), time.monotonic())

    async def answer(self, request: Plain, incoming: Incoming) -> Answer | None:
        """The verdict, or why there is none; None for what only Flask can answer, which is then done nothing about."""
        request_id, key, status = request_id_of(request.headers.get("x-request-id", "")), None, HTTPStatus.OK
        headers = {"X-Request-Id": request_id, **HEADERS, **(TLS_HEADERS if request.secure else {})}
        try:
            if not _is_plain(request.query):
                return None
            body = await _whole(incoming, request.size)
            if archive_kind(body[:BLOCK], request.kind):
                return None
            key = self._admit(request)
            try:
                said = await self._scored(request, body, request_id, key)
            finally:
                if key is not None:
                    self._allowance.give_back(key, request.size)
        except Problem as problem:
            count_refusal(self._metrics, problem)
            status, said = problem.status, failure_body(problem, request_id)
            headers |= failure_headers(problem)
        except Exception as error:  # whatever it is, the client gets an answer
            fault = broken(error, request_id)
            status, said = fault.status, failure_body(fault, request_id)
        seconds = time.monotonic() - request.started
        log_request(self._metrics, request_id, "POST", RULE, status, seconds, request.size, key)
        text = json.dumps(said, allow_nan=False) + "\n"
        return Answer(status, [("Content-Type", "application/json"), *headers.items()], text.encode())

    async def _scored(self, request: Plain, body: bytes, request_id: str, key: Key | None) -> dict[str, Any]:
        assert self._wakes is not None
        wanted = _wanted(request.query)
        served = self._scorer.models.pick(wanted.model)
        left = deadline_ms(request.headers.get("x-deadline-ms"), self._settings.deadline_ms) / 1000
        deadline = request.started + left
        options = Options.of(wanted, served, named=key is None or key.role >= Role.READ)
        asked = Asked(served, deadline, options, request_id, key.source if key else None)
        self._metrics.stage("read", time.monotonic() - request.started)
        file, (done, wake) = Upload(None, body), self._wakes.one()
        if _is_small(body):
            ticket = self._scorer.begin(file, asked, wake)
        else:
            begin: Callable[[], Ticket] = partial(self._scorer.begin, file, asked, wake)
            ticket = await self._wakes.loop.run_in_executor(self._decoders, begin)
        late = self._wakes.loop.call_later(max(0.0, deadline - time.monotonic()), _set, done)
        try:
            await done
        except asyncio.CancelledError:  # the client has gone
            ticket.cancel()
            raise
        finally:
            late.cancel()
        verdict = self._scorer.finish(ticket, file, asked)
        return {"model": served.shown, "results": [result(None, verdict)]}

    def _is_secure(self, scope: Any) -> bool:
        """As werkzeug's ProxyFix has it for Flask."""
        proxies = self._settings.trusted_proxies
        schemes = scope.headers.get("x-forwarded-proto", "").split(",") if proxies else []
        scheme = schemes[-proxies].strip() if len(schemes) >= proxies > 0 else ""
        return (scheme or scope.scheme) == "https"

    def _most_bytes(self) -> int:
        return min(MOST_BYTES, self._settings.max_request_bytes)

    def _can_ask(self, headers: Headers) -> bool:
        if self._keyring is None:
            return self._settings.allow_remote or is_own(headers.get("host", ""))
        return presented_in(headers.get("authorization", ""), headers.get("x-api-key")) is not None

    def _admit(self, request: Plain) -> Key | None:
        if self._keyring is None:
            return None
        headers = request.headers
        presented = presented_in(headers.get("authorization", ""), headers.get("x-api-key"))
        key = admitted(self._keyring, presented or "", Role.SCORE)
        self._allowance.take(key, request.size)
        return key


class _Wakes:
    """Futures that other threads resolve; those of one batch by one call into the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._done: list[asyncio.Future[None]] = []

    def one(self) -> tuple[asyncio.Future[None], Callable[[], None]]:
        """A future, and what resolves it from any thread."""
        future: asyncio.Future[None] = self.loop.create_future()
        return future, partial(self._wake, future)

    def _wake(self, future: "asyncio.Future[None]") -> None:
        with self._lock:
            self._done.append(future)
            first = len(self._done) == 1
        if first and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        with self._lock:
            done, self._done = self._done, []
        for future in done:
            _set(future)


def _set(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


async def _whole(incoming: Incoming, size: int) -> bytes:
    try:
        body = await incoming.whole()
    except TimeoutError:
        raise slow_body() from None
    except OSError:
        raise broken_body() from None
    if len(body) != size:
        raise broken_body()
    return body


def _is_small(body: bytes) -> bool:
    if len(body) > _SMALL_BYTES:
        return False
    try:
        info = peek(body)
    except BadImage:
        return True  # refused without decoding
    return info.width * info.height <= _SMALL_PIXELS


@lru_cache(256)
def _wanted(query: str) -> ScoreWanted:
    """What a query asks; raises `Problem`."""
    return parsed_query(ScoreWanted, parse_qsl(query, keep_blank_values=True))


def _is_plain(query: str) -> bool:
    """Whether nothing is asked that takes a thread; raises `Problem`."""
    wanted = _wanted(query)
    return wanted.heatmap == "none" and not (wanted.explain or wanted.reconstruction)

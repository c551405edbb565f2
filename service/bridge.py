"""`Bridge`: a WSGI application behind granian's asynchronous interface (RSGI), each request on a thread of a pool.

The event loop reads bodies and writes answers, so that a slow client holds a thread only while its body comes, and
that for no longer than the settings allow.
"""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Protocol, TypeVar
from wsgiref.types import WSGIApplication

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
SLOWEST = 16 * 1024
"""Bytes a second that a body must bring on average, once its first seconds are over."""


class Stream(Protocol):
    """Where the pieces of an answer go."""

    def send_bytes(self, data: bytes) -> Awaitable[None]: ...


class Exchange(Protocol):
    """One request's body, and the way back (granian's `RSGIHTTPProtocol`)."""

    def __call__(self) -> Awaitable[bytes]: ...
    def __aiter__(self) -> AsyncIterator[bytes]: ...
    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None: ...
    def response_stream(self, status: int, headers: list[tuple[str, str]]) -> Stream: ...


class Incoming:
    """A body as it comes, for coroutines; raises `OSError` where it breaks off, `TimeoutError` where it is too slow."""

    def __init__(self, exchange: Exchange, first_seconds: float) -> None:
        self._exchange = exchange
        self._chunks: AsyncIterator[bytes] | None = None
        self._until = time.monotonic() + first_seconds
        self._whole: bytes | None = None

    async def next(self) -> bytes:
        """Some more of it; nothing at its end."""
        if self._whole is not None:
            chunk, self._whole = self._whole, b""
            return chunk
        async with asyncio.timeout(max(0.0, self._until - time.monotonic())):
            chunk = await self._some()
        self._until += len(chunk) / SLOWEST
        return chunk

    async def whole(self) -> bytes:
        """All of a body that was announced to be small; it can be read all the same."""
        async with asyncio.timeout(max(0.0, self._until - time.monotonic())):
            try:
                self._whole = await self._exchange()
            except RuntimeError as error:  # granian's errors are
                raise OSError(str(error)) from None
        return self._whole

    async def _some(self) -> bytes:
        if self._chunks is None:
            self._chunks = aiter(self._exchange)
        # granian ends a whole body with one empty chunk, and one that breaks off with two.
        for _ in range(2):
            try:
                if chunk := await anext(self._chunks):
                    return bytes(chunk)
            except StopAsyncIteration:
                return b""
        raise OSError("the connection broke")


class Bridge:
    """`application` on at most `threads` requests at once. `bind` it to the loop before the first."""

    def __init__(self, application: WSGIApplication, threads: int) -> None:
        self._application = application
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="request")
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop that requests come on."""
        self._loop = loop

    async def answer(self, scope: Any, exchange: Exchange, body: Incoming) -> None:
        """Have a request answered."""
        assert self._loop is not None
        environ = {**_environ(scope), "wsgi.input": _Input(self._loop, body)}
        await self._loop.run_in_executor(self._pool, self._run, environ, exchange)

    def _run(self, environ: dict[str, Any], exchange: Exchange) -> None:
        started: list[tuple[int, list[tuple[str, str]]]] = []

        def start_response(status: str, headers: list[tuple[str, str]], _: Any = None) -> Any:
            started[:] = [(int(status.split(" ", 1)[0]), [(name.lower(), value) for name, value in headers])]

        pieces: Iterable[bytes] = self._application(environ, start_response)
        with closing(pieces):  # type: ignore[type-var]  # every answer of Flask has close()
            (status, headers), known = started[0], any(name == "content-length" for name, _ in started[0][1])
            if known:
                exchange.response_bytes(status, headers, b"".join(pieces))
            else:
                self._stream(exchange.response_stream(status, headers), pieces)

    def _stream(self, out: Stream, pieces: Iterable[bytes]) -> None:
        try:
            for piece in pieces:
                self._await(_sent(out, piece))
        except ConnectionError:
            _log.info("a client left in the middle of its answer")

    def _await(self, work: Any) -> Any:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _sent(out: Stream, piece: bytes) -> None:
    try:
        await out.send_bytes(piece)
    except Exception as error:  # whatever granian calls it
        raise ConnectionError(str(error)) from None


class _Input:
    """A body as WSGI has it; reading waits for the client."""

    def __init__(self, loop: asyncio.AbstractEventLoop, body: Incoming) -> None:
        self._loop, self._body, self._held, self._ended = loop, body, b"", False

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, at least one unless it has ended; all that is left where no size is given."""
        if size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        if not self._held and not self._ended and size:
            # Whatever breaks it off, there is no more of it: whoever discards the rest need not wait again.
            self._ended = True
            self._held = asyncio.run_coroutine_threadsafe(self._body.next(), self._loop).result()
            self._ended = not self._held
        found, self._held = self._held[:size], self._held[size:]
        return found


def _environ(scope: Any) -> dict[str, Any]:
    """What PEP 3333 asks for."""
    server, _, port = scope.server.rpartition(":")
    client = scope.client.rpartition(":")[0]
    environ: dict[str, Any] = {
        "REQUEST_METHOD": scope.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": scope.path.encode().decode("latin-1"),
        "QUERY_STRING": scope.query_string,
        "SERVER_NAME": server.strip("[]"),
        "SERVER_PORT": port,
        "SERVER_PROTOCOL": f"HTTP/{scope.http_version}",
        "REMOTE_ADDR": client.strip("[]"),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope.scheme,
        "wsgi.errors": sys.stderr,
        "wsgi.input_terminated": True,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for name, value in scope.headers.items():
        key = name.upper().replace("-", "_")
        key = key if key in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{key}"
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    return environ

"""`Front`: what granian calls for each request: the quick way for plain pictures, Flask for all else."""

import asyncio
from typing import Any

from flask import Flask

from service.bridge import Bridge, Exchange, Incoming
from service.quick import Quick


class Front:
    """An RSGI application around `app`. A body must begin to bring its bytes within `body_seconds`."""

    def __init__(self, app: Flask, quick: Quick, threads: int, body_seconds: float) -> None:
        self._quick, self._bridge = quick, Bridge(app.wsgi_app, threads)
        self._body_seconds = body_seconds

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._quick.bind(loop)
        self._bridge.bind(loop)

    async def __rsgi__(self, scope: Any, exchange: Exchange) -> None:
        plain = self._quick.plain(scope)
        body = Incoming(exchange, self._body_seconds)
        if plain is not None:
            answer = await self._quick.answer(plain, body)
            if answer is not None:
                exchange.response_bytes(answer.status, answer.headers, answer.body)
                return
        await self._bridge.answer(scope, exchange, body)

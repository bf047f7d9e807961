"""Responses that end when their client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from petals_tune.errors import PetalsTuneError
from petals_tune.service.errors import ServiceError, translated

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves: then raises ClientDisconnect.

    The body of the request has been read. `receive`: of the request.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(Response):
    """Server-sent events of JSON objects, with OpenAI's last one. An error ends them as an event of its own."""

    media_type = "text/event-stream"

    def __init__(self, first: Any, rest: AsyncGenerator[Any, None]):
        """`rest` made the `first` event; it is closed at the end, and when the client leaves."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await unless_left(receive, self._send_events(send))
            except ClientDisconnect:
                return

    async def _send_events(self, send: Send) -> None:
        async def send_event(data: bytes, *, more: bool = True) -> None:
            body = b"data: " + data + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            await send_event(_encode(self._first))
            async for event in self._rest:
                await send_event(_encode(event))
        except PetalsTuneError as error:
            await send_event(_encode(translated(error).body))
        except ServiceError as error:
            await send_event(_encode(error.body))
        await send_event(b"[DONE]", more=False)

"""An application on a port of 127.0.0.1, served by a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from tests.processes import LONG_S


@dataclass(frozen=True, kw_only=True)
class Served:
    url: str
    loop: asyncio.AbstractEventLoop  # that serves


@contextmanager
def served(
    opened: Callable[[], AbstractAsyncContextManager[ASGIApp]],
    *,
    port: int = 0,
    at_stop: Callable[[], Any] = lambda: None,
) -> Iterator[Served]:
    """Serve the application that `opened` yields, until the end of the block.

    at_stop: called in the loop that serves, before no more requests are taken
    """
    started: threading.Event = threading.Event()
    found: list[tuple[Served, uvicorn.Server]] = []
    stopping = threading.Event()

    async def serve() -> None:
        async with opened() as app:
            options: Any = {"log_level": "warning", "lifespan": "off", "timeout_graceful_shutdown": 5}
            server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, **options))
            task = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            found.append((Served(url=url, loop=asyncio.get_running_loop()), server))
            started.set()
            while not stopping.is_set():
                await asyncio.sleep(0.01)
            at_stop()
            server.should_exit = True
            await task

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert started.wait(LONG_S)
        yield found[0][0]
    finally:
        stopping.set()
        thread.join(2 * LONG_S)
        assert not thread.is_alive()

"""Serving over HTTP until the process is told to stop; then answers that run are finished first."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from petals_tune.errors import ConfigError
from petals_tune.service.web.middleware import Doors

logger = logging.getLogger(__name__)

_LOOK_S = 0.05
_CLOSE_S = 5  # for the last events and responses, once all answers were told to end


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at which nobody listens yet. Raises ConfigError where the port cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family)
    except OSError as error:
        raise ConfigError(f"host={host} is no address of this machine: {error}", key="host", seen=host) from None
    with found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
        except OSError as error:
            text = f"port={port} of host={host} cannot be listened at: {os.strerror(error.errno or 0)}"
            raise ConfigError(text, key="port", seen=port) from None
        yield found


class _Server(uvicorn.Server):
    """Leaves signals alone: uvicorn raises them again at its end, and the process would die before it cleans up."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    app: ASGIApp,
    doors: Doors,
    at: socket.socket,
    *,
    stop_s: float,
    busy: Callable[[], bool],
    stopped: Callable[[], object],
    end: Callable[[], None],
    started: Callable[[], None],
) -> None:
    """Serve `app` at a bound socket until SIGINT or SIGTERM.

    Then new requests are answered with 503, and what runs may go on for `stop_s` seconds, or until a second signal.

    busy:    whether work runs, also for no request that waits for it
    stopped: is called once no new requests are taken
    end:     ends all answers with an error
    started: is called once requests are taken
    """
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    server = _Server(
        uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=_CLOSE_S, access_log=False)
    )
    serving = asyncio.create_task(server.serve(sockets=[at]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(_LOOK_S)
        started()
        told = asyncio.create_task(stop.wait())
        await asyncio.wait({told, serving}, return_when=asyncio.FIRST_COMPLETED)
        doors.open = False
        stopped()
        if doors.inside or busy():
            logger.info("stopping: answers that run are finished, for up to %g s (Ctrl-C: at once)", stop_s)
        deadline_s = loop.time() + stop_s
        while (doors.inside or busy()) and loop.time() < deadline_s and not hurry.is_set():
            await asyncio.sleep(_LOOK_S)
        end()
    finally:
        server.should_exit = True
        await serving
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

"""Serving until a signal, and how it ends."""

import asyncio
import contextlib
import os
import signal
import socket

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from petals_tune.errors import ConfigError
from petals_tune.service.errors import stopping
from petals_tune.service.users.keys import Keys
from petals_tune.service.web.app import application
from petals_tune.service.web.middleware import Doors
from petals_tune.service.web.server import bound, serve
from tests.raising import raises


class Service:
    """One path, /wait, whose answer comes when it is let go, or told to end."""

    def __init__(self, stop_s):
        self.let_go, self.ended, self.doors, self.inside = asyncio.Event(), asyncio.Event(), Doors(), asyncio.Event()
        self.app = application([Route("/wait", self.wait)], Keys(owners=None), doors=self.doors)
        self.stop_s, self.busy, self.stopped = stop_s, False, asyncio.Event()

    async def wait(self, request):
        self.inside.set()
        waits = [asyncio.create_task(each.wait()) for each in (self.let_go, self.ended)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for each in waits:
            each.cancel()
        if not self.let_go.is_set():
            raise stopping()
        return PlainTextResponse("done")

    @contextlib.asynccontextmanager
    async def running(self):
        """(The task that serves, a client, a request that is inside)."""
        started = asyncio.Event()
        with bound("127.0.0.1", 0) as at:
            serving = asyncio.create_task(
                serve(
                    self.app,
                    self.doors,
                    at,
                    stop_s=self.stop_s,
                    busy=lambda: self.busy,
                    stopped=self.stopped.set,
                    end=self.ended.set,
                    started=started.set,
                )
            )
            await started.wait()
            url = f"http://127.0.0.1:{at.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                asked = asyncio.create_task(client.get("/wait"))
                await self.inside.wait()
                yield serving, client, asked
            await serving


async def until_closed(doors):
    while doors.open:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_what_runs_is_finished_and_what_is_new_is_503(number):
    service = Service(stop_s=60)
    async with service.running() as (serving, client, asked):
        os.kill(os.getpid(), number)
        await until_closed(service.doors)
        assert service.stopped.is_set()
        assert not service.ended.is_set()
        refused = await client.get("/healthz")
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "stopping"
        assert not serving.done()
        service.let_go.set()
        assert (await asked).text == "done"
        await serving
        with pytest.raises(httpx.ConnectError):
            await client.get("/healthz")
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


@pytest.mark.parametrize("second_signal", [False, True])
async def test_what_runs_too_long_is_ended(second_signal):
    service = Service(stop_s=60 if second_signal else 0.1)
    async with service.running() as (serving, _, asked):
        os.kill(os.getpid(), signal.SIGTERM)
        await until_closed(service.doors)
        if second_signal:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (await asked).status_code == 503
        await serving


async def test_work_without_a_request_is_waited_for_too():
    service = Service(stop_s=60)
    async with service.running() as (serving, _, asked):
        service.busy = True
        service.let_go.set()
        await asked
        os.kill(os.getpid(), signal.SIGTERM)
        await until_closed(service.doors)
        await asyncio.sleep(0.2)
        assert not serving.done()
        service.busy = False
        await serving


def test_a_port_that_is_taken_is_an_error_before_the_swarm_is_opened():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with raises(ConfigError, key="port"), bound("127.0.0.1", port):
            pass


def test_an_address_that_is_none_is_an_error():
    with raises(ConfigError, key="host"), bound("not a host", 0):
        pass

"""Responses of clients that stay, and of those that leave."""

import asyncio

import pytest
from starlette.requests import ClientDisconnect

from petals_tune.errors import ServerTimeout
from petals_tune.service.web.responses import EventStream, unless_left


class Client:
    """Of an ASGI application: what it receives and sends."""

    def __init__(self):
        self.leaves, self.sent = asyncio.Event(), []

    async def receive(self):
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.sent)


async def test_work_ends_when_its_client_leaves():
    client, cancelled = Client(), []

    async def work():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    waiting = asyncio.create_task(unless_left(client.receive, work()))
    await asyncio.sleep(0)
    client.leaves.set()
    with pytest.raises(ClientDisconnect):
        await waiting
    assert cancelled


async def test_results_and_errors_come_to_who_stays():
    async def fails():
        raise KeyError("x")

    assert await unless_left(Client().receive, asyncio.sleep(0, 7)) == 7
    with pytest.raises(KeyError):
        await unless_left(Client().receive, fails())


async def test_events_are_json_and_end_as_openais_do():
    async def rest():
        yield {"text": "é"}

    client = Client()
    await EventStream({"a": 1}, rest())({"type": "http"}, client.receive, client.send)
    assert client.body.decode() == 'data: {"a":1}\n\ndata: {"text":"é"}\n\ndata: [DONE]\n\n'
    assert (b"content-type", b"text/event-stream; charset=utf-8") in client.sent[0]["headers"]
    assert client.sent[-1]["more_body"] is False


async def test_an_error_in_the_middle_is_an_event():
    async def rest():
        yield {"a": 2}
        raise ServerTimeout("late")

    client = Client()
    await EventStream({"a": 1}, rest())({"type": "http"}, client.receive, client.send)
    assert b'"swarm_unavailable"' in client.body
    assert client.body.endswith(b"data: [DONE]\n\n")


async def test_a_stream_is_closed_when_its_client_leaves():
    client, closed = Client(), []

    async def rest():
        try:
            yield {}
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    events = rest()
    stream = EventStream(await anext(events), events)
    streaming = asyncio.create_task(stream({"type": "http"}, client.receive, client.send))
    await asyncio.sleep(0.01)
    assert not closed
    client.leaves.set()
    await streaming
    assert closed

"""Who gets a stream, and how much of the server: greetings and limits. Real blocks and streams."""

import asyncio
import dataclasses
import struct
import threading

import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.errors import (
    ConnectionLost,
    ProtocolError,
    RequestRefused,
    ServerBusy,
    SwarmMismatch,
)
from petals_tune.wire.codec import MAX_HELLO_BYTES, encode
from petals_tune.wire.frames import HEADER
from petals_tune.wire.messages import (
    Backward,
    Chained,
    Forward,
    Forwarded,
    HandOver,
    Hello,
    Message,
    OpenSession,
    Ping,
    Pong,
    Refusal,
)
from servers.requests import streams
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.fair_queue import Priority
from servers.stores.budgets import Budgets
from servers.stores.stores import Stores
from tests.raising import raises
from tests.servers.peers import (
    HIDDEN,
    LIMITS,
    SPAN,
    House,
    computed,
    even_sizes,
    forward,
    is_refusal_of,
    lora,
    prompt,
    put,
    stores,
)

Parts = tuple[Engine, ComputeThread]
FRAME = struct.Struct(">IQQ")


# The greeting


@pytest.mark.parametrize(
    "first",
    [encode(Ping()), encode(forward()), b"", bytes(100), encode(Hello()) + bytes(MAX_HELLO_BYTES)],
    ids=["ping", "forward", "nothing", "zeros", "large"],
)
async def test_a_stream_that_does_not_begin_with_a_hello_is_closed(engine, first):
    async with House(engine).stranger() as peer:
        await peer.send(first)
        (refusal,) = await peer.last_words()
        assert isinstance(refusal, Refusal)
        assert is_refusal_of(ProtocolError("", what="hello"), refusal)


async def test_a_hello_that_announces_more_is_not_waited_for(engine):
    async with House(engine).stranger() as peer:
        await peer.write(HEADER.pack(10, 1, 2**31 - 1))
        assert len(await peer.last_words()) == 1


async def test_a_stream_without_a_word_is_closed(engine, monkeypatch):
    monkeypatch.setattr(streams, "GREETING_S", 0.0)
    monkeypatch.setattr(streams, "_WATCH_S", 0.01)
    house = House(engine)
    async with house.stranger() as silent:
        assert await silent.last_words() == []
    assert isinstance(await _served(house), Forwarded)


async def test_a_client_of_another_model_learns_so(engine):
    async with House(engine).stranger() as peer:
        await peer.send(Hello(model="other"))
        (refusal,) = await peer.last_words()
        assert isinstance(refusal, Refusal)
        assert is_refusal_of(SwarmMismatch("", wanted="other"), refusal)


async def _served(house: House) -> Message:
    async with house.client("honest") as peer:
        return await peer.ask(forward())


# Limits


async def test_streams_beyond_the_limit_of_a_client_are_closed_and_others_are_served(engine):
    house = House(engine)
    async with house.client(), house.client(), house.client():
        async with house.stranger() as fourth:
            assert await fourth.last_words() == []
        assert isinstance(await _served(house), Forwarded)
    async with house.client() as again:
        assert isinstance(await again.ask(Ping()), Pong)


async def test_where_all_streams_are_taken_the_one_that_idles_longest_goes(engine, monkeypatch):
    monkeypatch.setattr(streams, "IDLE_S", -1.0)
    house = House(engine, limits=dataclasses.replace(LIMITS, max_streams=2))
    async with house.client("idle") as idle, house.client("busy") as busy:
        assert isinstance(await busy.ask(Ping()), Pong)
        assert isinstance(await _served(house), Forwarded)
        assert await idle.last_words() == []
        assert isinstance(await busy.ask(forward()), Forwarded)


async def test_requests_beyond_those_in_flight_are_refused_as_busy_and_the_others_answered(engine):
    house = House(engine)
    async with house.client() as greedy, house.client("alice") as alice:
        for _ in range(12):
            await greedy.send(forward(4, 64))
        answers = [(await greedy.read())[1] for _ in range(12)]
        busy = [answer for answer in answers if isinstance(answer, Refusal)]
        assert busy
        assert all(is_refusal_of(ServerBusy("", limit="max_in_flight"), answer) for answer in busy)
        assert sum(isinstance(answer, Forwarded) for answer in answers) == 12 - len(busy) >= 4
        assert isinstance(await alice.ask(forward()), Forwarded)
        assert isinstance(await greedy.ask(forward()), Forwarded)


async def test_a_request_that_is_not_done_in_time_is_refused_and_never_begun(engine, monkeypatch):
    """Behind work that takes longer, and as part of a chain whose tensor never comes."""
    begun: list[object] = []
    monkeypatch.setattr(engine[0], "forward", begun.append)
    release = threading.Event()
    blocked = asyncio.create_task(engine[1].run(Priority.FORWARD, release.wait))
    house = House(engine, limits=dataclasses.replace(LIMITS, max_request_s=0.1))
    async with house.client() as client:
        busy = ServerBusy("", limit="max_request_s")
        assert is_refusal_of(busy, await client.refused(forward()))
        comes = HandOver(peer="nobody", ticket=bytes(16))
        refusal = await client.refused(Chained(request=forward(hidden=torch.ones(1, 2, 0)), comes=comes))
        assert is_refusal_of(busy, refusal)
    release.set()
    await blocked
    await engine[1].run(Priority.BACKWARD, lambda: None)  # after all that waited
    assert begun == []


async def test_a_request_without_room_is_dropped_as_it_comes_and_the_next_one_is_served(engine):
    house = House(engine, limits=dataclasses.replace(LIMITS, max_receiving_bytes=100_000))
    async with house.client("greedy") as greedy, house.client("alice") as alice:
        large = Forward(span=SPAN, hidden=torch.ones(4, 64, 2 * HIDDEN))  # 64 KiB
        assert is_refusal_of(ServerBusy("", limit="max_receiving_gb"), await greedy.refused(large))
        assert isinstance(await greedy.ask(forward()), Forwarded)
        assert isinstance(await alice.ask(forward()), Forwarded)
    assert house.handler._admission.receiving_bytes == 0


async def test_a_sender_that_stops_in_the_middle_of_a_message_is_closed(engine, monkeypatch):
    monkeypatch.setattr(streams, "_WATCH_S", 0.01)
    house = House(engine)
    for half in (HEADER.pack(100, 7, 0), HEADER.pack(3, 7, 10) + b"abc"):
        async with house.client() as peer:
            await peer.ask(Ping())
            monkeypatch.setattr(streams, "STALL_S", 0.05)
            await peer.write(half)
            assert await peer.last_words() == []
        monkeypatch.setattr(streams, "STALL_S", 60.0)
        assert isinstance(await _served(house), Forwarded)


async def test_a_client_that_never_reads_its_answers_is_closed(engine, monkeypatch):
    monkeypatch.setattr(streams, "_WATCH_S", 0.01)
    house = House(engine)
    async with house.client() as deaf:
        monkeypatch.setattr(streams, "STALL_S", 0.2)
        with raises(ConnectionLost):
            async with asyncio.timeout(60):
                while True:
                    await deaf.send(forward(1, 64))
    monkeypatch.setattr(streams, "STALL_S", 60.0)
    assert isinstance(await _served(house), Forwarded)
    await computed(engine)


async def test_a_client_that_asks_too_often_is_read_no_faster(engine):
    house = House(engine, limits=dataclasses.replace(LIMITS, max_requests_per_s=20.0))
    async with house.client() as hasty:
        started_s = asyncio.get_running_loop().time()
        for _ in range(30):
            await hasty.send(Ping())
        for _ in range(30):
            assert isinstance((await hasty.read())[1], Pong)
        assert asyncio.get_running_loop().time() - started_s >= 0.4, "20 at once, 10 more at 20 a second"


async def test_an_adapter_that_never_fits_is_refused_with_what_would(engine):
    async with House(engine, kept=stores(adapters=1000)).client() as peer:
        refusal = await peer.refused(put(prompt(positions=32)))
        assert is_refusal_of(RequestRefused("", reason="adapter", limit="max_adapter_gb"), refusal)


async def test_what_is_too_old_goes_while_nobody_asks_for_anything(engine, monkeypatch):
    monkeypatch.setattr(streams, "_WATCH_S", 0.01)
    kept = Stores.within(
        Budgets(leases=2**20, sessions=2**20, adapters=0, sums=0, stacks=0),
        max_lease_age_s=0.05,
        max_session_idle_s=0.05,
        sizes=even_sizes(1),
    )
    async with House(engine, kept=kept).client() as client:
        assert isinstance(await client.ask(forward(keep=True)), Forwarded)
        await client.ask(OpenSession(span=SPAN, rows=1, max_length=4))
        async with asyncio.timeout(60):
            while kept.leases.used_bytes or kept.sessions.used_bytes:
                await asyncio.sleep(0.01)


async def test_a_client_that_leaves_takes_everything_along(engine):
    house = House(engine)
    async with house.client() as peer:
        await peer.ask(forward(keep=True))
        await peer.ask(OpenSession(span=SPAN, rows=1, max_length=4))
        await peer.ask(put(lora()))
        await peer.ask(Backward(again=forward(adapter="v"), grad=torch.ones(1, 2, HIDDEN), adapter_sum=1))
        kept = house.stores
        held = [kept.leases.used_bytes, kept.sessions.used_bytes, kept.adapters.used_bytes]
        assert all(size > 0 for size in [*held, kept.sums.used_bytes])
    left = [kept.leases.used_bytes, kept.sessions.used_bytes, kept.adapters.used_bytes]
    assert [*left, kept.sums.used_bytes, len(house.handler._streams)] == [0] * 5

"""The memory that messages take from the first of their bytes to the last, and the loop beside them. Real streams."""

import asyncio
import dataclasses
import struct
import threading
from contextlib import AsyncExitStack

import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.errors import (
    ConnectionLost,
    ServerBusy,
)
from petals_tune.wire.codec import encode
from petals_tune.wire.messages import (
    Chained,
    Delivery,
    Forwarded,
    HandOver,
    Message,
    Ping,
    Pong,
    Refusal,
)
from petals_tune.wire.tensors import in_format
from servers.requests import handler, streams
from servers.scheduling.compute_thread import ComputeThread
from tests.raising import raises
from tests.servers.peers import (
    HIDDEN,
    LIMITS,
    House,
    computed,
    forward,
    is_refusal_of,
)

Parts = tuple[Engine, ComputeThread]
FRAME = struct.Struct(">IQQ")


async def _served(house: House) -> Message:
    async with house.client("honest") as peer:
        return await peer.ask(forward())


# Limits


def same(one: Message, other: Message) -> bool:
    """Whether two replies to the same forward have the same bits."""
    assert isinstance(one, Forwarded)
    assert isinstance(other, Forwarded)
    return torch.equal(one.hidden, other.hidden)


def used_bytes(house: House) -> int:
    """Memory that is counted for messages."""
    return house.handler.message_bytes


def half(message_id: int, claimed: int, sent: int) -> bytes:
    """The first frame of a message of `claimed` bytes."""
    return FRAME.pack(sent, message_id, claimed - sent) + bytes(sent)


async def test_claims_take_no_memory_from_those_who_send(engine):
    """Twelve clients that claim the largest message, and send one byte of it."""
    house = House(engine, limits=dataclasses.replace(LIMITS, max_streams=20))
    expected = await _served(house)
    async with AsyncExitStack() as stack:
        for number in range(12):
            client = await stack.enter_async_context(house.client(f"mallory{number}"))
            for message_id in range(100, 103):
                await client.write(half(message_id, LIMITS.max_message_bytes, 1))
            await client.ask(Ping())
        assert used_bytes(house) == 12 * 3
        async with house.client("honest") as honest:
            large = Ping(filler=bytes(2**20 - 100))
            assert isinstance(await honest.ask(large), Pong)
            assert same(await honest.ask(forward()), expected)
    assert used_bytes(house) == 0


async def test_memory_is_taken_as_bytes_come_and_a_message_without_room_is_dropped_in_its_middle(engine):
    house = House(engine, limits=dataclasses.replace(LIMITS, max_receiving_bytes=100_000))
    async with house.client("greedy") as greedy, house.client("alice") as alice:
        await greedy.write(half(100, 50_000, 20_000))
        await greedy.write(half(101, 30_000, 15_000))
        await greedy.write(FRAME.pack(15_000, 100, 15_000) + bytes(15_000))
        await greedy.ask(Ping())
        assert used_bytes(house) == 50_000, "half of it: a client that is alone may have as much"
        await greedy.write(FRAME.pack(1_000, 101, 14_000) + bytes(1_000))
        await greedy.ask(Ping())
        assert used_bytes(house) == 35_000, "the second one is dropped"
        assert same(await alice.ask(forward()), await _served(house))
        await greedy.write(FRAME.pack(14_000, 101, 0) + bytes(14_000))
        number, refusal = await greedy.read()
        assert number == 101
        assert isinstance(refusal, Refusal)
        assert is_refusal_of(ServerBusy("", limit="max_receiving_gb"), refusal)
    assert used_bytes(house) == 0


@pytest.mark.parametrize("limit", ["rate", "time"])
async def test_a_message_that_comes_too_slowly_is_closed_though_its_frames_go_on(engine, monkeypatch, limit):
    """A byte a frame: each is a sign of life, and none brings the message to an end."""
    monkeypatch.setattr(streams, "_WATCH_S", 0.01)
    if limit == "rate":
        monkeypatch.setattr(streams, "STALL_S", 0.2)
        monkeypatch.setattr(streams, "LEAST_BYTES_PER_S", 1e6)
    house = House(engine, limits=dataclasses.replace(LIMITS, max_request_s=60.0 if limit == "rate" else 0.2))
    async with house.client() as slow, house.client("alice") as alice:
        with raises(ConnectionLost):
            async with asyncio.timeout(60):
                for sent in range(100_000):
                    await slow.write(FRAME.pack(1, 99, 100_000 - sent) + b"x")
                    await asyncio.sleep(0.01)
        assert isinstance(await alice.ask(forward()), Forwarded)
    assert used_bytes(house) == 0


async def test_a_message_that_comes_fast_enough_is_read_though_it_takes_long(engine, monkeypatch):
    monkeypatch.setattr(streams, "_WATCH_S", 0.01)
    monkeypatch.setattr(streams, "STALL_S", 0.1)
    monkeypatch.setattr(streams, "LEAST_BYTES_PER_S", 10.0)
    async with House(engine).client() as slow:
        body = encode(Ping(filler=bytes(40)))
        for place in range(0, len(body), 2):
            part = body[place : place + 2]
            await slow.write(FRAME.pack(len(part), 99, len(body) - place - len(part)) + part)
            await asyncio.sleep(0.01)
        assert await slow.read() == (99, Pong())


async def test_tensors_that_no_request_waits_for_are_counted_and_go_with_their_stream(engine):
    """Deliveries, close, connect again: eight times, each within the budget."""
    house = House(engine)
    expected = await _served(house)
    tensor = torch.zeros(1, 100, 1000)
    for number in range(8):
        async with house.client("mallory") as client:
            for place in range(3):
                await client.send(Delivery(ticket=bytes([number] * 15 + [place]), tensor=tensor))
            await client.ask(Ping())
            assert used_bytes(house) >= 3 * tensor.nbytes
            assert len(house.handler._inbox._early) == 3
        assert not house.handler._inbox._early
        assert used_bytes(house) == 0
    assert same(await _served(house), expected)


async def test_what_a_client_left_that_is_computed_still_is_counted_when_it_comes_again(engine, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def held(*args, run=engine[0].forward, **how):
        begun.set()
        assert go_on.wait(60)
        return run(*args, **how)

    house = House(engine, limits=dataclasses.replace(LIMITS, max_receiving_bytes=100_000))
    with monkeypatch.context() as patch:
        patch.setattr(engine[0], "forward", held)
        async with house.client("mallory") as client:
            await client.send(forward(2, 64))  # 16 KiB
            assert await asyncio.to_thread(begun.wait, 60)
            await client.send(forward(2, 64))  # waits behind it, and is dropped at once
            await client.ask(Ping())
            assert used_bytes(house) > 2 * 2 * 64 * HIDDEN * 4
        async with house.client("mallory") as client:
            assert 2 * 64 * HIDDEN * 4 < used_bytes(house) < 2 * 2 * 64 * HIDDEN * 4
            refusal = await client.refused(Ping(filler=bytes(45_000)))
            assert is_refusal_of(ServerBusy("", limit="max_receiving_gb"), refusal), "its quota is used in part"
            go_on.set()
            await computed(engine)
            await asyncio.sleep(0)
            assert isinstance(await client.ask(Ping(filler=bytes(45_000))), Pong)
            assert used_bytes(house) == 0


async def test_tensors_of_eight_bits_are_counted_as_the_floats_that_they_become(engine):
    house = House(engine)
    tensor = torch.ones(1, 250, 1000)
    async with house.client() as client:
        await client.send(Delivery(ticket=bytes(16), tensor=in_format(tensor, "blockwise8")))
        assert isinstance(await client.ask(Ping()), Pong)
        assert used_bytes(house) >= tensor.nbytes
        second = Delivery(ticket=bytes([1] * 16), tensor=in_format(tensor.expand(3, -1, -1), "blockwise8"))
        assert is_refusal_of(ServerBusy("", limit="max_receiving_gb"), await client.refused(second)), "3 MB of 4"
        assert isinstance(await client.ask(forward()), Forwarded)


async def test_replies_that_nobody_reads_are_counted_and_their_client_is_busy_until_it_reads_them(engine):
    house = House(engine, limits=dataclasses.replace(LIMITS, max_in_flight=100))
    expected = await _served(house)
    async with house.client("deaf") as deaf, house.client("alice") as alice:
        asked = [await deaf.send(forward(4, 64)) for _ in range(90)]  # 32 KiB each, and as much to read
        await computed(engine)
        while house.handler._admission._quotas["deaf"].in_flight > len(asked):
            await asyncio.sleep(0.01)
        assert used_bytes(house) > 2**20, "more than sockets hold"
        assert same(await alice.ask(forward()), expected)
        answers = dict([await deaf.read() for _ in asked])
        assert answers.keys() == set(asked)
        refused = [answer for answer in answers.values() if isinstance(answer, Refusal)]
        assert all(is_refusal_of(ServerBusy("", limit="max_receiving_gb"), answer) for answer in refused)
        assert isinstance(await deaf.ask(forward()), Forwarded)
    assert used_bytes(house) == 0


async def test_a_reply_for_which_there_is_no_room_is_refused_and_its_lease_released(engine, monkeypatch):
    house = House(engine)
    quota_of = house.handler._admission._quotas
    async with house.client() as client:
        with monkeypatch.context() as patch:

            def full(*args, run=engine[0].forward, **how):
                patch.setattr(quota_of["mallory"], "fits", lambda size: False)
                return run(*args, **how)

            patch.setattr(engine[0], "forward", full)
            await client.send(Delivery(ticket=bytes(16), tensor=torch.ones(1, 64, HIDDEN)))
            comes = HandOver(peer="mallory", ticket=bytes(16))
            without = forward(hidden=torch.ones(1, 64, 0), keep=True)
            refusal = await client.refused(Chained(request=without, comes=comes))
            assert is_refusal_of(ServerBusy("", limit="max_receiving_gb"), refusal)
        assert len(house.stores.leases) == 0
        assert isinstance(await client.ask(forward()), Forwarded)


async def test_a_reply_is_read_in_time_or_its_stream_is_closed(engine, monkeypatch):
    """A reader that takes a little now and then shows life, and keeps the memory of its replies."""
    monkeypatch.setattr(streams, "_WATCH_S", 0.01)
    house = House(engine, limits=dataclasses.replace(LIMITS, max_request_s=0.5, max_in_flight=100))
    async with house.client("slow") as slow:
        for _ in range(60):
            await slow.send(forward(4, 64))
        async with asyncio.timeout(60):
            while house.handler.streams:
                await slow.connection.read_exactly(1)
                await asyncio.sleep(0.01)
        assert isinstance(await _served(house), Forwarded)
    await computed(engine)


async def test_large_messages_are_decoded_and_encoded_off_the_event_loop(engine, monkeypatch):
    where: dict[str, set[bool]] = {"decode": set(), "encode_parts": set()}
    loop_thread = threading.get_ident()

    def noting(name, function):
        def noted(*args, **fields):
            where[name].add(threading.get_ident() == loop_thread)
            return function(*args, **fields)

        return noted

    async with House(engine).client() as client:
        for name in where:
            monkeypatch.setattr(handler, name, noting(name, getattr(handler, name)))
        small = await client.ask(forward(1, 4))
        assert isinstance(small, Forwarded)
        assert where == {"decode": {True}, "encode_parts": {True}}
        where["decode"].clear()
        where["encode_parts"].clear()
        large = await client.ask(forward(4, 64, padding=torch.ones(4, 64, dtype=torch.bool)))
        assert isinstance(large, Forwarded)
        wide = await client.ask(Ping(filler=bytes(2**18)))
        assert isinstance(wide, Pong)
        assert False in where["decode"]


async def test_a_client_whose_messages_have_all_arrived_lets_others_go_on(engine, monkeypatch):
    """Reading what is here already never waits."""
    monkeypatch.setattr(streams, "TURN_S", 0.0)
    monkeypatch.setattr(streams, "_WAITED_S", 1e9)
    house, order = House(engine), []
    async with house.client("hasty") as hasty, house.client("alice") as alice:
        ping = encode(Ping())
        await hasty.write(b"".join(FRAME.pack(len(ping), number, 0) + ping for number in range(10, 1010)))

        async def answers(peer, count: int, name: str) -> None:
            for _ in range(count):
                await peer.read()
                order.append(name)

        await alice.send(Ping())
        await asyncio.gather(answers(hasty, 1000, "hasty"), answers(alice, 1, "alice"))
    assert order.index("alice") < 900

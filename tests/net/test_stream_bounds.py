"""What a server can take of its client: memory for what was not asked for, and the blame for our own standstill.

One stream against a server that is played by the test.
"""

import asyncio
import time

import pytest
import torch

from petals_tune.errors import BadReply, ServerUnreachable
from petals_tune.net import own_lag
from petals_tune.net import stream as stream_module
from petals_tune.wire import frames
from petals_tune.wire.frames import HEADER
from petals_tune.wire.messages import Done, Forwarded, Release
from tests.net.played_peer import LONG_S, PEER, PlayedPeer
from tests.net.test_stream import asking, forward
from tests.raising import raises

# Memory: what the client did not ask for is not kept


async def flood(peer: PlayedPeer, message_id: int, frame_count: int) -> None:
    """Frames of a message that says that it has two gigabytes."""
    remaining = 2**31
    for _ in range(frame_count):
        remaining -= frames.MAX_FRAME_BYTES
        await peer.write(HEADER.pack(frames.MAX_FRAME_BYTES, message_id, remaining) + bytes(frames.MAX_FRAME_BYTES))


@pytest.mark.parametrize("message_id", [1, 77, 2**63], ids=["of the Hello", "of nothing yet", "absurd"])
async def test_a_message_that_nobody_asked_for_is_read_and_not_kept(connect, message_id):
    stream, peer = await connect()
    asked = asking(stream, forward(1))
    number, _ = await peer.read()
    await flood(peer, message_id, 20)
    await peer.send(Done(), number)
    assert await asked == Done()
    assert stream._stats.received_bytes > 20 * frames.MAX_FRAME_BYTES, "it came"
    assert stream._assembler.open_bytes == 0
    assert stream.alive


async def test_a_server_that_sends_what_nobody_asked_for_again_and_again_is_left(connect):
    stream, peer = await connect()
    asked = asking(stream, forward(1))
    await peer.read()
    for number in range(stream_module.MAX_UNASKED + 1):
        await peer.send(Done(), 1000 + number)
    with raises(ServerUnreachable, peer=PEER):
        await asked


async def test_a_reply_that_is_larger_than_it_can_be_fails_its_request_alone_and_is_not_kept(connect):
    stream, peer = await connect()
    large, small = asking(stream, forward(1)), asking(stream, forward(2))
    (large_id, _), (small_id, _) = [await peer.read() for _ in range(2)]
    await flood(peer, large_id, 4)
    with raises(BadReply, peer=PEER):
        await large
    assert stream._assembler.open_bytes == 0
    await peer.send(Done(), small_id)
    assert await small == Done()


async def test_a_reply_may_be_as_large_as_the_caller_says_once(connect):
    stream, peer = await connect()
    hidden = torch.zeros(1, 64, 2**10)
    asked = asyncio.create_task(stream.call(forward(1), timeout_s=LONG_S, most_bytes=hidden.nbytes + 2**10))
    number, _ = await peer.read()
    await peer.send(Forwarded(hidden=hidden), number)
    assert isinstance(await asked, Forwarded)
    await flood(peer, number, 2)
    again = asking(stream, forward(2))
    number, _ = await peer.read()
    await peer.send(Done(), number)
    assert await again == Done()
    assert stream._assembler.open_bytes == 0


async def test_replies_that_nobody_waits_for_any_more_are_kept_for_a_few_requests_alone(connect, monkeypatch):
    monkeypatch.setattr(stream_module, "MAX_GIVEN_UP", 2)
    stream, peer = await connect()
    late = []
    for number in range(4):
        asked = asking(stream, forward(number))
        late.append((await peer.read())[0])
        asked.cancel()
    await asyncio.sleep(0)
    assert list(stream._given_up) == late[2:]
    for lease, message_id in enumerate(late):
        await peer.send(Forwarded(hidden=torch.zeros(1, 1, 1), lease=lease), message_id)
    assert [(await peer.read())[1] for _ in range(2)] == [Release(leases=[2]), Release(leases=[3])]
    assert not stream._given_up
    assert stream.alive, "a late reply is no fault"


async def test_numbers_of_a_welcome_are_taken_for_no_more_than_is_sensible(connect):
    stream, _ = await connect(max_in_flight=2**62, max_message_bytes=2**62, max_positions=1, max_tokens=2**62)
    assert stream._window._value == stream_module.MAX_IN_FLIGHT
    assert stream.max_tensor_bytes < stream_module.MAX_MESSAGE_BYTES
    stream, _ = await connect(max_in_flight=1, max_message_bytes=1)
    assert stream.max_tensor_bytes == 0


# Time: this process's own standstill is not the server's


async def test_a_reply_that_came_while_this_process_stood_still_is_in_time(connect, monkeypatch):
    monkeypatch.setattr(own_lag, "TICK_S", 0.05)
    stream, peer = await connect()
    asked = asking(stream, forward(0), timeout_s=0.1)
    message_id, _ = await peer.read()
    await peer.send(Done(), message_id)
    time.sleep(0.2)  # as while another server's large message is decoded
    assert await asked == Done()


async def test_an_honest_server_is_not_silent_because_this_process_stood_still_again_and_again(connect, monkeypatch):
    monkeypatch.setattr(own_lag, "TICK_S", 0.05)
    for name, value in (("HEARTBEAT_S", 0.02), ("SILENCE_S", 0.3), ("ENOUGH_PINGS", 1)):
        monkeypatch.setattr(stream_module, name, value)
    stream, peer = await connect()
    asked = asking(stream, forward(0))
    message_id, _ = await peer.read()
    for _ in range(3):
        time.sleep(0.2)
        await asyncio.sleep(0)
    assert stream.alive
    await peer.send(Done(), message_id)
    assert await asked == Done()

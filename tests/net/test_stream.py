"""One stream against a server that is played by the test."""

import asyncio
import gc

import pytest
import torch

from petals_tune.errors import (
    LeaseLost,
    Refused,
    RequestRefused,
    ServerBusy,
    ServerTimeout,
    ServerUnreachable,
    SwarmMismatch,
)
from petals_tune.net import stream as stream_module
from petals_tune.net.stats import SwarmStats
from petals_tune.net.stream import ServerStream
from petals_tune.wire import frames
from petals_tune.wire.frames import HEADER
from petals_tune.wire.messages import (
    ChainedReply,
    CloseSession,
    Done,
    Forward,
    Forwarded,
    Message,
    Ping,
    Pong,
    Refusal,
    Release,
    SessionOpened,
)
from petals_tune.wire.span import BlockSpan
from tests.net.played_peer import LONG_S, PEER, opening
from tests.raising import raises

LARGE = Forward(span=BlockSpan(0, 1), hidden=torch.zeros(1, 64, 2**18))  # 64 MB: more than a socket takes at once


def forward(value: float) -> Forward:
    return Forward(span=BlockSpan(0, 1), hidden=torch.full((1, 1, 1), float(value)))


def asking(stream: ServerStream, request: Message, *, timeout_s: float = LONG_S) -> asyncio.Task[Message]:
    return asyncio.create_task(stream.call(request, timeout_s=timeout_s))


async def test_requests_are_matched_with_their_replies_by_id_in_whatever_order_these_come(connect):
    stream, peer = await connect()
    asked = [asking(stream, forward(number)) for number in range(8)]
    received = [await peer.read() for _ in asked]
    for message_id, request in reversed(received):
        await peer.send(Forwarded(hidden=request.hidden * 10), message_id)
    assert [(await reply).hidden.item() for reply in asked] == [10.0 * number for number in range(8)]


async def test_no_more_requests_are_in_flight_than_the_server_allows(connect):
    stream, peer = await connect(max_in_flight=2)
    asked = [asking(stream, forward(number)) for number in range(3)]
    first, _ = await peer.read()
    second, _ = await peer.read()
    await stream.notify(Release(leases=[]))  # arrives next, so the third request was not sent
    assert isinstance((await peer.read())[1], Release)
    await peer.send(Done(), second)
    third, request = await peer.read()
    assert request.hidden.item() == 2.0
    await peer.send(Done(), first)
    await peer.send(Done(), third)
    assert await asyncio.gather(*asked) == [Done()] * 3


async def test_a_small_request_does_not_wait_for_a_large_one(connect):
    stream, peer = await connect()
    large = asking(stream, Forward(span=BlockSpan(0, 1), hidden=torch.zeros(1, 64, 2**15)))  # 8 MB: 32 frames
    await asyncio.sleep(0)
    small = asking(stream, forward(7))
    small_id, request = await peer.read()
    assert request.hidden.item() == 7.0, "whole before the large one, which was asked first"
    large_id, _ = await peer.read()
    await peer.send(Done(), large_id)
    await peer.send(Done(), small_id)
    assert await asyncio.gather(large, small) == [Done(), Done()]


async def test_the_end_of_the_stream_fails_all_pending_requests_at_once_and_later_ones_without_waiting(connect):
    stream, peer = await connect()
    asked = [asking(stream, forward(number)) for number in range(5)]
    for _ in asked:
        await peer.read()
    assert stream.alive
    peer.connection.close()
    errors = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(error) for error in errors] == [ServerUnreachable] * 5
    assert not stream.alive
    with raises(ServerUnreachable, peer=PEER):
        await stream.call(forward(0), timeout_s=LONG_S)
    await stream.notify(Release(leases=[1]))  # a broken stream is no error here


def test_a_request_that_is_still_being_sent_when_the_stream_ends_fails_once_and_quietly():
    complaints: list[dict] = []

    async def hang_up_meanwhile() -> None:
        task, peer = await opening()
        await peer.welcome()
        stream = await task
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        asked = asking(stream, Forward(span=BlockSpan(0, 1), hidden=torch.zeros(1, 64, 2**15)))  # 8 MB, not read
        await peer.connection.read_exactly(HEADER.size)
        peer.connection.abort()
        with raises(ServerUnreachable, peer=PEER):
            await asked
        await stream.close()

    asyncio.run(hang_up_meanwhile())
    gc.collect()  # asyncio complains of an error that nobody asked for when its future is freed
    assert complaints == []


async def test_closing_fails_what_is_pending(connect):
    stream, peer = await connect()
    asked = asking(stream, forward(0))
    await peer.read()
    await stream.close()
    with raises(ServerUnreachable, peer=PEER):
        await asked


@pytest.mark.parametrize(
    "sent",
    [
        HEADER.pack(frames.MAX_FRAME_BYTES + 1, 1, 0),
        HEADER.pack(3, 2, 0) + b"\xc1\xc1\xc1",
    ],
    ids=["frame too long", "no message"],
)
async def test_a_server_that_breaks_the_protocol_is_left(connect, sent):
    stream, peer = await connect()
    asked = asking(stream, forward(0))
    message_id, _ = await peer.read()
    assert message_id == 2
    await peer.write(sent)
    with raises(ServerUnreachable, peer=PEER):
        await asked
    assert not stream.alive


async def test_an_answer_that_nobody_waits_for_any_more_is_ignored(connect):
    stream, peer = await connect()
    with raises(ServerTimeout, peer=PEER):
        await stream.call(forward(1), timeout_s=0.01)
    late, _ = await peer.read()
    asked = asking(stream, forward(2))
    message_id, _ = await peer.read()
    await peer.send(Refusal(error="RequestRefused", text="late"), late)
    await peer.send(Done(), message_id)
    assert await asked == Done()


@pytest.mark.parametrize(
    ("kept", "freeing"),
    [
        (Forwarded(hidden=torch.zeros(1, 1, 1), lease=5), Release(leases=[5])),
        (ChainedReply(reply=Forwarded(hidden=torch.zeros(1, 1, 1), lease=6), handed_on=True), Release(leases=[6])),
        (SessionOpened(session=7), CloseSession(session=7)),
    ],
    ids=["lease", "chained", "session"],
)
async def test_what_a_server_keeps_for_a_request_that_was_given_up_is_given_back(connect, kept, freeing):
    stream, peer = await connect()
    asked = asking(stream, forward(1))
    late, _ = await peer.read()
    asked.cancel()
    await peer.send(kept, late)
    assert (await peer.read())[1] == freeing


async def test_so_is_what_comes_in_the_moment_of_giving_up(connect, monkeypatch):
    stream, peer = await connect()
    asked = asking(stream, forward(1))
    message_id, _ = await peer.read()
    take = stream._take

    def take_and_give_up(number: int, reply: Message) -> None:
        take(number, reply)
        asked.cancel()  # the reply is there, and the task that waits for it has not run yet

    monkeypatch.setattr(stream, "_take", take_and_give_up)
    await peer.send(Forwarded(hidden=torch.zeros(1, 1, 1), lease=5), message_id)
    assert (await peer.read())[1] == Release(leases=[5])
    assert asked.cancelled()


async def test_a_request_that_is_cancelled_leaves_its_place_to_others(connect):
    stream, peer = await connect(max_in_flight=1)
    first = asking(stream, forward(1))
    await peer.read()
    first.cancel()
    second = asking(stream, forward(2))
    message_id, request = await peer.read()
    assert request.hidden.item() == 2.0
    await peer.send(Done(), message_id)
    assert await second == Done()


@pytest.mark.parametrize(
    ("error", "raised"),
    [(LeaseLost, LeaseLost), (ServerBusy, ServerBusy), (RequestRefused, Refused), (SwarmMismatch, Refused)],
)
async def test_a_refusal_is_raised_where_it_was_asked_and_the_stream_lives_on(connect, error, raised):
    stream, peer = await connect()
    asked = asking(stream, forward(0))
    message_id, _ = await peer.read()
    await peer.send(Refusal(error=error.__name__, text="because"), message_id)
    with raises(raised, peer=PEER) as caught:
        await asked
    assert raised is error or isinstance(caught.value.said, error)
    assert stream.alive


async def test_bytes_and_calls_are_counted():
    stats = SwarmStats()
    task, peer = await opening(stats=stats)
    await peer.welcome()
    stream = await task
    request = Forward(span=BlockSpan(0, 1), hidden=torch.zeros(1, 64, 2**13))
    asked = asyncio.create_task(stream.call(request, timeout_s=LONG_S, most_bytes=2**22))
    message_id, received = await peer.read()
    await peer.send(Forwarded(hidden=received.hidden), message_id)
    await asked
    assert (stats.sent_bytes, stats.received_bytes) == (peer.read_bytes, peer.written_bytes)
    assert stats.calls == 2, "Hello and Forward"
    await stream.close()


class Clock:
    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The stream's clock in the hand of the test; its heartbeat is quick."""
    clock = Clock()
    monkeypatch.setattr(stream_module, "awake_s", clock.monotonic)
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.005)
    return clock


async def test_a_server_that_falls_silent_is_left(connect, clock):
    stream, peer = await connect()
    asked = asking(stream, forward(0))
    await peer.read()
    clock.now_s += stream_module.SILENCE_S / 2
    assert isinstance((await peer.read())[1], Ping)
    clock.now_s += stream_module.SILENCE_S
    with raises(ServerUnreachable, peer=PEER):
        await asked


async def test_a_server_that_computes_for_long_is_waited_for_while_it_says_that_it_lives(connect, clock):
    stream, peer = await connect()
    asked = asking(stream, forward(0))
    message_id, _ = await peer.read()
    for _ in range(5):
        clock.now_s += stream_module.SILENCE_S / 2
        ping_id, ping = await peer.read()
        while not isinstance(ping, Ping):
            ping_id, ping = await peer.read()
        heard = stream._stats.received_bytes
        await peer.send(Pong(), ping_id)
        while stream._stats.received_bytes == heard:
            await asyncio.sleep(0)
    assert not asked.done()
    await peer.send(Done(), message_id)
    assert await asked == Done()


async def test_a_server_is_not_left_because_this_process_stood_still(connect, clock):
    stream, peer = await connect()
    asked = asking(stream, forward(0))
    message_id, _ = await peer.read()
    for _ in range(3):
        clock.now_s += 2 * stream_module.SILENCE_S  # at once: no heartbeat was between
        ping_id, ping = await peer.read()
        assert isinstance(ping, Ping)
        heard = stream._stats.received_bytes
        await peer.send(Pong(), ping_id)
        while stream._stats.received_bytes == heard:
            await asyncio.sleep(0)
    await peer.send(Done(), message_id)
    assert await asked == Done()


@pytest.mark.parametrize("ended", ["silent", "closed"])
async def test_a_request_that_a_stopped_server_does_not_even_take_fails_as_those_that_wait_do(connect, clock, ended):
    stream, _peer = await connect()
    asked = [asking(stream, request) for request in (LARGE, forward(0))]
    while stream.blocked_since_s is None:
        await asyncio.sleep(0)
    clock.now_s += 2 * stream_module.SILENCE_S
    if ended == "closed":
        await stream.close()
    errors = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(error) for error in errors] == [ServerUnreachable] * 2


async def test_a_request_that_is_cancelled_while_it_is_written_is_written_to_its_end(connect):
    stream, peer = await connect()
    asked = asking(stream, LARGE)
    while stream.blocked_since_s is None:
        await asyncio.sleep(0)
    asked.cancel()
    await asyncio.sleep(0)
    assert asked.done()
    _, request = await peer.read()
    assert request.hidden.shape == LARGE.hidden.shape
    assert len(peer._assembler) == 0


async def test_silence_counts_from_the_first_question(connect, clock):
    stream, peer = await connect()
    clock.now_s += 100 * stream_module.SILENCE_S
    asked = asking(stream, forward(0))
    message_id, _ = await peer.read()
    await asyncio.sleep(5 * stream_module.HEARTBEAT_S)
    assert not asked.done(), "nobody spoke while nobody asked"
    await peer.send(Done(), message_id)
    assert await asked == Done()

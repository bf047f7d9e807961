"""One stream against a peer that is played by the test, over a pair of connected sockets."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
import pytest_asyncio
import torch
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from petals_tune.errors import (
    LeaseLost,
    RequestRefused,
    ServerBusy,
    ServerError,
    ServerTimeout,
    ServerUnreachable,
    SwarmMismatch,
    UntrustedServer,
)
from petals_tune.net import stream as stream_module
from petals_tune.net.members import Members
from petals_tune.net.stats import SwarmStats
from petals_tune.net.stream import ServerStream
from petals_tune.wire import frames
from petals_tune.wire.frames import HEADER
from petals_tune.wire.messages import (
    Done,
    Forward,
    Forwarded,
    Hello,
    Message,
    Ping,
    Pong,
    Refusal,
    Release,
    Welcome,
)
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tokens import Token, issue
from tests.swarm.played_peer import LONG_S, PEER, RECORD, FakeP2P, Peer, joined_ends, opening


@pytest_asyncio.fixture
async def connect() -> AsyncIterator[Callable]:
    """Opens streams to a played peer; ends them after the test."""
    opened: list[ServerStream] = []

    async def make(**welcome: int) -> tuple[ServerStream, Peer]:
        ends, peer = await joined_ends()
        task = opening(FakeP2P(ends))
        await peer.welcome(**welcome)
        opened.append(await task)
        return opened[-1], peer

    yield make
    for stream in opened:
        await stream.close()


def forward(value: float) -> Forward:
    return Forward(span=BlockSpan(0, 1), hidden=torch.full((1, 1, 1), float(value)))


def asking(stream: ServerStream, request: Message, *, timeout_s: float = LONG_S) -> asyncio.Task[Message]:
    return asyncio.create_task(stream.call(request, timeout_s=timeout_s))


async def test_a_server_that_announces_what_is_no_address_cannot_be_reached():
    nobody = FakeP2P(ends=None)  # type: ignore[arg-type]
    with pytest.raises(ServerUnreachable, match="announces an address that is none"):
        await ServerStream.open(nobody, PEER, ["rubbish"], "m", timeout_s=LONG_S, stats=SwarmStats())  # type: ignore[arg-type]


async def test_requests_are_matched_with_their_replies_by_id_in_whatever_order_these_come(connect):
    stream, peer = await connect()
    asked = [asking(stream, forward(number)) for number in range(8)]
    received = [await peer.receive() for _ in asked]
    for message_id, request in reversed(received):
        await peer.send(message_id, Forwarded(hidden=request.hidden * 10))
    assert [(await reply).hidden.item() for reply in asked] == [10.0 * number for number in range(8)]


async def test_no_more_requests_are_in_flight_than_the_server_allows(connect):
    stream, peer = await connect(max_in_flight=2)
    asked = [asking(stream, forward(number)) for number in range(3)]
    first, _ = await peer.receive()
    second, _ = await peer.receive()
    await stream.notify(Release(leases=[]))  # arrives next, so the third request was not sent
    assert isinstance((await peer.receive())[1], Release)
    await peer.send(second, Done())
    third, request = await peer.receive()
    assert request.hidden.item() == 2.0
    await peer.send(first, Done())
    await peer.send(third, Done())
    assert await asyncio.gather(*asked) == [Done()] * 3


async def test_a_small_request_does_not_wait_for_a_large_one(connect):
    stream, peer = await connect()
    large = asking(stream, Forward(span=BlockSpan(0, 1), hidden=torch.zeros(1, 64, 2**15)))  # 8 MB: 32 frames
    await asyncio.sleep(0)
    small = asking(stream, forward(7))
    small_id, request = await peer.receive()
    assert request.hidden.item() == 7.0, "whole before the large one, which was asked first"
    large_id, _ = await peer.receive()
    await peer.send(large_id, Done())
    await peer.send(small_id, Done())
    assert await asyncio.gather(large, small) == [Done(), Done()]


async def test_the_end_of_the_stream_fails_all_pending_requests_at_once_and_later_ones_without_waiting(connect):
    stream, peer = await connect()
    asked = [asking(stream, forward(number)) for number in range(5)]
    for _ in asked:
        await peer.receive()
    assert stream.alive
    peer.writer.close()
    errors = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(error) for error in errors] == [ServerUnreachable] * 5
    assert not stream.alive
    with pytest.raises(ServerUnreachable, match=f"server {PEER} closed the stream"):
        await stream.call(forward(0), timeout_s=LONG_S)
    await stream.notify(Release(leases=[1]))  # a broken stream is no error here


def test_a_request_that_is_still_being_sent_when_the_stream_ends_fails_once_and_quietly():
    complaints: list[dict] = []

    async def hang_up_meanwhile() -> None:
        ends, peer = await joined_ends()
        task = opening(FakeP2P(ends))
        await peer.welcome()
        stream = await task
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        asked = asking(stream, Forward(span=BlockSpan(0, 1), hidden=torch.zeros(1, 64, 2**15)))  # 8 MB, not read
        await peer.reader.readexactly(HEADER.size)
        peer.writer.transport.abort()
        with pytest.raises(ServerUnreachable):
            await asked
        await stream.close()

    asyncio.run(hang_up_meanwhile())
    gc.collect()  # asyncio complains of an error that nobody asked for when its future is freed
    assert complaints == []


async def test_closing_fails_what_is_pending(connect):
    stream, peer = await connect()
    asked = asking(stream, forward(0))
    await peer.receive()
    await stream.close()
    with pytest.raises(ServerUnreachable, match="was closed"):
        await asked


@pytest.mark.parametrize(
    "sent",
    [
        HEADER.pack(frames.MAX_FRAME_BYTES + 1, 1, 0),
        HEADER.pack(1, 1, 2**32 - 1) + b"x",
        HEADER.pack(3, 2, 0) + b"\xc1\xc1\xc1",
    ],
    ids=["frame too long", "message too long", "no message"],
)
async def test_a_server_that_breaks_the_protocol_is_left(connect, sent):
    stream, peer = await connect()
    asked = asking(stream, forward(0))
    message_id, _ = await peer.receive()
    assert message_id == 2
    peer.writer.write(sent)
    with pytest.raises(ServerUnreachable, match="breaks the protocol"):
        await asked
    assert not stream.alive


async def test_an_answer_that_nobody_waits_for_any_more_is_ignored(connect):
    stream, peer = await connect()
    with pytest.raises(ServerTimeout, match=r"did not answer within 0\.01 s"):
        await stream.call(forward(1), timeout_s=0.01)
    late, _ = await peer.receive()
    asked = asking(stream, forward(2))
    message_id, _ = await peer.receive()
    await peer.send(late, Refusal(error="RequestRefused", text="late"))
    await peer.send(message_id, Done())
    assert await asked == Done()


async def test_a_request_that_is_cancelled_leaves_its_place_to_others(connect):
    stream, peer = await connect(max_in_flight=1)
    first = asking(stream, forward(1))
    await peer.receive()
    first.cancel()
    second = asking(stream, forward(2))
    message_id, request = await peer.receive()
    assert request.hidden.item() == 2.0
    await peer.send(message_id, Done())
    assert await second == Done()


@pytest.mark.parametrize("error", [LeaseLost, ServerBusy, RequestRefused, SwarmMismatch])
async def test_a_refusal_is_raised_where_it_was_asked_and_the_stream_lives_on(connect, error):
    stream, peer = await connect()
    asked = asking(stream, forward(0))
    message_id, _ = await peer.receive()
    await peer.send(message_id, Refusal(error=error.__name__, text="because"))
    with pytest.raises(error, match=f"because .*{PEER}"):
        await asked
    assert stream.alive


async def test_bytes_and_calls_are_counted():
    stats = SwarmStats()
    ends, peer = await joined_ends()
    task = opening(FakeP2P(ends), stats=stats)
    await peer.welcome()
    stream = await task
    asked = asking(stream, Forward(span=BlockSpan(0, 1), hidden=torch.zeros(1, 64, 2**13)))
    message_id, request = await peer.receive()
    await peer.send(message_id, Forwarded(hidden=request.hidden))
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
    monkeypatch.setattr(stream_module, "time", clock)
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.005)
    return clock


async def test_a_server_that_falls_silent_is_left(connect, clock):
    stream, peer = await connect()
    asked = asking(stream, forward(0))
    await peer.receive()
    clock.now_s += stream_module.SILENCE_S / 2
    assert isinstance((await peer.receive())[1], Ping)
    clock.now_s += stream_module.SILENCE_S
    with pytest.raises(ServerUnreachable, match="fell silent for 9 s"):
        await asked


async def test_a_server_that_computes_for_long_is_waited_for_while_it_says_that_it_lives(connect, clock):
    stream, peer = await connect()
    asked = asking(stream, forward(0))
    message_id, _ = await peer.receive()
    for _ in range(5):
        clock.now_s += stream_module.SILENCE_S / 2
        ping_id, ping = await peer.receive()
        while not isinstance(ping, Ping):
            ping_id, ping = await peer.receive()
        heard = stream._stats.received_bytes
        await peer.send(ping_id, Pong())
        while stream._stats.received_bytes == heard:
            await asyncio.sleep(0)
    assert not asked.done()
    await peer.send(message_id, Done())
    assert await asked == Done()


async def test_silence_counts_from_the_first_question(connect, clock):
    stream, peer = await connect()
    clock.now_s += 100 * stream_module.SILENCE_S
    asked = asking(stream, forward(0))
    message_id, _ = await peer.receive()
    await asyncio.sleep(5 * stream_module.HEARTBEAT_S)
    assert not asked.done(), "nobody spoke while nobody asked"
    await peer.send(message_id, Done())
    assert await asked == Done()


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (Refusal(error="SwarmMismatch", text="another model"), SwarmMismatch, "another model"),
        (Done(), ServerError, "answered Hello with Done"),
        (None, ServerUnreachable, "closed the stream"),
    ],
    ids=["refused", "no welcome", "hung up"],
)
async def test_a_greeting_that_goes_wrong_is_an_error_and_leaves_nothing_open(answer, error, text):
    ends, peer = await joined_ends()
    task = opening(FakeP2P(ends))
    message_id, hello = await peer.receive()
    assert hello == Hello(model="m")
    if answer is None:
        peer.writer.close()
    else:
        await peer.send(message_id, answer)
    with pytest.raises(error, match=text):
        await task
    if answer is not None:
        assert await peer.reader.read() == b"", "our end is closed"


OWNER, ALICE, HOST, IMPOSTOR = (SigningKey(bytes([number]) * 32) for number in range(4))


def token_of(key: SigningKey, owner: SigningKey = OWNER, *, hosts: bool = True, expires_s: int = 2**39) -> Token:
    return issue(owner, name="somebody", peer=key.peer, hosts=hosts, expires_s=expires_s)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (None, "this swarm is private"),
        (token_of(HOST), "was issued to peer"),
        (token_of(IMPOSTOR, IMPOSTOR), "not signed by this swarm's key"),
        (token_of(IMPOSTOR, hosts=False), "does not let it host"),
        (token_of(IMPOSTOR, expires_s=1), "has expired"),
    ],
    ids=["none", "copied", "forged", "client's", "expired"],
)
async def test_a_member_sends_nothing_to_a_server_without_a_good_token(shown, text):
    ends, peer = await joined_ends()
    mine = token_of(ALICE, hosts=False)
    members = Members(OWNER.public, ALICE, lambda _: mine)
    task = opening(FakeP2P(ends), peer=IMPOSTOR.peer, members=members)
    message_id, hello = await peer.receive()
    assert hello == Hello(model="m", token=mine.encoded)
    token = None if shown is None else shown.encoded
    await peer.send(message_id, Welcome(record=RECORD, max_in_flight=1, max_message_bytes=1, token=token))
    with pytest.raises(UntrustedServer, match=text):
        await task
    assert await peer.reader.read() == b"", "our end is closed, and nothing came after the Hello"


async def test_a_server_that_does_not_greet_in_time_is_given_up():
    ends, peer = await joined_ends()
    with pytest.raises(ServerTimeout, match=PEER):
        await opening(FakeP2P(ends), timeout_s=0.01)
    await peer.receive()
    assert await peer.reader.read() == b"", "our end is closed"


@pytest.mark.parametrize("failure", [P2PDaemonError("no route"), ConnectionRefusedError("no"), OSError("no")], ids=repr)
async def test_a_server_that_cannot_be_reached_is_named(failure):
    ends, _ = await joined_ends()
    with pytest.raises(ServerUnreachable, match=f"server {PEER} cannot be reached: no"):
        await opening(FakeP2P(ends, failure))


def test_the_played_record_is_a_legal_one():
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(RECORD), type=ServerRecord) == RECORD

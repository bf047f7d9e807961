"""One client's view of a swarm: which servers it knows, whom it asks, and what it leaves behind."""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from petals_tune.errors import (
    AccessDenied,
    BadReply,
    NotFinite,
    ServerBusy,
    ServerUnreachable,
    SwarmError,
    SwarmMismatch,
    UncoveredBlocks,
)
from petals_tune.net.directory import Snapshot
from petals_tune.net.in_process import InProcessDirectory, InProcessNetwork
from petals_tune.net.stream import ServerStream
from petals_tune.swarm import client as module
from petals_tune.swarm.client import REFRESH_S, REMEMBERED_S, STALE_S, SwarmClient
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.wire.messages import Refusal
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from tests.net.played_peer import LONG_S, PlayedPeer, accepted
from tests.raising import raises

MODEL = "m"
WHOLE = BlockSpan(0, 6)


def record(peer: str, span: str = "0:6", **changes: Any) -> ServerRecord:
    blocks = BlockSpan.parse(span)
    return ServerRecord(
        **{
            "peer": peer,
            "addresses": (),
            "model": MODEL,
            "model_name": "tiny",
            "blocks": blocks,
            "total_blocks": 6,
            "quantization": "none",
            "dtype": "float32",
            **changes,
        }
    )


A, B = record("a"), record("b")


class Shown(InProcessDirectory):
    """Shows what the test wants shown, and counts how often."""

    def __init__(self, *records: ServerRecord):
        super().__init__()
        self.records = records
        self.readings = 0
        self.before: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0)

    async def snapshot(self) -> Snapshot:
        self.readings += 1
        await self.before()
        return msgspec.structs.replace(Snapshot.of(self.records), taken_at_s=module.time.monotonic())


class Clock:
    """The time as the client sees it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class Swarm:
    """A client, a directory that shows `records`, and servers that the test plays."""

    def __init__(self, *records: ServerRecord):
        self.network = InProcessNetwork()
        self.directory = self.network.directory = Shown(*records)
        self.client = SwarmClient(self.network.peer("client"), MODEL, RetryPolicy(connect_s=LONG_S))
        self._played: list[PlayedPeer] = []

    async def opened(self, server: ServerRecord) -> ServerStream:
        """A stream to `server`, which begins to accept with this."""
        ends = await accepted(self.network, server.peer)
        opening = asyncio.create_task(self.client.stream(server))
        self._played.append(await ends.get())
        await self._played[-1].welcome()
        return await opening

    async def peers(self, span: BlockSpan = WHOLE) -> list[str]:
        return [hop.server.peer for hop in await self.client.route(span, work=1)]

    def known(self) -> list[str]:
        return [server.peer for server in self.client.servers]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


# What it knows


async def test_all_who_ask_for_the_directory_at_once_share_one_reading():
    swarm = Swarm(A)
    await asyncio.gather(*(swarm.client.refresh() for _ in range(5)))
    assert swarm.directory.readings == 1
    await swarm.client.refresh()
    assert swarm.directory.readings == 2


async def test_who_gives_up_waiting_does_not_end_the_reading_for_others():
    swarm, ready = Swarm(A), asyncio.Event()
    swarm.directory.before = ready.wait
    first, second = (asyncio.create_task(swarm.client.refresh()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    ready.set()
    await second
    assert swarm.known() == ["a"]
    assert swarm.directory.readings == 1


async def test_work_goes_on_with_an_old_snapshot_while_it_is_renewed(clock):
    swarm, never = Swarm(A), asyncio.Event()
    assert await swarm.peers() == ["a"]
    clock.now_s += REFRESH_S
    await swarm.peers()
    assert swarm.directory.readings == 1
    clock.now_s += 0.1
    swarm.directory.before = never.wait
    assert await swarm.peers() == ["a"]
    await asyncio.sleep(0)
    assert swarm.directory.readings == 2
    await swarm.client.close()


async def test_a_directory_that_does_not_let_us_in_any_more_ends_work_only_once_blocks_are_missing(clock):
    """Our token has expired: servers end the streams, and nobody answers."""
    swarm, complaints = Swarm(A), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    assert await swarm.peers() == ["a"]

    async def refuse() -> None:
        raise AccessDenied("our token has expired", reason="expired", member="alice")

    clock.now_s += REFRESH_S + 0.1
    swarm.directory.before = refuse
    assert await swarm.peers() == ["a"]
    reading = swarm.client.refresh_soon()
    while not reading.done():
        await asyncio.sleep(0)
    del reading
    with raises(AccessDenied, reason="expired", member="alice"):
        await swarm.peers(BlockSpan(0, 7))
    await swarm.client.close()
    gc.collect()  # asyncio complains of an error that nobody asked for when its task is freed
    assert complaints == []


async def test_the_directory_is_read_again_before_blocks_are_said_to_be_missing(clock):
    swarm = Swarm(record("half", "0:3"))
    with raises(UncoveredBlocks, missing=(BlockSpan(3, 6),)):
        await swarm.peers()
    assert swarm.directory.readings == 1, "it was just read"
    swarm.directory.records = (*swarm.directory.records, record("other half", "3:6"))
    with raises(UncoveredBlocks):
        await swarm.peers()
    clock.now_s += STALE_S + 0.1
    assert await swarm.peers() == ["half", "other half"]
    assert swarm.directory.readings == 2


async def test_servers_of_another_model_are_none(clock):
    swarm = Swarm(A, record("other", model="x"))
    await swarm.client.refresh()
    assert swarm.known() == ["a"]
    swarm.directory.records = (record("other", model="x"),)
    clock.now_s += REMEMBERED_S + 1
    await swarm.client.refresh()
    with raises(SwarmMismatch, wanted=MODEL, found=("x",)):
        await swarm.peers()


async def test_a_server_that_one_reading_missed_is_remembered_for_a_while(clock):
    swarm = Swarm(A, B)
    await swarm.client.refresh()
    swarm.directory.records = (B,)
    clock.now_s += REMEMBERED_S - 1
    await swarm.client.refresh()
    assert sorted(swarm.known()) == ["a", "b"]
    clock.now_s += 1
    await swarm.client.refresh()
    assert swarm.known() == ["b"]


async def test_a_server_to_which_a_stream_is_open_is_remembered_as_long_as_that(clock):
    swarm = Swarm(A)
    await swarm.client.refresh()
    stream = await swarm.opened(A)
    swarm.directory.records = ()
    clock.now_s += 10 * REMEMBERED_S
    await swarm.client.refresh()
    assert swarm.known() == ["a"]
    await stream.close()
    await swarm.client.refresh()
    assert swarm.known() == []


@pytest.mark.parametrize("state", ["offline", "joining"])
async def test_a_server_that_says_that_it_does_not_serve_is_not_remembered(state):
    swarm = Swarm(A, B)
    await swarm.client.refresh()
    swarm.directory.records = (msgspec.structs.replace(A, state=state), B)
    await swarm.client.refresh()
    assert swarm.known() == ["b"]


async def test_a_server_that_failed_is_not_remembered(clock):
    swarm = Swarm(A, B)
    await swarm.client.refresh()
    swarm.client.failed(A, ServerUnreachable("gone", peer="a"))
    swarm.directory.records = (B,)
    await swarm.client.refresh()
    assert swarm.known() == ["b"]


# Whom it asks


async def test_a_server_that_failed_is_passed_over_until_it_answers_unless_nobody_else_is_there():
    swarm = Swarm(A, B)
    assert await swarm.peers() == ["a"]
    swarm.client.failed(A, ServerUnreachable("gone", peer="a"))
    assert swarm.client.lost(A)
    assert await swarm.peers() == ["b"]
    swarm.client.failed(B, ServerUnreachable("gone", peer="b"))
    assert await swarm.peers() == ["a"], "better than nobody"
    swarm.client.answered(A)
    assert not swarm.client.lost(A)
    assert swarm.client.banned() == {"b"}


@pytest.mark.parametrize(("error", "asked"), [(BadReply("wrong", peer="a"), False), (NotFinite("NaN", peer="a"), True)])
async def test_a_server_that_computes_wrongly_is_not_asked_even_where_nobody_else_is(caplog, error, asked):
    """NaN may be the request's own doing, and another server may not be there to tell."""
    swarm = Swarm(A)
    await swarm.client.refresh()
    swarm.client.failed(A, error)
    swarm.client.answered(A)
    assert swarm.client.banned() == {"a"}, "whatever it answers"
    if asked:
        assert await swarm.peers() == ["a"]
    else:
        with raises(UncoveredBlocks, missing=(WHOLE,), seen=("a",)):
            await swarm.peers()
    (warning,) = caplog.messages
    assert "server a " in warning


async def test_a_server_that_only_failed_is_asked_before_one_that_returned_nan():
    """A request that meets NaN twice ends the run, and the one that failed may have been only slow."""
    swarm = Swarm(A, B)
    assert await swarm.peers() == ["a"]
    swarm.client.failed(A, NotFinite("NaN", peer="a"))
    swarm.client.failed(B, ServerUnreachable("silent", peer="b"))
    assert await swarm.peers() == ["b"]


async def test_a_server_whose_ban_ended_is_reached_beside_the_work_and_only_then_used(monkeypatch):
    swarm, clock = Swarm(A, B), Clock()
    await swarm.client.refresh()
    clock.now_s = time.monotonic()
    swarm.client.failed(A, ServerUnreachable("gone", peer="a"))
    ends = await accepted(swarm.network, "a")
    assert await swarm.peers() == ["b"]
    assert ends.empty(), "it is left alone"
    clock.now_s += 3600.0
    monkeypatch.setattr(module, "time", clock)
    await swarm.client.refresh()
    for _ in range(2):
        assert await swarm.peers() == ["b"], "nobody waits for it"
    played = await ends.get()
    await played.welcome()
    while swarm.client.banned():
        await asyncio.sleep(0)
    assert await swarm.peers() == ["a"]
    assert ends.empty(), "it was reached once"
    await swarm.client.close()


async def test_a_server_that_cannot_be_reached_is_named_with_its_blocks_and_banned():
    swarm = Swarm(A)
    with raises(ServerUnreachable, peer="a"):
        await swarm.client.stream(A)
    assert swarm.client.banned() == {"a"}


async def test_a_server_that_refuses_a_stream_says_why():
    swarm = Swarm(A)
    ends = await accepted(swarm.network, "a")
    opening = asyncio.create_task(swarm.client.stream(A))
    played = await ends.get()
    number, _ = await played.read()
    await played.send(Refusal.of(ServerBusy("full", limit="max_streams")), number)
    with raises(ServerBusy, peer="a", limit="max_streams"):
        await opening


# What it leaves behind


async def test_a_closed_client_has_no_streams_and_no_tasks_and_does_nothing_more():
    swarm, never = Swarm(A), asyncio.Event()
    await swarm.client.refresh()
    stream = await swarm.opened(A)
    swarm.directory.before = never.wait
    refreshing = swarm.client.refresh_soon()
    await asyncio.sleep(0)
    await swarm.client.close()
    assert not stream.alive
    assert refreshing.cancelled()
    for use in (lambda: swarm.client.route(WHOLE, work=1), lambda: swarm.client.stream(A)):
        with raises(SwarmError):
            await use()

"""The servers that a client knows: what the directory shows, and what it does not show for a while."""

import asyncio
import gc

import msgspec
import pytest

from petals_tune.errors import AccessDenied, ServerUnreachable, UncoveredBlocks
from petals_tune.swarm.routes.known import REFRESH_S, REMEMBERED_S
from petals_tune.swarm.routes.routing import STALE_S
from petals_tune.wire.span import BlockSpan
from tests.raising import raises
from tests.swarm.played_swarm import A, B, Swarm, record


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
    swarm, never = await Swarm.up(A), asyncio.Event()
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


async def test_the_directory_is_read_again_before_blocks_are_said_to_be_missing(clock):
    swarm = await Swarm.up(*(halves := (record("half", "0:3"), record("other half", "3:6"))))
    swarm.directory.records = halves[:1]
    with raises(UncoveredBlocks, missing=(BlockSpan(3, 6),)):
        await swarm.peers()
    assert swarm.directory.readings == 1, "it was just read"
    swarm.directory.records = halves
    with raises(UncoveredBlocks):
        await swarm.peers()
    clock.now_s += STALE_S + 0.1
    assert await swarm.peers() == ["half", "other half"]
    assert swarm.directory.readings == 2


async def test_a_directory_that_does_not_let_us_in_any_more_ends_work_only_once_blocks_are_missing(clock):
    """Our token has expired: servers end the streams, and nobody answers."""
    swarm, complaints = await Swarm.up(A), []
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


async def test_servers_in_another_quantization_than_is_wanted_are_passed_over():
    """As are schemes that nobody here has heard of; the error says so in no word of theirs."""
    others = record("c", quantization="int8_activations"), record("d", quantization="their own; rm")
    swarm = await Swarm.up(A, *others, quantizations=["int8_activations"])
    assert await swarm.peers() == ["c"]
    assert swarm.known() == ["c"]
    swarm = await Swarm.up(*others, quantizations=["int8", "none"])
    with raises(UncoveredBlocks, missing=(BlockSpan(0, 6),), seen=()) as caught:
        await swarm.peers()
    assert "2 servers" in str(caught.value)
    assert "their own" not in str(caught.value)
    assert {server.peer for server in swarm.client.passed_over} == {"c", "d"}


async def test_a_server_that_comes_back_in_another_quantization_is_not_remembered():
    swarm = await Swarm.up(A, B, quantizations=["none"])
    await swarm.peers()
    swarm.directory.records = (A, record("b", quantization="int8"))
    await swarm.client.refresh()
    assert swarm.known() == ["a"]

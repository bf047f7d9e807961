"""A client's routes: which servers are used, dialled and tried."""

import asyncio

import pytest

from petals_tune.errors import BadReply, NotFinite, RequestTooLarge, ServerTimeout, ServerUnreachable, UncoveredBlocks
from petals_tune.swarm.routes import dialler, routing
from petals_tune.swarm.routes.limits import ServerLimits, Size
from petals_tune.swarm.routes.trials import FIRST_PAUSE_S, LEAST_S
from petals_tune.wire.records import Throughput
from tests.raising import raises
from tests.swarm.played_swarm import WHOLE, A, B, Swarm, record


async def test_a_server_that_failed_is_passed_over_until_it_answers_unless_nobody_else_is_there():
    swarm = await Swarm.up(A, B)
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
    swarm = await Swarm.up(A)
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
    swarm = await Swarm.up(A, B)
    assert await swarm.peers() == ["a"]
    swarm.client.failed(A, NotFinite("NaN", peer="a"))
    swarm.client.failed(B, ServerUnreachable("silent", peer="b"))
    assert await swarm.peers() == ["b"]


async def test_what_float16_cannot_hold_goes_to_no_other_server_in_float16_where_there_is_a_wider_one():
    narrow, narrow_too, wide = record("a", dtype="float16"), record("b", dtype="float16"), record("c", dtype="bfloat16")
    swarm = await Swarm.up(narrow, narrow_too, wide)
    assert await swarm.peers() == ["a"]
    swarm.client.failed(narrow, ServerUnreachable("gone", peer="a"))
    assert await swarm.peers() == ["b"]
    swarm.client.failed(narrow_too, NotFinite("inf", peer="b"))
    assert swarm.client.banned() == {"a", "b"}
    assert await swarm.peers() == ["c"]
    swarm.client.failed(wide, NotFinite("NaN", peer="c"))
    assert await swarm.peers() == ["a"], "better than nobody"


async def test_a_server_whose_ban_ended_is_reached_beside_the_work_and_only_then_used(clock):
    swarm = await Swarm.up(A, B)
    assert await swarm.peers() == ["a"]
    swarm.client.failed(A, ServerUnreachable("gone", peer="a"))
    swarm.network.find("a").disconnect()
    assert await swarm.peers() == ["b"]
    swarm.network.silent, swarm.network.dialled = ["a"], []
    clock.now_s += 3600.0
    await swarm.client.refresh()
    for _ in range(3):
        assert await swarm.peers() == ["b"], "nobody waits for it"
        await asyncio.sleep(0)
    assert swarm.network.dialled == ["a"], "once at a time"
    assert swarm.client.banned() == {"a"}
    await swarm.client.close()


async def test_a_server_that_can_be_reached_again_is_used_again(clock):
    swarm = await reached(A, B, measured=[A, B])
    assert await swarm.peers() == ["a"]
    swarm.client.failed(A, ServerUnreachable("gone", peer="a"))
    assert await swarm.peers() == ["b"]
    clock.now_s += 3600.0
    await swarm.client.refresh()
    while swarm.client.banned():
        await swarm.peers()
        await asyncio.sleep(0.001)
    assert await swarm.peers() == ["a"]
    await swarm.client.close()


# Servers that may not be there


FAST = Throughput(step=9e11, batch=9e11)


async def test_a_better_server_is_dialled_beside_the_work_and_used_once_it_was_reached(clock):
    swarm = await Swarm.up(A, fast := record("fast", throughput=FAST))
    swarm.directory.records = (A,)
    assert await swarm.peers() == ["a"]
    swarm.directory.records, swarm.network.silent = (A, fast), ["fast"]
    await swarm.client.refresh()
    clock.now_s += routing.EXPLORE_S
    for _ in range(3):
        assert await swarm.peers() == ["a"]
        await asyncio.sleep(0)
    assert swarm.network.dialled == ["a", "fast"], "it is tried, and not waited for"
    await swarm.client.close()


async def test_a_better_server_that_answers_is_used(clock):
    swarm = await Swarm.up(A, fast := record("fast", throughput=FAST))
    swarm.directory.records = (A,)
    assert await swarm.peers() == ["a"]
    swarm.directory.records = (A, fast)
    await swarm.client.refresh()
    clock.now_s += routing.EXPLORE_S
    while await swarm.peers() == ["a"]:
        await asyncio.sleep(0.001)
    assert await swarm.peers() == ["fast"]
    await swarm.client.close()


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "refusing"])
async def test_many_invented_servers_cost_a_few_dials_for_each_host_and_not_one_for_each_name(monkeypatch, silent):
    monkeypatch.setattr(dialler, "SLOW_S", 0.005)
    invented = [
        record(f"x{number:03}", throughput=FAST, addresses=(f"/ip4/10.0.0.{number % 6}/tcp/1/p2p/x{number:03}",))
        for number in range(300)
    ]
    honest = record("honest", addresses=("/ip4/10.0.1.1/tcp/1/p2p/honest",))
    swarm = await Swarm.up(*invented, honest, without=() if silent else {each.peer for each in invented})
    swarm.network.silent = {each.peer for each in invented}
    async with asyncio.timeout(10.0):
        assert await swarm.peers() == ["honest"]
    assert len(set(swarm.network.dialled)) <= 6 * 3 + 1
    for _ in range(5):
        assert await swarm.peers() == ["honest"]
    await swarm.client.close()


async def test_all_servers_of_a_chain_are_dialled_at_once():
    spans = ["0:2", "2:4", "4:6"]
    swarm = await Swarm.up(*(record(span, span) for span in spans))
    swarm.network.silent = spans
    routing = asyncio.create_task(swarm.client.route(WHOLE, work=1))
    while len(swarm.network.dialled) < 3:
        await asyncio.sleep(0.001)
    assert sorted(swarm.network.dialled) == spans
    routing.cancel()
    await swarm.client.close()


async def test_dials_of_a_minute_end_and_the_work_is_tried_again_later(monkeypatch):
    monkeypatch.setattr(dialler, "A_MINUTE", 1)
    swarm = await Swarm.up(record("half", "0:3"), record("other", "3:6"))
    with raises(ServerUnreachable):
        await swarm.client.route(WHOLE, work=1)
    await swarm.client.close()


async def test_no_more_servers_are_explored_where_many_were_reached(clock, monkeypatch):
    monkeypatch.setattr(routing, "MOST_STREAMS", 1)
    swarm = await Swarm.up(A, fast := record("fast", throughput=FAST))
    swarm.directory.records = (A,)
    assert await swarm.peers() == ["a"]
    swarm.directory.records = (A, fast)
    await swarm.client.refresh()
    clock.now_s += routing.EXPLORE_S
    assert await swarm.peers() == ["a"]
    await asyncio.sleep(0)
    assert swarm.network.dialled == ["a"]


async def test_where_all_failed_one_that_worked_before_is_asked_first():
    swarm = await Swarm.up(A, B)
    await swarm.client.refresh()
    swarm.client.load.add_measurement(B, 100.0, 1, 6)
    for each in (A, B):
        swarm.client.failed(each, ServerUnreachable("gone", peer=each.peer))
    assert await swarm.peers() == ["b"], "however slow: the other one may not be there"


# Newcomers


async def reached(*records, measured=()):
    """A swarm whose servers were reached, of which some were `measured` to be as fast as they announce."""
    swarm = await Swarm.up(*records)
    for each in records:
        await swarm.client.stream(each)
    await swarm.client.refresh()
    for each in measured:
        swarm.client.load.add_measurement(each, each.throughput.computing_s(1, 6), 1, 6)
    return swarm


async def test_a_newcomer_that_others_could_replace_has_to_answer_soon_and_the_others_have_their_time():
    new = record("new", throughput=FAST)
    known = record("known", throughput=Throughput(step=100.0, batch=100.0))
    swarm = await reached(known, new, measured=[known])
    assert await swarm.peers() == ["new"], "it claims more"
    assert swarm.client.reply_s(new) == LEAST_S
    assert swarm.client.reply_s(known) == swarm.client.policy.reply_s


async def test_a_newcomer_that_nobody_else_could_replace_has_the_time_of_all():
    new = record("new", "3:6", throughput=FAST)
    known = record("known", "0:4", throughput=Throughput(step=100.0, batch=100.0))
    swarm = await reached(known, new, measured=[known])
    assert await swarm.peers() == ["known", "new"]
    assert swarm.client.reply_s(new) == swarm.client.policy.reply_s


async def test_after_newcomers_failed_measured_servers_do_the_work_for_a_while(clock):
    liars = [record(f"liar{number}", throughput=FAST) for number in range(3)]
    known = record("known", throughput=Throughput(step=100.0, batch=100.0))
    swarm = await reached(known, *liars, measured=[known])
    assert await swarm.peers() == ["liar0"]
    swarm.client.failed(liars[0], ServerTimeout("late", peer="liar0"))
    assert await swarm.peers() == ["known"]
    clock.now_s += FIRST_PAUSE_S
    assert await swarm.peers() == ["liar1"]
    swarm.client.failed(liars[1], ServerTimeout("late", peer="liar1"))
    clock.now_s += FIRST_PAUSE_S
    assert await swarm.peers() == ["known"], "twice as long"


async def test_newcomers_are_used_in_the_pause_where_nobody_else_holds_the_blocks(clock):
    liar, known, new = record("liar", throughput=FAST), record("known", "0:3"), record("new", "3:6")
    swarm = await reached(liar, known, new, measured=[known])
    assert await swarm.peers() == ["liar"]
    swarm.client.failed(liar, ServerTimeout("late", peer="liar"))
    assert await swarm.peers() == ["known", "new"]


# Latency


async def test_generation_takes_the_chain_of_the_least_time_for_a_token_and_training_the_most_tokens():
    near = record("near", throughput=Throughput(step=100.0, batch=100.0))
    far = record("far", throughput=Throughput(step=200.0, batch=200.0))
    swarm = await reached(near, far, measured=[near, far])
    trips = swarm.client._routing.round_trips
    for peer, seconds in {"near": 1e-6, "far": 0.2}.items():
        for _ in range(5):
            trips.add(peer, seconds)
    assert await swarm.peers() == ["far"]
    assert await swarm.peers(latency="never") == ["near"]
    await swarm.client.close()


async def test_generation_takes_two_servers_that_are_near_each_other_where_they_hand_on():
    announced = record("b1", "0:3", round_trips_s={"b2": 0.001})
    servers = [record("a1", "0:3"), announced, record("a2", "3:6"), record("b2", "3:6")]
    swarm = await reached(*servers, measured=servers)
    trips = swarm.client._routing.round_trips
    for each in servers:
        for _ in range(5):
            trips.add(each.peer, 0.1 if each.peer.startswith("a") else 0.11)
    assert await swarm.peers(latency="never") == ["a1", "a2"]
    assert await swarm.peers(latency="auto") == ["b1", "b2"]
    await swarm.client.close()


async def test_for_the_least_latency_servers_are_dialled_of_which_nothing_but_the_way_could_speak(clock):
    """Which of them is near shows only once it was reached."""
    slow = [record(f"slow{number}", throughput=Throughput(step=0.5, batch=0.5)) for number in range(3)]
    swarm = await Swarm.up(A, *slow)
    for _ in range(100):
        assert await swarm.peers(latency="auto")
        clock.now_s += routing.EXPLORE_S
        await asyncio.sleep(0)
        if len(set(swarm.network.dialled)) == 4:
            break
    assert len(set(swarm.network.dialled)) == 4
    await swarm.client.close()


# Limits


def takes(swarm: Swarm, peer: str, tokens: int) -> None:
    swarm.client.limits.said(peer, ServerLimits(tokens=tokens, positions=100, message_bytes=2**30))


async def test_a_route_leads_over_servers_that_take_as_much():
    swarm = await Swarm.up(A, B)
    assert await swarm.peers() == ["a"]
    takes(swarm, "a", 9)
    assert await swarm.peers(size=Size(tokens=9)) == ["a"]
    assert await swarm.peers(size=Size(tokens=10)) == ["b"]
    assert not swarm.client.banned()


async def test_where_all_take_less_the_largest_number_is_said_and_banned_servers_count():
    swarm = await Swarm.up(A, B)
    for name, tokens in (("a", 9), ("b", 12)):
        await swarm.peers(without={"a", "b"} - {name})
        takes(swarm, name, tokens)
    swarm.client.failed(B, ServerUnreachable("gone", peer="b"))
    with raises(RequestTooLarge, limit="max_tokens", size=20, fits=12):
        await swarm.peers(size=Size(tokens=20))


async def test_a_server_that_refused_a_piece_of_work_is_not_asked_for_it_even_where_nobody_else_is():
    swarm = await Swarm.up(A, B)
    assert await swarm.peers(without={"a"}) == ["b"]
    assert await swarm.client.others(WHOLE, without={"a"})
    assert not await swarm.client.others(WHOLE, without={"a", "b"})
    with raises(UncoveredBlocks, missing=(WHOLE,)):
        await swarm.peers(without={"a", "b"})


async def test_the_directory_is_asked_before_it_is_said_that_nobody_else_is_there(clock):
    swarm = await Swarm.up(A, B)
    swarm.directory.records = (A,)
    await swarm.client.refresh()
    clock.now_s += routing.STALE_S + 1
    swarm.directory.records = (A, B)
    assert await swarm.client.others(WHOLE, without={"a"})

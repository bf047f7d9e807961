import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_tune.errors import SwarmMismatch, UncoveredBlocks
from petals_tune.swarm.load import Load
from petals_tune.swarm.route import HOP_COST_BLOCKS, Hop, plan_route
from petals_tune.wire.records import ServerRecord, Throughput
from petals_tune.wire.span import BlockSpan
from tests.raising import raises

MODEL = "m" * 64


def server(peer: str, start: int, stop: int, *, model: str = MODEL) -> ServerRecord:
    return ServerRecord(
        peer=peer,
        addresses=(f"/ip4/10.0.0.1/tcp/1/p2p/{peer}",),
        model=model,
        model_name=f"name-of-{model[:3]}",
        blocks=BlockSpan(start, stop),
        total_blocks=12,
        quantization="none",
        dtype="float32",
    )


def describe(route: Sequence[Hop]) -> list[str]:
    return [f"{hop.server.peer}={hop.span}" for hop in route]


def planned(servers: Sequence[ServerRecord], start: int = 0, stop: int = 12, **options) -> list[str]:
    return describe(plan_route(servers, BlockSpan(start, stop), model=MODEL, **options))


def test_one_server_is_enough_where_it_holds_all():
    assert planned([server("a", 0, 12)]) == ["a=0:12"]
    assert planned([server("a", 0, 12)], 3, 5) == ["a=3:5"]


def test_spans_are_joined():
    assert planned([server("b", 5, 12), server("a", 0, 5)]) == ["a=0:5", "b=5:12"]


@pytest.mark.parametrize(("slow", "route"), [("b", ["a=0:8", "b=8:12"]), ("a", ["a=0:4", "b=4:12"])])
def test_where_two_spans_overlap_the_faster_server_takes_the_blocks_of_both(slow, route):
    servers = [server("a", 0, 8), server("b", 4, 12)]
    assert planned(servers, cost=lambda server, blocks: blocks * (2 if server.peer == slow else 1)) == route


def test_fewer_servers_are_cheaper_at_equal_speed():
    assert planned([server("a", 0, 6), server("b", 6, 12), server("c", 0, 12)]) == ["c=0:12"]


def test_a_slow_server_is_passed_over_where_two_fast_ones_cost_less():
    servers = [server("a", 0, 6), server("b", 6, 12), server("slow", 0, 12)]
    assert planned(servers, cost=lambda server, blocks: blocks * (3 if server.peer == "slow" else 1)) == [
        "a=0:6",
        "b=6:12",
    ]


def test_a_fast_server_takes_as_many_blocks_as_it_holds():
    servers = [server("fast", 2, 10), server("slow", 0, 12)]
    cost = {"fast": 0.1, "slow": 1.0}
    assert planned(servers, cost=lambda server, blocks: cost[server.peer] * blocks) == [
        "slow=0:2",
        "fast=2:10",
        "slow=10:12",
    ]


def test_banned_servers_are_not_used():
    servers = [server("a", 0, 12), server("b", 0, 12)]
    assert planned(servers, banned={"a"}) == ["b=0:12"]


def test_equal_routes_are_told_apart_by_peer_id_whatever_the_order():
    servers = [server(peer, *span) for peer in "dbca" for span in [(0, 6), (6, 12)]]
    assert planned(servers) == planned(servers[::-1]) == ["a=0:6", "a=6:12"]


def test_work_in_hand_sends_the_next_micro_batch_to_a_replica():
    servers, load = [server("a", 0, 12), server("b", 0, 12)], Load()
    used, reservations = [], ExitStack()
    for _ in range(4):
        (hop,) = plan_route(
            servers, BlockSpan(0, 12), model=MODEL, cost=lambda server, blocks: load.cost(server, 1, blocks)
        )
        reservations.enter_context(load.reserved([hop], 1))
        used.append(hop.server.peer)
    assert used == ["a", "b", "a", "b"]


def test_a_replica_of_twice_the_speed_gets_twice_the_work():
    servers, load = [server("fast", 0, 12), server("slow", 0, 12)], Load()
    load.add_measurement(servers[0], 1.0, 10, 10)
    load.add_measurement(servers[1], 2.0, 10, 10)
    used, reservations = [], ExitStack()
    for _ in range(30):
        (hop,) = plan_route(
            servers, BlockSpan(0, 12), model=MODEL, cost=lambda server, blocks: load.cost(server, 1, blocks)
        )
        reservations.enter_context(load.reserved([hop], 1))
        used.append(hop.server.peer)
    assert used.count("fast") == 20


def test_all_gaps_are_named_with_the_commands_that_would_fill_them():
    gaps = (BlockSpan(0, 2), BlockSpan(4, 6), BlockSpan(8, 12))
    with raises(UncoveredBlocks, missing=gaps, seen=("a", "b")) as caught:
        planned([server("a", 2, 4), server("b", 6, 8)])
    text = str(caught.value)
    for span in ("0:2", "4:6", "8:12"):
        start = f"python -m servers model.source=name-of-mmm blocks={span}"
        assert f"{start} 'swarm.initial_peers=[/ip4/10.0.0.1/tcp/1/p2p/a]'" in text


def test_a_command_that_a_server_had_a_hand_in_is_safe_to_copy():
    wicked = msgspec.structs.replace(server("a", 0, 4), model_name="x; rm -rf ~", addresses=("$(reboot)`reboot`'",))
    with pytest.raises(UncoveredBlocks) as caught:
        planned([wicked])
    _, _, command = str(caught.value).partition("start one:")
    *_, source, blocks, peers = shlex.split(command)
    assert (source, blocks) == ("model.source=x; rm -rf ~", "blocks=4:12")
    assert peers == "swarm.initial_peers=[$(reboot)`reboot`']"


def test_a_gap_made_by_a_ban_says_so():
    with raises(UncoveredBlocks, missing=(BlockSpan(6, 12),), seen=("a", "b")):
        planned([server("a", 0, 6), server("b", 6, 12)], banned=["b"])


def test_an_empty_swarm_has_one_gap():
    with raises(UncoveredBlocks, missing=(BlockSpan(0, 12),), seen=()):
        planned([])


def test_servers_of_another_model_are_not_used_and_named_where_there_are_no_others():
    other = server("x", 0, 12, model="o" * 64)
    assert planned([other, server("y", 0, 12)]) == ["y=0:12"]
    with raises(SwarmMismatch, wanted=MODEL, found=(other.model,)):
        planned([other])


def test_servers_that_were_never_tried_are_told_apart_by_what_they_announce():
    slow, fast = (
        msgspec.structs.replace(server(peer, 0, 12), throughput=Throughput(step=step, batch=batch))
        for peer, step, batch in [("a", 40.0, 1000.0), ("b", 20.0, 3000.0)]
    )
    load = Load()

    def chosen(tokens: int) -> list[str]:
        return planned([slow, fast], cost=lambda server, blocks: load.cost(server, tokens, blocks))

    assert chosen(128) == ["b=0:12"]
    assert chosen(1) == ["a=0:12"], "the one that is faster with a single token"
    load.add_measurement(fast, 128 * 12 / 500, 128, 12)  # six times slower than it says
    assert chosen(128) == ["a=0:12"]


def test_a_model_whose_weights_only_one_side_knows_is_the_same_and_other_weights_are_another():
    known, other = (server(peer, 0, 12, model=f"{MODEL}.{peer * 64}") for peer in "vw")
    assert planned([known]) == ["v=0:12"]
    assert describe(plan_route([known, other], BlockSpan(0, 12), model=other.model)) == ["w=0:12"]
    with raises(SwarmMismatch, wanted=other.model, found=(known.model,)):
        plan_route([known], BlockSpan(0, 12), model=other.model)


def every_chain(servers: Sequence[ServerRecord], start: int, stop: int) -> Iterator[list[tuple[str, int]]]:
    if start == stop:
        yield []
    for each in servers:
        for end in range(start + 1, stop + 1):
            if each.blocks.covers(BlockSpan(start, end)):
                yield from ([(each.peer, end - start), *rest] for rest in every_chain(servers, end, stop))


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), st.floats(0.1, 9)), min_size=1, max_size=4),
    st.tuples(st.integers(0, 2), st.integers(1, 3)),
)
def test_no_chain_is_cheaper_than_the_one_planned(drawn, wanted):
    servers = [server(str(number), start, start + length) for number, (start, length, _) in enumerate(drawn)]
    speeds = {str(number): speed for number, (_, _, speed) in enumerate(drawn)}
    span = BlockSpan(wanted[0], wanted[0] + wanted[1])

    def price(chain: Sequence[tuple[str, int]]) -> float:
        return sum(speeds[peer] * (blocks + HOP_COST_BLOCKS) for peer, blocks in chain)

    possible = list(every_chain(servers, span.start, span.stop))
    try:
        route = plan_route(servers, span, model=MODEL, cost=lambda server, blocks: speeds[server.peer] * blocks)
    except UncoveredBlocks:
        assert not possible
        return
    assert [block for hop in route for block in range(hop.span.start, hop.span.stop)] == [*range(span.start, span.stop)]
    assert all(hop.server.blocks.covers(hop.span) for hop in route)
    assert price([(hop.server.peer, len(hop.span)) for hop in route]) == pytest.approx(min(map(price, possible)))

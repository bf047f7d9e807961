from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_tune.errors import UncoveredBlocks
from petals_tune.swarm.routes import route as module
from petals_tune.swarm.routes.route import HOP_COST_BLOCKS, Hop, plan_route
from petals_tune.swarm.routes.table import Handing, ServerTable
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from tests.raising import raises
from tests.swarm.exhaustive import Cost, costs_of, every_chain, plan_at_all_cuts

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


def route(
    servers: Sequence[ServerRecord],
    start: int = 0,
    stop: int = 12,
    *,
    banned: Collection[str] = (),
    cost: Cost = lambda server, blocks: blocks,
    handing: Callable[[ServerTable], Handing] | None = None,
) -> tuple[Hop, ...]:
    table = ServerTable(servers)
    costs = costs_of(table, cost)
    if handing is not None:
        costs = replace(costs, handing=handing(table))
    return plan_route(table, BlockSpan(start, stop), costs, usable=~table.mask(banned))


def planned(*arguments, **options) -> list[str]:
    return describe(route(*arguments, **options))


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
    servers = [server(f"{peer}{span[0]}", *span) for peer in "dbca" for span in [(0, 6), (6, 12)]]
    assert planned(servers) == planned(servers[::-1]) == ["a0=0:6", "a6=6:12"]


def test_all_gaps_are_named():
    gaps = (BlockSpan(0, 2), BlockSpan(4, 6), BlockSpan(8, 12))
    with raises(UncoveredBlocks, missing=gaps, seen=("a", "b")):
        planned([server("a", 2, 4), server("b", 6, 8)])


def test_no_name_or_address_of_a_server_gets_into_the_text():
    """A person might copy a command with them, or run what they name."""
    wicked = msgspec.structs.replace(
        server("a", 0, 4), model_name="evil/model", addresses=("/dns4/evil.example/tcp/1",)
    )
    with pytest.raises(UncoveredBlocks) as caught:
        planned([wicked])
    assert "evil" not in str(caught.value)


def test_a_gap_made_by_a_ban_says_so():
    with raises(UncoveredBlocks, missing=(BlockSpan(6, 12),), seen=("a", "b")):
        planned([server("a", 0, 6), server("b", 6, 12)], banned=["b"])


def test_an_empty_swarm_has_one_gap():
    with raises(UncoveredBlocks, missing=(BlockSpan(0, 12),), seen=()):
        planned([])


def test_an_error_names_no_more_servers_than_can_be_read():
    with raises(UncoveredBlocks, missing=(BlockSpan(1, 12),)) as caught:
        planned([server(f"peer {number}", 0, 1) for number in range(1000)])
    assert "and 950 more" in str(caught.value)


# Against planners that try everything


numbers = st.floats(0.0, 9.0)
drawn_servers = st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8), numbers, numbers), min_size=1, max_size=12)


def make(drawn: Sequence[tuple[int, int, float, float]]) -> tuple[list[ServerRecord], Cost]:
    """Servers (start, length, seconds a block, seconds before), and what they cost."""
    servers = [server(f"{number:02}", start, start + length) for number, (start, length, *_) in enumerate(drawn)]
    prices = {f"{number:02}": price for number, (_, _, *price) in enumerate(drawn)}
    return servers, lambda server, blocks: prices[server.peer][0] * blocks + prices[server.peer][1]


def price_of(route: Sequence[Hop], cost: Cost) -> float:
    return sum(cost(hop.server, len(hop.span) + HOP_COST_BLOCKS) for hop in route)


def check_chain(route: Sequence[Hop], span: BlockSpan) -> None:
    assert [block for hop in route for block in range(hop.span.start, hop.span.stop)] == [*range(span.start, span.stop)]
    assert all(hop.server.blocks.covers(hop.span) for hop in route)


@given(drawn_servers, st.tuples(st.integers(0, 6), st.integers(1, 8)), st.sets(st.integers(0, 11), max_size=4))
def test_a_route_costs_what_the_cheapest_of_all_chains_costs(drawn, wanted, banned):
    servers, cost = make(drawn)
    banned = {f"{number:02}" for number in banned}
    span = BlockSpan(wanted[0], wanted[0] + wanted[1])
    usable = [server for server in servers if server.peer not in banned]
    cheapest = plan_at_all_cuts(usable, span, cost)
    if cheapest is None:
        with pytest.raises(UncoveredBlocks):
            route(servers, span.start, span.stop, banned=banned, cost=cost)
        return
    found = route(servers, span.start, span.stop, banned=banned, cost=cost)
    check_chain(found, span)
    assert not banned & {hop.server.peer for hop in found}
    assert price_of(found, cost) == pytest.approx(price_of(cheapest, cost))
    assert describe(found) == describe(route(servers[::-1], span.start, span.stop, banned=banned, cost=cost))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), numbers, numbers), min_size=1, max_size=4))
def test_no_chain_is_cheaper_wherever_it_changes_servers(drawn):
    servers, cost = make(drawn)
    prices = [price_of([Hop(*hop) for hop in chain], cost) for chain in every_chain(servers, 1, 4)]
    if prices:
        assert price_of(route(servers, 1, 4, cost=cost), cost) == pytest.approx(min(prices))


def test_two_servers_that_go_well_together_are_chosen_where_that_saves_more_than_others_cost_less():
    knows = msgspec.structs.replace(server("b", 0, 6), round_trips_s={"d": 0.01})
    servers = [server("a", 0, 6), knows, server("c", 6, 12), server("d", 6, 12)]
    price = {"a": 1.0, "b": 1.2, "c": 1.0, "d": 1.1}
    near = {("b", "d"): 3.0}
    options = {"cost": lambda server, blocks: price[server.peer] * blocks}
    assert planned(servers, **options) == ["a=0:6", "c=6:12"]
    assert planned(servers, **options, handing=handing_of(near)) == ["b=0:6", "d=6:12"]
    assert planned(servers, **options, handing=handing_of(near), banned={"d"}) == ["a=0:6", "c=6:12"]


def handing_of(saved: Mapping[tuple[str, str], float]) -> Callable[[ServerTable], Handing]:
    """What pairs of peers save, at the blocks where the first one's end or the second one's begin."""

    def make(table: ServerTable) -> Handing:
        pairs = table.neighbours
        names = [(table.servers[g].peer, table.servers[t].peer) for g, t in zip(pairs.giver, pairs.taker, strict=True)]
        return table.handing(np.array([saved.get(each, 0.0) for each in names]))

    return make


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), numbers, numbers), min_size=2, max_size=4),
    st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.floats(0.01, 1.0), max_size=8),
)
@pytest.mark.parametrize("few", [0, 100])
def test_no_chain_is_cheaper_where_pairs_of_servers_save(few, drawn, share):
    servers, cost = make(drawn)
    own = {server.peer: cost(server, HOP_COST_BLOCKS) for server in servers}
    # As much as both cost before their first block at most: a server more is never cheaper than none.
    saved = {
        (f"{giver:02}", f"{taker:02}"): part * min(own.get(f"{giver:02}", 0), own.get(f"{taker:02}", 0))
        for (giver, taker), part in share.items()
        if giver != taker
    }
    known = [
        msgspec.structs.replace(each, round_trips_s={taker: 1.0 for giver, taker in saved if giver == each.peer})
        for each in servers
    ]

    def price(chain: Sequence[Hop]) -> float:
        total = price_of(chain, cost)
        for giver, taker in pairwise(chain):
            if taker.span.start in (giver.server.blocks.stop, taker.server.blocks.start):
                total -= saved.get((giver.server.peer, taker.server.peer), 0.0)
        return total

    chains = [[Hop(*hop) for hop in chain] for chain in every_chain(known, 0, 4)]
    if chains:
        with mock.patch.object(module, "FEW_PAIRS", few):
            found = route(known, 0, 4, cost=cost, handing=handing_of(saved))
        check_chain(found, BlockSpan(0, 4))
        assert price(found) == pytest.approx(min(map(price, chains)))

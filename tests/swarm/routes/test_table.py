from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_tune.swarm.routes.table import ServerTable
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from tests.swarm.routes.test_route import server

spans = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), max_size=14)


def make(drawn: list[tuple[int, int]]) -> list[ServerRecord]:
    return [server(f"{number:02}", start, start + length) for number, (start, length) in enumerate(drawn)]


@given(spans)
def test_between_two_cuts_the_slots_name_exactly_the_servers_that_hold_the_blocks(drawn):
    table = ServerTable(make(drawn))
    for row, (begin, end) in zip(table.slots, zip(table.cuts, table.cuts[1:], strict=False), strict=True):
        named = [table.servers[place].peer for place in row if place < len(table.servers)]
        assert sorted(named) == sorted(s.peer for s in table.servers if s.blocks.covers(BlockSpan(begin, end)))


@given(spans)
def test_a_column_is_empty_between_two_servers_and_each_server_has_one(drawn):
    table = ServerTable(make(drawn))
    for column in table.slots.T:
        changes = [(a, b) for a, b in pairwise(column) if a != b]
        assert all(len(table.servers) in change for change in changes)
    for place, column in enumerate(table.columns):
        assert (table.slots == place).any(axis=0).nonzero()[0].tolist() == [column]


@given(spans, st.integers(0, 12), st.integers(1, 9), st.sets(st.integers(0, 13)))
def test_blocks_are_held_where_each_of_them_has_a_server(drawn, start, length, without):
    table, span = ServerTable(make(drawn)), BlockSpan(start, start + length)
    usable = ~table.mask([f"{number:02}" for number in without])
    used = [each for each in table.servers if int(each.peer) not in without]
    held = all(any(block in each.blocks for each in used) for block in range(span.start, span.stop))
    assert table.covers(usable, span) is held
    some = [any(block in each.blocks for block in range(span.start, span.stop)) for each in table.servers]
    assert table.holds(span).tolist() == some


def test_the_last_record_of_a_peer_counts_and_unknown_peers_are_in_no_mask():
    table = ServerTable([server("b", 0, 4), server("a", 0, 4), server("b", 2, 6)])
    assert [(each.peer, each.blocks.start) for each in table.servers] == [("a", 0), ("b", 2)]
    assert table.mask({"b", "unknown"}).tolist() == [False, True]


@pytest.mark.parametrize(
    ("giver", "taker", "cuts"),
    [
        ((0, 6), (6, 12), [6]),
        ((0, 8), (4, 12), [4, 8]),
        ((0, 12), (4, 8), [4]),  # it cannot follow where the giver's blocks end
        ((4, 8), (0, 12), [8]),
        ((4, 12), (0, 8), []),
        ((0, 4), (6, 12), []),
    ],
)
def test_pairs_whose_round_trip_was_announced_stand_where_the_one_ends_or_the_other_begins(giver, taker, cuts):
    announced = msgspec.structs.replace(server("g", *giver), round_trips_s={"t": 0.25, "gone": 0.1})
    table = ServerTable([announced, server("t", *taker)])
    pairs = table.neighbours
    assert [table.cuts[cut] for cut in pairs.cut] == cuts
    assert {table.servers[place].peer for place in pairs.giver} <= {"g"}
    assert {table.servers[place].peer for place in pairs.taker} <= {"t"}
    assert set(pairs.round_trip_s) <= {0.25}


def test_only_pairs_that_save_are_planned_with():
    announced = msgspec.structs.replace(server("g", 0, 6), round_trips_s={"t": 0.25, "u": 0.1})
    table = ServerTable([announced, server("t", 6, 12), server("u", 6, 12)])
    handing = table.handing(np.array([0.5, 0.0]))
    assert [table.servers[place].peer for place in handing.taker] == ["t"]
    assert handing.saved_s.tolist() == [0.5]
    assert (handing.giver_column.tolist(), handing.taker_column.tolist()) == ([table.columns[0]], [table.columns[1]])

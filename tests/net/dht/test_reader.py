"""What a reader asks for, and what it knows after good and bad answers. The node is played."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection

import pytest
from hivemind.dht.routing import DHTID

from petals_tune.net.dht import reader as module
from petals_tune.net.dht.announcements import Announcement
from petals_tune.net.dht.keys import SHARD_RECORDS, Shard, Spot, key_at
from petals_tune.net.dht.node import Search
from petals_tune.net.dht.protocol import SAMPLE
from petals_tune.net.dht.reader import Known, Reader
from petals_tune.wire.span import BlockSpan
from tests.net.dht.nodes import MODEL, announced, key_of

WHOLE = BlockSpan(0, 64)


class PlayedNode:
    """Shows announcements by key, and notes what it was asked for."""

    def __init__(self) -> None:
        self.shown: dict[bytes, list[Announcement]] = {}
        self.of_initial: list[Announcement] = []
        self.asked: list[DHTID] = []
        self.answers = True
        self.meanwhile: Callable[[], None] = lambda: None

    def show(self, *announcements: Announcement, depth: int = 0) -> None:
        for each in announcements:
            for group in range(8):
                if (key := key_at(each.record, Spot(group, depth))) is not None:
                    self.shown.setdefault(key, []).append(each)

    async def find(
        self, keys: Collection[DHTID], *, enough: int, timeout_s: float, whole: bool = False
    ) -> dict[DHTID, Search]:
        assert timeout_s <= module.READING_S
        self.meanwhile()
        searches = {}
        for key in keys:
            self.asked.append(key)
            searches[key] = Search(key, enough)
            if self.answers:
                searches[key].answered.add(DHTID(1))
                searches[key].add(self.shown.get(key.to_bytes(), []))
        return searches

    async def read_at(self, peers: Collection[str], keys: Collection[DHTID]) -> dict[DHTID, list[Announcement]]:
        return {key: self.of_initial if peers else [] for key in keys}


def live(name: str, **fields: object) -> Announcement:
    return announced(name, issued_s=time.time(), **fields)  # type: ignore[arg-type]


def reader_of(node: PlayedNode, *initial: str) -> Reader:
    return Reader(node, initial, random.Random(0))  # type: ignore[arg-type]


def peers(snapshot: object) -> set[str]:
    return {server.peer for server in snapshot.servers}  # type: ignore[attr-defined]


async def test_a_small_model_is_read_with_one_key_for_each_group_of_blocks():
    node = PlayedNode()
    node.show(live("a", start=0, stop=8), live("b", start=4, stop=24))
    snapshot = await reader_of(node).snapshot(MODEL, WHOLE)
    assert peers(snapshot) == {key_of("a").peer, key_of("b").peer}
    assert len(node.asked) == 8
    assert not snapshot.is_sample


async def test_of_a_large_model_bounded_bytes_are_read_at_a_time_and_all_groups_in_turn():
    node = PlayedNode()
    for group in range(8):
        node.show(
            *(
                live(f"{number} of {group}", start=8 * group, stop=8 * group + 8, total_blocks=64)
                for number in range(20)
            )
        )
    reader = reader_of(node)
    await reader.snapshot(MODEL, WHOLE)
    asked = []
    for _ in range(6):
        node.asked.clear()
        await reader.snapshot(MODEL, WHOLE)
        records = sum(min(len(node.shown[key.to_bytes()]), SAMPLE) for key in node.asked)
        assert records * module.RECORD_BYTES * module.HOLDERS <= module.BYTES_A_READING
        asked += node.asked
    assert {key.to_bytes() for key in asked} == set(node.shown)
    node.asked.clear()
    await reader.snapshot(MODEL, WHOLE, thorough=True)
    assert len(node.asked) == 8


async def test_what_was_read_before_stays_known_until_it_ends_or_is_replaced():
    node = PlayedNode()
    node.show(live("a"), announced("b", issued_s=time.time() - 59.9, lasts_s=60.3))
    reader = reader_of(node)
    assert len(peers(await reader.snapshot(MODEL, WHOLE))) == 2
    node.shown.clear()
    time.sleep(0.5)
    assert peers(await reader.snapshot(MODEL, WHOLE)) == {key_of("a").peer}
    node.show(live("a", state="offline"))
    snapshot = await reader.snapshot(MODEL, WHOLE)
    assert (snapshot.servers, snapshot.left) == ((), {key_of("a").peer})
    node.shown.clear()
    node.show(announced("a", issued_s=time.time() - 30))
    assert peers(await reader.snapshot(MODEL, WHOLE)) == set(), "an older one that is shown again"


async def test_silence_is_said_and_nothing_is_forgotten(caplog):
    node = PlayedNode()
    node.show(live("a"))
    reader = reader_of(node, key_of("first").peer)
    await reader.snapshot(MODEL, WHOLE)
    assert not caplog.text
    node.answers = False
    assert peers(await reader.snapshot(MODEL, WHOLE)) == {key_of("a").peer}
    assert "going on with the 1 servers that are known" in caplog.text


async def test_nodes_that_hide_a_server_do_not_hide_it_from_who_asks_the_initial_peers():
    """At its first look, and whenever it looks thoroughly, since blocks are missing."""
    node = PlayedNode()
    node.of_initial = [live("a")]
    reader = reader_of(node, key_of("first").peer)
    assert peers(await reader.snapshot(MODEL, WHOLE)) == {key_of("a").peer}
    node.of_initial = [live("b")]
    assert key_of("b").peer not in peers(await reader.snapshot(MODEL, WHOLE))
    assert key_of("b").peer in peers(await reader.snapshot(MODEL, WHOLE, thorough=True))


async def test_a_reading_that_takes_too_long_ends(monkeypatch):
    """The shard of each level is full, and each look takes a second of the clock."""
    node, clock = PlayedNode(), [0.0]
    monkeypatch.setattr(module, "awake_s", lambda: clock[0])
    full = [live(str(number)) for number in range(SHARD_RECORDS)]

    def pass_a_second() -> None:
        clock[0] += 1

    class Everywhere(dict):  # type: ignore[type-arg]
        def get(self, *_: object) -> list[Announcement]:
            return full

    node.shown, node.meanwhile = Everywhere(), pass_a_second
    await reader_of(node).snapshot(MODEL, BlockSpan(0, 8))
    assert 4 <= len(node.asked) <= 6


async def test_of_a_sample_each_server_stands_for_those_that_are_not_seen():
    """The root is full, and four shards below it hold 10 each: 32 + 2 x 32 + 4 x 10 servers."""
    node = PlayedNode()
    for depth, count in ((0, 32), (1, 32), (2, 10)):
        for path in range(2**depth):
            key = Shard(MODEL, 0, depth, path).key
            node.shown[key] = [live(f"{number} {path} {depth}") for number in range(count)]
    node.show(live("alone", start=8, stop=16))
    snapshot = await reader_of(node).snapshot(MODEL, WHOLE)
    assert snapshot.is_sample
    assert len(snapshot.servers) == 32 + 10 + 1, "the root, one shard two levels below, and another group"
    assert sum(snapshot.stands_for.values()) == pytest.approx(32 * 3 + 4 * 10)
    assert key_of("alone").peer not in snapshot.stands_for


async def test_a_server_that_stands_deep_is_found_with_few_looks():
    node = PlayedNode()
    node.show(*(live(str(number)) for number in range(20)))
    there = live("deep")
    node.show(there, depth=4)
    assert await reader_of(node).find(there.peer, MODEL, BlockSpan(0, 8)) == there.record
    assert await reader_of(node).find(key_of("nobody").peer, MODEL, BlockSpan(0, 8)) is None
    assert len(node.asked) <= 20


async def test_models_are_listed_by_name_without_those_who_left():
    node = PlayedNode()
    for each in (live("a", model="m", model_name="zebra"), live("b", model="n", model_name="ant")):
        node.shown.setdefault(key_at(each.record, Spot(0xFFFF, 0)), []).append(each)  # type: ignore[arg-type]
    left = live("c", model="o", state="offline")
    node.shown.setdefault(key_at(left.record, Spot(0xFFFF, 0)), []).append(left)  # type: ignore[arg-type]
    assert [each.model_name for each in await reader_of(node).models()] == ["ant", "zebra"]


def test_no_more_servers_are_kept_in_mind_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(module, "MAX_KNOWN", 10)
    known = Known(MODEL)
    for number in range(25):
        known.add([live(str(number))])
    assert set(known.announcements) == {key_of(str(number)).peer for number in range(15, 25)}, "those heard of last"


@pytest.mark.parametrize("thorough", [False, True])
def test_groups_that_were_read_longest_ago_come_first(thorough):
    known = Known(MODEL)
    for number, look in enumerate(known.due(WHOLE, thorough=True)):
        look.found(Shard(MODEL, look.root.group), 20, -float(number))
    due = [look.root.group for look in known.due(WHOLE, thorough=thorough)]
    assert due[0] == 7
    assert len(due) == (8 if thorough else 5), "12 records of 1.2 kB from two nodes each, in 170 kB"


async def test_initial_peers_are_asked_again_before_what_they_told_ends(monkeypatch):
    """Nodes near to the key show invented servers, so that no block seems to be missing."""
    node, clock = PlayedNode(), [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    node.show(live("invented", start=0, stop=64, total_blocks=64))
    reader = reader_of(node, key_of("first").peer)
    await reader.snapshot(MODEL, WHOLE)
    node.of_initial = [live("a")]
    assert key_of("a").peer not in peers(await reader.snapshot(MODEL, WHOLE))
    clock[0] += module.INITIAL_S
    assert key_of("a").peer in peers(await reader.snapshot(MODEL, WHOLE))

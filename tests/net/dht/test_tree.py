"""Where servers go in a tree whose shards fill up, and that readers find them there."""

import random
import statistics
from collections import Counter

from petals_tune.net.dht.keys import MAX_DEPTH, SHARD_RECORDS, Shard, peer_path
from petals_tune.net.dht.tree import Depth, Look
from tests.net.dht.nodes import key_of

ROOT = Shard("model", 0)


def fill(count: int, chance: random.Random) -> dict[tuple[int, int], list[str]]:
    """Servers that settle one after the other in a tree whose shards hold SHARD_RECORDS, by depth and path."""
    shards: dict[tuple[int, int], list[str]] = {}
    for number in range(count):
        peer, depth = f"peer {number}", Depth()
        while True:
            level = depth.to_try(chance)
            shard = shards.setdefault((level, peer_path(peer, level)), [])
            has_room = len(shard) < SHARD_RECORDS
            if has_room:
                shard.append(peer)
            if depth.tried(level, taken=5 * has_room, asked=5):
                break
    return shards


def look(shards: dict[tuple[int, int], list[str]], reading: Look, chance: random.Random) -> list[str]:
    shard = reading.choose(chance)
    found = shards.get((shard.depth, shard.path), [])
    reading.found(shard, len(found), 0.0)
    return found


def test_a_small_group_is_read_whole_with_one_look():
    shards, reading, chance = fill(20, random.Random(0)), Look(ROOT), random.Random(1)
    assert len(look(shards, reading, chance)) == 20
    assert reading.next_depth is None
    assert reading.servers == 20
    assert len(look(shards, reading, chance)) == 20


def test_a_large_group_is_sampled_so_that_the_load_spreads():
    """3,000 servers: every one is seen in time, and none by far more often than another."""
    shards, chance = fill(3000, random.Random(0)), random.Random(1)
    assert sum(map(len, shards.values())) == 3000
    seen: Counter[str] = Counter()
    looks, sizes = 0, []
    for _ in range(100):
        reading = Look(ROOT)
        first: set[str] = set()
        while reading.next_depth is not None:
            first.update(look(shards, reading, chance))
            looks += 1
        assert 24 < len(first) <= 5 * SHARD_RECORDS, "bounded, and not few"
        sizes.append(reading.servers)
        for _ in range(40):
            seen.update(look(shards, reading, chance))
    assert looks <= 100 * 5
    assert 2500 < statistics.fmean(sizes) < 3500
    assert len(seen) > 2900
    assert max(seen.values()) < 12 * sum(seen.values()) / 3000


def test_a_reader_follows_a_tree_that_grows_and_shrinks():
    chance = random.Random(1)
    small, large = fill(10, random.Random(0)), fill(400, random.Random(0))
    reading = Look(ROOT)
    look(small, reading, chance)
    assert reading.levels == 0
    for _ in range(60):
        look(large, reading, chance)
    assert reading.levels >= 3
    for _ in range(200):
        look(small, reading, chance)
    assert reading.levels == 0


def test_a_server_goes_up_where_there_is_room_and_stays_where_there_is_none():
    depth = Depth(3)
    tried = {depth.to_try(random.Random(seed)) for seed in range(50)}
    assert tried == {2, 3}
    assert not depth.tried(2, taken=0, asked=5), "it announces itself at its own depth instead"
    assert depth.depth == 3
    assert depth.tried(2, taken=4, asked=5)
    assert depth.depth == 2
    assert Depth().to_try(random.Random(0)) == 0


def test_no_answer_is_no_reason_to_move_and_the_tree_has_an_end():
    depth = Depth(1)
    assert depth.tried(1, taken=0, asked=0)
    assert depth.depth == 1
    deepest = Depth(MAX_DEPTH)
    assert deepest.tried(MAX_DEPTH, taken=0, asked=5)


def test_peers_of_the_test_are_spread():
    assert len({peer_path(key_of(str(number)).peer, 3) for number in range(100)}) == 8

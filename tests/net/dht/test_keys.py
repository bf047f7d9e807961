"""Where a record stands, and that its key follows from it."""

import pytest

from petals_tune.errors import ProtocolError
from petals_tune.net.dht.keys import (
    GROUP_BLOCKS,
    INDEX,
    MAX_DEPTH,
    Shard,
    Spot,
    groups,
    index_key,
    index_keys,
    key_at,
    model_part,
    peer_path,
    roots,
)
from petals_tune.wire.span import BlockSpan
from tests.net.dht.nodes import key_of, record
from tests.raising import raises


@pytest.mark.parametrize(
    ("span", "expected"), [((0, 1), [0]), ((0, 8), [0]), ((7, 9), [0, 1]), ((8, 16), [1]), ((5, 30), [0, 1, 2, 3])]
)
def test_a_span_lies_in_the_groups_that_have_its_blocks(span, expected):
    assert GROUP_BLOCKS == 8
    assert list(groups(BlockSpan(*span))) == expected


def test_a_record_stands_in_its_own_groups_and_nowhere_else():
    of_a = record("a", 7, 9)
    keys = {key_at(of_a, Spot(group, depth)) for group in (0, 1) for depth in range(MAX_DEPTH + 1)}
    assert len(keys) == 2 * (MAX_DEPTH + 1)
    assert None not in keys
    assert key_at(of_a, Spot(2, 0)) is None
    assert key_at(of_a, Spot(0, MAX_DEPTH + 1)) is None


def test_a_reader_finds_the_key_that_a_record_stands_under():
    of_a = record("a", 8, 16, model="config.weights")
    (root,) = roots("config", of_a.blocks)
    assert key_at(of_a, Spot(1, 0)) == root.key, "readers may not know the weights' digest"
    assert key_at(of_a, Spot(1, 3)) == Shard("config", 1, 3, peer_path(of_a.peer, 3)).key
    assert key_at(of_a, INDEX) == index_key("config") in index_keys()


def test_shards_part_peers_by_the_bits_of_their_hashes():
    peers = [key_of(str(number)).peer for number in range(400)]
    for depth in (1, 4):
        paths = [peer_path(peer, depth) for peer in peers]
        assert set(paths) == set(range(2**depth))
        assert all(peer_path(peer, depth + 1) >> 1 == path for peer, path in zip(peers, paths, strict=True))


def test_models_and_groups_have_keys_of_their_own():
    shards = [Shard(model, group, depth) for model in "mn" for group in range(3) for depth in range(3)]
    assert len({shard.key for shard in shards} | set(index_keys())) == len(shards) + len(index_keys())
    assert model_part("config.weights") == model_part("config") == "config"


def test_a_spot_travels_in_three_bytes():
    for spot in (Spot(0, 0), Spot(125, 14), INDEX):
        assert Spot.decode(spot.encode()) == spot
    for data in (b"", b"1234"):
        with raises(ProtocolError, what="spot"):
            Spot.decode(data)

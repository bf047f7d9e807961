"""Keys of the DHT: where the record of a server stands, so that a reader need not read the records of all servers.

A model's blocks are cut into groups of `GROUP_BLOCKS`; a server stands in each group that it holds blocks of. A group's
records form a binary tree of shards: the root holds the first `SHARD_RECORDS` of them; where a shard is full, a server
goes to one of its two children, which the next bit of the hash of its peer id says. A reader that wants a sample reads
one path. The index holds a few records of each model.

Source: Maymounkov and Mazières 2002 (Kademlia), for keys and distances; prefix trees over a DHT as in Ramabhadran et
al. 2004.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

import msgspec

from petals_tune.errors import ProtocolError
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan

GROUP_BLOCKS = 8
SHARD_RECORDS = 32  # that a node keeps under one key
MAX_DEPTH = 14  # of the tree: room for half a million servers in a group
INDEX_SHARDS = 16
INDEX_RECORDS = 64  # that a node keeps under one key of the index
INDEX_RECORDS_A_MODEL = 4
KEY_BYTES = 20


class Spot(NamedTuple):
    """Where a record stands: with its record, whoever stores it finds the key, of which the hash says nothing."""

    group: int
    depth: int

    def encode(self) -> bytes:
        return _SPOT.pack(*self)

    @classmethod
    def decode(cls, data: bytes) -> Spot:
        """Raises ProtocolError."""
        if len(data) != _SPOT.size:
            raise ProtocolError(f"{len(data)} bytes are no place in the DHT", what="spot")
        return cls(*_SPOT.unpack(data))


_SPOT = struct.Struct(">HB")
INDEX = Spot(0xFFFF, 0)  # the index of models


class Shard(msgspec.Struct, frozen=True):
    """One node of the tree of a group: the servers whose peer ids hash to the first `depth` bits `path`."""

    model: str  # part of a digest, see `model_part`
    group: int
    depth: int = 0
    path: int = 0

    @property
    def key(self) -> bytes:
        return _hash("blocks", self.model, self.group, self.depth, self.path)


def model_part(model: str) -> str:
    """The digest of a model's config: what all its servers agree on, since not every digest has that of the weights."""
    return model.partition(".")[0]


def peer_path(peer: str, depth: int) -> int:
    """The first `depth` bits of the hash of a peer id."""
    return int.from_bytes(_hash("peer", peer)[:8]) >> (64 - depth)


def groups(blocks: BlockSpan) -> range:
    """Numbers of the groups that have blocks of `blocks`."""
    return range(blocks.start // GROUP_BLOCKS, (blocks.stop - 1) // GROUP_BLOCKS + 1)


def roots(model: str, blocks: BlockSpan) -> list[Shard]:
    """The root of each group that has blocks of `blocks`."""
    return [Shard(model_part(model), group) for group in groups(blocks)]


def index_key(model: str) -> bytes:
    """The key of the index under which servers of `model` stand."""
    number = int.from_bytes(_hash("model", model_part(model))[:4]) % INDEX_SHARDS
    return index_keys()[number]


def index_keys() -> list[bytes]:
    """All keys of the index."""
    return [_hash("index", number) for number in range(INDEX_SHARDS)]


def key_at(record: ServerRecord, spot: Spot) -> bytes | None:
    """The key of `spot` for `record`; None where a record of its model, blocks and peer has no place there."""
    if spot == INDEX:
        return index_key(record.model)
    if spot.group not in groups(record.blocks) or not 0 <= spot.depth <= MAX_DEPTH:
        return None
    return Shard(model_part(record.model), spot.group, spot.depth, peer_path(record.peer, spot.depth)).key


def _hash(*parts: str | int) -> bytes:
    return hashlib.sha1("\0".join(("petals_tune", *map(str, parts))).encode()).digest()

"""The simulated DHT: which nodes there are, whom each of them knows, and what is stored under each key.

A node's answer is computed when it is asked, from the rules of its routing table (hivemind's: buckets of `BUCKET`
nodes, split down to every fifth bit) and of its store (the real one). What is stored under a key stands on the
`REPLICAS` living nodes that are nearest to it, which agree. Nodes that ended are named by others for as long as the
rules let them: see `names`.
"""

from __future__ import annotations

import bisect
import random
from dataclasses import dataclass

from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID

from petals_tune.net.dht.announcements import Announcement
from petals_tune.net.dht.directory import LOOK_AROUND_S, PING_S
from petals_tune.net.dht.keys import Spot, key_at
from petals_tune.net.dht.node import BUCKET, REPLICAS
from petals_tune.net.dht.protocol import NEIGHBOURS, AnnouncementProtocol, node_id_of
from petals_tune.net.dht.store import AnnouncementStore

BITS = 64  # of an id of 160 that are looked at where nodes are compared: enough to tell 100,000 apart
SPLIT = 5  # bits: hivemind's depth_modulo
NEAR = 8  # nearest nodes of a key whose load is counted one by one
LIFE_S = 7200.0  # mean
LASTS_S = 60.0  # an announcement: swarm.announce_s
RENEWALS = 3  # in that time


@dataclass(frozen=True)
class SimNode:
    """One node, living or ended."""

    place: int  # the first bits of its id
    peer: PeerID
    id: DHTID
    ended_s: float = 0.0  # how long ago it ended; 0: it lives
    age_s: float = 0.0


@dataclass
class Upkeep:
    """How long nodes that ended are named by others, at most."""

    # Around the own id, where buckets are never full: until the node looks around.
    near_s: float = LOOK_AROUND_S + 1.5 * PING_S
    # In full buckets, whose oldest node is pinged where another one is met. An assumption: some hundred nodes in the
    # full buckets of a table, and a stranger every few seconds.
    far_s: float = 1200.0


def renewed(announcement: Announcement, now_s: float) -> Announcement:
    """As its server renewed it last: those of the population are stored once, with their last end."""
    period_s = LASTS_S / RENEWALS
    renewed_s = now_s - (now_s - hash(announcement.peer) % 1000 / 1000 * period_s) % period_s
    ends_s = min(announcement.ends_s, renewed_s + LASTS_S)
    return Announcement(record=announcement.record, issued_s=renewed_s, ends_s=ends_s, data=b"")


class World:
    """All nodes and all keys."""

    def __init__(self, nodes: int, *, upkeep: Upkeep, chance: random.Random, life_s: float = LIFE_S):
        self._chance, self.upkeep, self._life_s = chance, upkeep, life_s
        self.nodes: list[SimNode] = []  # by place
        self.places: list[int] = []
        self.by_peer: dict[PeerID, int] = {}
        self.stores: dict[bytes, AnnouncementStore] = {}
        self.near: dict[bytes, list[int]] = {}  # the nearest living nodes of a key
        self.actors: dict[int, AnnouncementProtocol] = {}  # nodes that are simulated processes, by place
        made = [self._new_node(0.0) for _ in range(nodes)]
        for _ in range(round(nodes * max(upkeep.near_s, upkeep.far_s) / life_s)):
            made.append(self._new_node(chance.uniform(1e-3, max(upkeep.near_s, upkeep.far_s))))
        self.nodes = sorted(made, key=lambda node: node.place)
        self.places = [node.place for node in self.nodes]
        self.by_peer = {node.peer: node.place for node in self.nodes}

    def _new_node(self, ended_s: float) -> SimNode:
        peer = PeerID(self._chance.randbytes(38))
        node_id = node_id_of(peer)
        return SimNode(int(node_id) >> (160 - BITS), peer, node_id, ended_s, self._chance.expovariate(1 / self._life_s))

    def add(self, peer: PeerID) -> None:
        """A living node more."""
        node_id = node_id_of(peer)
        node = SimNode(int(node_id) >> (160 - BITS), peer, node_id)
        index = bisect.bisect(self.places, node.place)
        self.nodes.insert(index, node)
        self.places.insert(index, node.place)
        self.by_peer[peer] = node.place
        self.near.clear()

    def node_of(self, peer: PeerID) -> SimNode:
        return self.nodes[bisect.bisect_left(self.places, self.by_peer[peer])]

    def random_node(self) -> SimNode:
        """A living one."""
        while (node := self._chance.choice(self.nodes)).ended_s:
            pass
        return node

    # Routing tables

    def names(self, asked: SimNode, other: SimNode, *, is_far: bool) -> bool:
        """Whether `asked` names `other`, which has ended, to those who look for nodes."""
        kept_s = min(self.upkeep.far_s if is_far else self.upkeep.near_s, asked.age_s)
        return other.ended_s < kept_s * (hash((asked.place, other.place)) % 1000) / 1000

    def neighbours(self, asked: SimNode, key: DHTID, exclude: DHTID | None) -> dict[DHTID, PeerID]:
        """The nodes nearest to `key` that `asked` knows."""
        place = int(key) >> (160 - BITS)
        shared = BITS - (asked.place ^ place).bit_length()
        depth = (shared // SPLIT + 1) * SPLIT
        found: list[SimNode] = []
        while len(found) < NEIGHBOURS + 2 and depth >= 0:
            low, high = self._range(place, depth)
            is_far = high - low > BUCKET and depth > shared
            if is_far:  # as many as a bucket holds, from all over the range
                size, first = high - low, hash((asked.place, low))
                indices = (low + (first + i * size // BUCKET) % size for i in range(BUCKET))
            else:
                indices = iter(range(low, high))
            nodes = [self.nodes[i] for i in indices]
            found = [node for node in nodes if not node.ended_s or self.names(asked, node, is_far=is_far)]
            found = [node for node in found if node is not asked and node.id != exclude]
            depth -= 1
        found.sort(key=lambda node: node.place ^ place)
        return {node.id: node.peer for node in found[:NEIGHBOURS]}

    def _range(self, place: int, depth: int) -> tuple[int, int]:
        """Indices of the nodes whose first `depth` bits are those of `place`."""
        width = BITS - depth
        start = place >> width << width
        return bisect.bisect_left(self.places, start), bisect.bisect_left(self.places, start + (1 << width))

    def nearest(self, key: bytes, count: int = NEAR) -> list[int]:
        """Places of the living nodes nearest to `key`."""
        if (known := self.near.get(key)) is not None:
            return known[:count]
        place = int.from_bytes(key[: BITS // 8])
        depth, living = 24, []
        while len(living) < NEAR and depth >= 0:
            low, high = self._range(place, depth)
            if high - low >= NEAR or depth == 0:
                living = [node.place for node in self.nodes[low:high] if not node.ended_s]
            depth -= 1
        self.near[key] = sorted(living, key=lambda each: each ^ place)[:NEAR]
        return self.near[key][:count]

    # Stores

    def put(self, spot: Spot, new: Announcement, now_s: float) -> bool:
        """What the nodes nearest to the key of `spot` answer where they are asked to store `new`."""
        key = key_at(new.record, spot)
        if key is None:
            return False
        # Each server has a network of its own.
        return self.stores.setdefault(key, AnnouncementStore()).put(spot, new, new.peer, now_s)

    def get(self, node: SimNode, key: bytes, now_s: float) -> list[Announcement]:
        """What `node` has under `key`."""
        store = self.stores.get(key)
        if store is None or node.place not in self.nearest(key, REPLICAS):
            return []
        return [each if each.data else renewed(each, now_s) for each in store.get(key, now_s)]

    def records(self, key: bytes, now_s: float) -> int:
        """How many announcements are stored under `key`."""
        return len(self.stores[key].get(key, now_s)) if key in self.stores else 0

    def rank(self, node: SimNode, key: bytes) -> int:
        """How near `node` is to `key`: 0 for the nearest; -1 where others are nearer."""
        near = self.nearest(key)
        return near.index(node.place) if node.place in near else -1

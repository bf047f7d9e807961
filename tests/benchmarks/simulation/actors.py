"""Simulated processes: the real `DhtDirectory`, `Node` and `Reader` over messages that are not sent.

`SimProtocol` stands where the real one calls other nodes: the world answers after a round trip, and the traffic of
both sides is counted. The routing table of the process itself is hivemind's own.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from hivemind.dht.routing import DHTID, RoutingTable
from hivemind.p2p import PeerID

from petals_tune.net.dht import node as dht_node
from petals_tune.net.dht.announcements import Announcement, Opener
from petals_tune.net.dht.directory import DhtDirectory
from petals_tune.net.dht.keys import Spot
from petals_tune.net.dht.node import ANSWER_S, BUCKET, REPLICAS, Node, Search
from petals_tune.net.dht.protocol import SAMPLE, AnnouncementProtocol, Found, node_id_of
from petals_tune.wire.signing import SigningKey
from tests.benchmarks.simulation import traffic
from tests.benchmarks.simulation.traffic import Counted
from tests.benchmarks.simulation.world import SimNode, World

ROUND_TRIP_S = 0.1
VALUES, NODES, STORE, PING = "values", "nodes", "store", "ping"  # kinds of searches and requests
PATH = -1  # rank of a node that is asked on the way to a key, and is not near to it


@dataclass
class Load:
    """What nodes carried for the actors of one kind, by the kind of search and the rank of the node that was asked.

    A request for several keys is shared out among them.
    """

    searches: Counter[str] = field(default_factory=Counter)  # keys that were looked for, by kind
    lost: int = 0  # searches for announcements that found none, though there were some
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)

    def add(self, kind: str, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self.requests[kind, rank] += 1 / len(ranks)


class CountingNode(Node):
    """The real node; counts what is looked for."""

    protocol: SimProtocol

    async def find(
        self, keys: Collection[DHTID], *, enough: int | None, timeout_s: float, whole: bool = False
    ) -> dict[DHTID, Search]:
        found = await super().find(keys, enough=enough, timeout_s=timeout_s, whole=whole)
        load = self.protocol.load
        load.searches[NODES if enough is None else VALUES] += len(found)
        if enough is not None:
            world, now_s = self.protocol.world, self.protocol.now()
            load.lost += sum(
                not search.found and bool(world.records(key.to_bytes(), now_s)) for key, search in found.items()
            )
        return found


class SimProtocol(AnnouncementProtocol):
    """The protocol of one simulated process. `counted` and `load` are what is counted now."""

    def __init__(self, world: World, peer: PeerID, *, client_mode: bool, now: Callable[[], float], record_bytes: int):
        self.world, self.peer, self.now, self.record_bytes = world, peer, now, record_bytes
        self.node_id, self.client_mode = node_id_of(peer), client_mode
        self.routing_table = RoutingTable(self.node_id, BUCKET, 5)
        self.num_replicas = REPLICAS
        self.counted, self.load = Counted(), Load()
        self.failed_calls = self.calls = 0
        self._beside: set[asyncio.Task[object]] = set()
        self.store = SimpleNamespace(get=self._own)  # type: ignore[assignment]
        self.opener = Opener()

    def _own(self, key: bytes, now_s: float) -> list[Announcement]:
        node = None if self.client_mode else self.world.by_peer.get(self.peer)
        return [] if node is None else self.world.get(self.world.node_of(self.peer), key, now_s)

    def put_own(self, spot: Spot, data: bytes) -> bool:
        return self.world.put(spot, self.opener.open(data, self.now()), self.now())

    async def _hand_over(self, node_id: DHTID, peer_id: PeerID) -> None:
        """What a node hands to a newcomer is counted in `figures`, from the newcomers' side."""

    async def _answered(self, peer: PeerID) -> SimNode | None:
        """The node that was called, after its round trip; None where it has ended."""
        node = self.world.node_of(peer)
        self.calls += 1
        if node.ended_s:
            self.failed_calls += 1
            await asyncio.sleep(ANSWER_S)
            await self.update_routing_table(None, peer, responded=False)
            return None
        await asyncio.sleep(ROUND_TRIP_S)
        await self.update_routing_table(node.id, peer)
        if not self.client_mode and (other := self.world.actors.get(node.place)) is not None:
            await other.update_routing_table(self.node_id, self.peer)  # it learns of the sender
        return node

    async def call_ping(self, peer: PeerID, validate: bool = False, strict: bool = True) -> DHTID | None:
        sent, received = traffic.ping_bytes(from_client=self.client_mode)
        self.counted.add(sent, received)
        self.load.add(PING, [PATH])
        node = await self._answered(peer)
        return None if node is None else node.id

    async def call_store(self, peer: PeerID, data: Sequence[bytes], spots: Sequence[Spot]) -> list[bool] | None:
        sent = traffic.store_request_bytes(len(spots), len(data[0]))
        received = traffic.store_response_bytes(len(spots))
        self.counted.add(sent, received)
        node = await self._answered(peer)
        if node is None:
            return None
        self.load.add(STORE, [0])
        return [self.world.put(spot, self.opener.open(data[0], self.now()), self.now()) for spot in spots]

    async def call_find(
        self, peer: PeerID, keys: Collection[DHTID], *, nodes_only: bool = False, whole: bool = False
    ) -> dict[DHTID, Found] | None:
        keys = list(keys)
        node = await self._answered(peer)
        sent = traffic.find_request_bytes(len(keys), nodes_only=nodes_only, from_client=self.client_mode)
        if node is None:
            self.counted.add(sent, 0, messages=1)
            return None
        exclude = None if self.client_mode else self.node_id
        found: dict[DHTID, Found] = {}
        for key in keys:
            held = [] if nodes_only else self.world.get(node, key.to_bytes(), self.now())
            shown = held if whole or len(held) <= SAMPLE else random.sample(held, SAMPLE)
            found[key] = Found(shown, self.world.neighbours(node, key, exclude), len(held))
        sizes = [(len(each.announcements), len(each.nodes)) for each in found.values()]
        received = traffic.find_response_bytes(sizes, self.record_bytes)
        self.counted.add(sent, received)
        kind = NODES if nodes_only else VALUES
        self.load.add(kind, [self.world.rank(node, key.to_bytes()) for key in keys])
        return found


class _Transport:
    """In place of a transport: a node that is called is reached, or not, where it is called."""

    def __init__(self) -> None:
        self.connections = 0

    async def connect(self, address: str) -> None:
        self.connections += 1


class Actor:
    """A simulated process: a client, or a server's node."""

    def __init__(
        self, world: World, initial: Sequence[PeerID], *, is_client: bool, record_bytes: int, chance: random.Random
    ):
        loop = asyncio.get_running_loop()
        self.identity = SigningKey.new()
        self.peer = PeerID.from_base58(self.identity.peer)
        self._chance, self._initial, self._transport = chance, initial, _Transport()
        self.protocol = SimProtocol(
            world, self.peer, client_mode=is_client, record_bytes=record_bytes, now=lambda: dht_node.time.time()
        )
        if not is_client:
            world.add(self.peer)
            world.actors[world.by_peer[self.peer]] = self.protocol
        self.node = CountingNode(self.protocol, self.peer)
        self._addresses = [f"/p2p/{peer}" for peer in initial]
        self.directory = DhtDirectory(
            self.node, identity=None if is_client else self.identity, initial_peers=self._addresses
        )
        self.directory._chance = self.directory._reader._chance = chance
        self.started_s = loop.time()

    async def join(self) -> None:
        """Enter the DHT as `Node.join` does."""
        await self.node._bootstrap(self._initial)

    async def stay_known(self) -> None:
        """Ping the initial peers for ever."""
        await self.directory.stay_known(self._transport, self._addresses)  # type: ignore[arg-type]

    @property
    def initial_pings(self) -> int:
        """Pings of the initial peers."""
        return self._transport.connections

    def count_anew(self) -> None:
        """Forget what was counted."""
        self._transport.connections = 0
        self.protocol.counted, self.protocol.load = Counted(), Load()
        self.protocol.calls = self.protocol.failed_calls = 0

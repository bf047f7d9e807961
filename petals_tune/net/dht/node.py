"""A node of the DHT: it joins through initial peers, and finds and stores announcements.

Source: Maymounkov and Mazières 2002 (Kademlia), sections 2.3 and 2.4. hivemind's `DHTNode` is not used: one malformed
value ends its search without ever setting the future that readers wait for (`_SearchState.finish_search` in
hivemind/dht/node.py), none of its readings has a deadline, and it names the class of its protocol.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from hivemind.dht.node import Blacklist
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID

from petals_tune.errors import ConnectionLost
from petals_tune.net.dht.announcements import Announcement, Opener
from petals_tune.net.dht.keys import Spot
from petals_tune.net.dht.members_only import MembersOnly
from petals_tune.net.dht.networks import Networks
from petals_tune.net.dht.protocol import MAX_KEYS, MAX_SPOTS, AnnouncementProtocol, Found, node_id_of
from petals_tune.net.hivemind_p2p import HivemindTransport, hivemind_errors, peer_of
from petals_tune.net.members import Members
from petals_tune.net.own_lag import awake_s, patience

REPLICAS = 8  # nodes that store an announcement at each of its keys
NEAREST = 8  # nodes around a key that are asked before it is said that there is nothing
AT_ONCE = 3  # of a key, nodes asked at the same time
ANSWER_S = 3.0  # for one node's answer
LOOKING_S = 10.0  # for a look around
PATIENCE_S = 1.0  # for further answers about a key once a node had something: who is named may not exist
BUCKET = 20  # nodes in each bucket of the routing table
NEAREST_S = 120.0  # how long the nodes nearest to a key are remembered
MAX_REMEMBERED = 2_000  # such keys
_SILENT_S, _BACKOFF = 5.0, 2.0  # how long a node that did not answer is passed over, longer each time


@dataclass
class Search:
    """What is known of one key while it is looked for."""

    key: DHTID
    enough: int | None  # nodes that have to answer with something; None: only nodes are looked for
    candidates: dict[DHTID, PeerID] = field(default_factory=dict)
    asked: set[DHTID] = field(default_factory=set)
    waiting: set[DHTID] = field(default_factory=set)
    answered: set[DHTID] = field(default_factory=set)
    whole: bool = False  # all that a node has is wanted, not a sample of it
    holders: int = 0
    held: int = 0  # announcements that a node has under the key, though it may show a sample
    ends_s: float = math.inf  # awake_s(); from then on nobody else is asked or waited for
    found: dict[str, Announcement] = field(default_factory=dict)  # by peer, the latest of each
    told: set[str] = field(default_factory=set)  # peers of which another node told

    def next(self, chance: random.Random) -> list[DHTID]:
        """The nodes to ask now: the nearest that are not known to be silent.

        Of those that are near enough to hold announcements, any: always the nearest ones would carry all the reading.
        """
        if self.is_over:
            return []
        alive = [node for node in self.nearest() if node not in self.asked or node in self.answered | self.waiting]
        at_once = min(AT_ONCE, AT_ONCE if self.enough is None else self.enough)  # answers are large
        if self.enough is not None:
            alive[:REPLICAS] = chance.sample(alive[:REPLICAS], len(alive[:REPLICAS]))
        return [node for node in alive[:NEAREST] if node not in self.asked][: max(at_once - len(self.waiting), 0)]

    @property
    def is_satisfied(self) -> bool:
        return self.enough is not None and self.holders >= self.enough

    @property
    def is_over(self) -> bool:
        return self.is_satisfied or (self.ends_s < math.inf and awake_s() >= self.ends_s)

    def nearest(self) -> list[DHTID]:
        return sorted(self.candidates, key=self.key.xor_distance)

    def add(self, announcements: Sequence[Announcement], held: int = 0) -> None:
        """Take what one node shows of the `held` that it has; of a peer that is known, the later announcement."""
        self.held = max(self.held, held, len(announcements))
        if announcements and self.enough is not None:
            self.ends_s = min(self.ends_s, awake_s() + PATIENCE_S)
        self.holders += bool(announcements)
        for new in announcements:
            self.told.add(new.peer)
            known = self.found.get(new.peer)
            if known is None or known.issued_s < new.issued_s:
                self.found[new.peer] = new


class Node:
    """One node. All methods run on one event loop; none raises what hivemind raises."""

    def __init__(self, protocol: AnnouncementProtocol, peer: PeerID):
        self.protocol, self._peer = protocol, peer
        self._silent = Blacklist(_SILENT_S, _BACKOFF)
        self._chance = random.SystemRandom()
        self._nearest: dict[DHTID, tuple[float, list[PeerID]]] = {}
        self._late: set[asyncio.Task[object]] = set()  # requests whose search is over

    @classmethod
    async def join(
        cls,
        transport: HivemindTransport,
        initial_peers: Sequence[str],
        *,
        client_mode: bool,
        members: Members | None = None,
    ) -> Node:
        """Join through `initial_peers`, or begin a DHT without them. A node in client mode stores nothing for others.

        Raises ConnectionLost where no initial peer answers, ClockSkew where the clocks differ by more than 3 s.
        """
        peer = transport.p2p.peer_id
        with hivemind_errors():
            protocol = await AnnouncementProtocol.create(
                transport.p2p,
                node_id_of(peer),
                BUCKET,
                5,  # depth_modulo, as in hivemind
                REPLICAS,
                ANSWER_S,
                client_mode=True,  # until it has what it checks with
                authorizer=None if members is None else MembersOnly(members),
            )
        assert isinstance(protocol, AnnouncementProtocol)
        networks = Networks(transport)
        protocol.prepare(Opener(members), networks.of, networks.reach)
        if not client_mode:
            with hivemind_errors():
                await protocol.serve()
        node = cls(protocol, peer)
        if initial_peers:
            await node._bootstrap([PeerID.from_base58(peer_of(address)) for address in initial_peers])
        return node

    async def _bootstrap(self, peers: Sequence[PeerID]) -> None:
        with hivemind_errors():
            pings = [asyncio.create_task(self.protocol.call_ping(peer, validate=True)) for peer in set(peers)]
            waiting = set(pings)
            while waiting and not any(ping.done() and ping.result() is not None for ping in pings):
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not any(ping.done() and ping.result() is not None for ping in pings):
                raise ConnectionLost("none of them answered a ping")
        for ping in waiting:
            ping.add_done_callback(lambda ping: ping.cancelled() or ping.exception())  # it may fail later, unheard
        await asyncio.sleep(0)  # the one that answered enters the routing table
        await self.look_around(ANSWER_S)

    async def look_around(self, timeout_s: float = LOOKING_S) -> None:
        """Look for the nodes nearest to this one; those that do not answer are forgotten."""
        await self.find([self.protocol.node_id], enough=None, timeout_s=timeout_s)

    @property
    def others(self) -> int:
        """Number of the nodes that this one knows."""
        return len(self.protocol.routing_table.uid_to_peer_id)

    async def leave(self) -> None:
        for task in self._late:
            task.cancel()
        with hivemind_errors():
            await self.protocol.shutdown()

    async def ping(self, address: str) -> None:
        """Tell the peer at `address` that this node is there. Raises ConnectionLost."""
        with hivemind_errors():
            await self.protocol.call_ping(PeerID.from_base58(peer_of(address)))

    async def find(
        self, keys: Collection[DHTID], *, enough: int | None, timeout_s: float, whole: bool = False
    ) -> dict[DHTID, Search]:
        """Look for announcements under `keys`, until for each `enough` nodes had some or the nearest were asked.

        `enough` is None: for the nearest nodes alone. Nodes show a sample of many announcements, unless the `whole` is
        asked for. At the deadline, what was found by then; nothing is raised but AccessDenied, for our own token.
        """
        searches = {}
        deadline_s = awake_s() + timeout_s
        for key in keys:
            search = searches[key] = Search(key, enough, self._known_near(key), ends_s=deadline_s, whole=whole)
            search.found = {each.peer: each for each in self.protocol.store.get(key.to_bytes(), time.time())}
            search.held = len(search.found)
        asking: dict[asyncio.Task[object], tuple[PeerID, DHTID, list[Search]]] = {}
        try:
            while True:
                self._ask(searches.values(), asking)
                awaited = [search.ends_s for search in searches.values() if search.waiting and not search.is_over]
                if not awaited:
                    break
                left_s = max(min(awaited) - awake_s(), 0)
                done, _ = await asyncio.wait(asking, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    self._take(task.result(), *asking.pop(task))
        finally:
            for task, (peer, *_) in asking.items():  # they end by themselves, and tell who is silent
                self._late.add(task)
                task.add_done_callback(partial(self._note_late, peer))
        for search in searches.values():
            nearest = [search.candidates[node] for node in search.nearest() if node in search.answered]
            was_cut_short = search.enough is not None and (search.is_satisfied or search.waiting)
            if nearest and not was_cut_short:
                self._remember(search.key, nearest[:NEAREST])
        return searches

    def _remember(self, key: DHTID, nearest: list[PeerID]) -> None:
        self._nearest.pop(key, None)
        self._nearest[key] = time.monotonic(), nearest
        while len(self._nearest) > MAX_REMEMBERED:
            del self._nearest[next(iter(self._nearest))]

    def _known_near(self, key: DHTID) -> dict[DHTID, PeerID]:
        table = self.protocol.routing_table.get_nearest_neighbors(key, BUCKET, exclude=self.protocol.node_id)
        _, remembered = self._nearest.get(key, (0.0, []))
        near = {node_id_of(peer): peer for peer in remembered} | dict(table)
        return {node: peer for node, peer in near.items() if peer not in self._silent}

    def _ask(
        self, searches: Collection[Search], asking: dict[asyncio.Task[object], tuple[PeerID, DHTID, list[Search]]]
    ) -> None:
        """Send the requests that are due; one to each node, for all keys that it is near to."""
        due: dict[DHTID, tuple[PeerID, list[Search]]] = {}
        for search in searches:
            for node in search.next(self._chance):
                search.asked.add(node)
                search.waiting.add(node)
                due.setdefault(node, (search.candidates[node], []))[1].append(search)
        for node, (peer, wanted) in due.items():
            for start in range(0, len(wanted), MAX_KEYS):
                part = wanted[start : start + MAX_KEYS]
                task: asyncio.Task[object] = asyncio.create_task(
                    self.protocol.call_find(
                        peer,
                        [each.key for each in part],
                        nodes_only=part[0].enough is None,
                        whole=part[0].whole,
                    )
                )
                asking[task] = peer, node, part

    def _note_late(self, peer: PeerID, task: asyncio.Task[object]) -> None:
        self._late.discard(task)
        if not task.cancelled() and task.exception() is None:
            self._note(peer, has_answered=task.result() is not None)

    def _note(self, peer: PeerID, *, has_answered: bool) -> None:
        if has_answered:
            self._silent.register_success(peer)
        else:
            self._silent.register_failure(peer)

    def _take(self, answer: object, peer: PeerID, node: DHTID, wanted: Sequence[Search]) -> None:
        self._note(peer, has_answered=answer is not None)
        for search in wanted:
            search.waiting.discard(node)
            if isinstance(answer, dict):
                found: Found = answer[search.key]
                search.answered.add(node)
                search.add(found.announcements, found.held)
                search.candidates |= {
                    near: each
                    for near, each in found.nodes.items()
                    if near != self.protocol.node_id and each not in self._silent
                }

    async def read_at(self, peers: Collection[str], keys: Collection[DHTID]) -> dict[DHTID, list[Announcement]]:
        """What this node and each of `peers` have themselves under `keys`, whether they are near to them or not."""
        found = {key: self.protocol.store.get(key.to_bytes(), time.time()) for key in keys}
        ids = [PeerID.from_base58(peer) for peer in peers]
        for answer in await asyncio.gather(
            *(self.protocol.call_find(peer, list(keys)[:MAX_KEYS], whole=True) for peer in ids)
        ):
            for key, shown in (answer or {}).items():
                found[key] += shown.announcements
        return found

    async def store(
        self, data: bytes, spots: dict[Spot, DHTID], *, also_at: Collection[str] = (), timeout_s: float
    ) -> dict[Spot, tuple[int, int]]:
        """Store an announcement at `spots`, each with its key, on the nodes nearest to them and on peers `also_at`.

        Returns of each spot how many nodes took it, and how many answered.
        """
        stale = [key for key in spots.values() if not self._is_fresh(key)]
        if stale:
            await self.find(stale, enough=None, timeout_s=timeout_s)
        places: dict[PeerID, list[Spot]] = {}
        for spot, key in spots.items():
            for peer in self.holders(key):
                places.setdefault(peer, []).append(spot)
        for address in also_at:
            places[PeerID.from_base58(address)] = list(spots)
        counts = dict.fromkeys(spots, (0, 0))
        with suppress(TimeoutError):
            async with patience(timeout_s):
                await asyncio.gather(*(self._store_at(peer, data, wanted, counts) for peer, wanted in places.items()))
        return counts

    async def _store_at(
        self, peer: PeerID, data: bytes, spots: list[Spot], counts: dict[Spot, tuple[int, int]]
    ) -> None:
        for start in range(0, len(spots), MAX_SPOTS):
            part = spots[start : start + MAX_SPOTS]
            if peer == self._peer:
                taken: list[bool] | None = [self.protocol.put_own(spot, data) for spot in part]
            else:
                taken = await self.protocol.call_store(peer, [data], part)
            if taken is None:
                self._silent.register_failure(peer)
                self._nearest.clear()  # it is to be replaced by another one
                return
            for spot, was_taken in zip(part, taken, strict=True):
                stored, asked = counts[spot]
                counts[spot] = stored + was_taken, asked + 1

    def _is_fresh(self, key: DHTID) -> bool:
        """Whether the nodes nearest to `key` are known: found lately, and no nearer one was met since."""
        looked_s, nearest = self._nearest.get(key, (float("-inf"), []))
        met = self.protocol.routing_table.get_nearest_neighbors(key, REPLICAS, exclude=self.protocol.node_id)
        are_known = all(peer in nearest or peer in self._silent for _, peer in met)
        return are_known and time.monotonic() - looked_s < NEAREST_S

    def holders(self, key: DHTID) -> list[PeerID]:
        """The nodes that should store what is under `key`, this one included where it is near enough."""
        _, nearest = self._nearest.get(key, (0.0, []))
        nodes = {node_id_of(peer): peer for peer in nearest if peer not in self._silent}
        if not self.protocol.client_mode:
            nodes[self.protocol.node_id] = self._peer
        return [nodes[node] for node in sorted(nodes, key=key.xor_distance)[:REPLICAS]]

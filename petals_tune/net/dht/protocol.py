"""The messages between nodes of the DHT: hivemind's, with announcements as the only thing that is stored or believed.

hivemind's own handlers decode what a stranger sent before they look at a signature, believe a dictionary whole or not
at all, and take a stranger's word for its end (`DHTProtocol.rpc_store`, `call_find` and `_validate_dictionary` in
hivemind/dht/protocol.py). They are replaced here; pings, messages and the routing table stay hivemind's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from time import time
from typing import Any, NamedTuple

import msgspec
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.auth import AuthRole, AuthRPCWrapper

from petals_tune.errors import AccessDenied, ConnectionLost, PetalsTuneError, ProtocolError
from petals_tune.net.dht.announcements import MAX_ANNOUNCEMENT_BYTES, Announcement, Opener
from petals_tune.net.dht.keys import INDEX_RECORDS, KEY_BYTES, Spot
from petals_tune.net.dht.store import NO_NETWORK, AnnouncementStore
from petals_tune.net.hivemind_p2p import hivemind_errors
from petals_tune.net.own_lag import patience

logger = logging.getLogger(__name__)

MAX_KEYS = 64  # of one request
MAX_SPOTS = 64  # of one request to store
MAX_ANSWER_BYTES = 2**20  # of announcements in one answer
NEIGHBOURS = 8  # of a key, that a node names
SAMPLE = 12  # announcements in an answer, unless the whole is asked for
MAX_REACHING = 8  # owners of announcements handed on by others that are dialled at the same time
MAX_TO_REACH = 256  # such announcements that wait

# What is asked for, as a byte behind a key in a request; without one: a sample.
_NODES_ONLY, _WHOLE = b"n", b"w"

_encoder = msgspec.msgpack.Encoder()
_list_decoder = msgspec.msgpack.Decoder(list[bytes])

NetworkOf = Callable[[str], Awaitable[str | None]]  # the network of a peer that is connected now
Reach = Callable[[str, Sequence[str]], Awaitable[str | None]]  # of a peer that can be reached at one of the addresses


class Found(NamedTuple):
    """What a node has under a key."""

    announcements: list[Announcement]  # all, or of many a sample
    nodes: dict[DHTID, PeerID]  # that are near to the key
    held: int  # how many announcements there are


def node_id_of(peer: PeerID) -> DHTID:
    """The place of a peer among the nodes, which it cannot choose: the hash of its peer id."""
    return DHTID.from_bytes(hashlib.sha1(b"petals_tune node\0" + peer.to_bytes()).digest())


class AnnouncementProtocol(DHTProtocol):
    """The requests of a node, and how it answers those of others."""

    opener: Opener
    store: AnnouncementStore
    network_of: NetworkOf
    reach: Reach

    def prepare(self, opener: Opener, network_of: NetworkOf, reach: Reach) -> None:
        """Set what announcements are checked with. To be called before `serve` and before any request."""
        self.opener, self.network_of, self.reach = opener, network_of, reach
        self.store = AnnouncementStore()
        self._reaching = asyncio.Semaphore(MAX_REACHING)
        self._to_reach: set[asyncio.Task[None]] = set()
        self._beside: set[asyncio.Task[Any]] = set()  # pings and the like, for which nobody waits

    async def serve(self) -> None:
        """Answer the requests of others from now on, as a node that stores for them."""
        self.client_mode, self.node_info = False, dht_pb2.NodeInfo(node_id=self.node_id.to_bytes())
        await self.add_p2p_handlers(self.p2p, AuthRPCWrapper(self, AuthRole.SERVICER, self.authorizer))

    async def shutdown(self) -> None:
        await super().shutdown()
        for task in (*self._to_reach, *self._beside):
            task.cancel()

    def _begin(self, work: Coroutine[Any, Any, Any], among: set[asyncio.Task[Any]]) -> None:
        def end(done: asyncio.Task[Any]) -> None:
            among.discard(done)
            if not done.cancelled() and isinstance(error := done.exception(), PetalsTuneError):
                logger.debug("%s", error)  # such as AccessDenied, where our own token has expired

        task = asyncio.create_task(work)
        among.add(task)  # asyncio keeps no strong reference
        task.add_done_callback(end)

    # Requests

    async def call_ping(self, peer: PeerID, validate: bool = False, strict: bool = True) -> DHTID | None:
        """As hivemind's; an answer with an id that is none counts as none (there it raises AssertionError)."""
        try:
            return await super().call_ping(peer, validate=validate, strict=strict)
        except (AssertionError, OverflowError):
            return None

    async def call_store(self, peer: PeerID, data: Sequence[bytes], spots: Sequence[Spot]) -> list[bool] | None:
        """Ask `peer` to store announcements, each at its spot; where there is one announcement, at all spots.

        Returns what was taken; None where the peer did not answer.
        """
        request = dht_pb2.StoreRequest(
            subkeys=[spot.encode() for spot in spots], values=list(data), peer=self.node_info
        )
        response = await self._call(peer, "rpc_store", request)
        if response is None or len(response.store_ok) != len(spots):
            return None
        return list(response.store_ok)

    async def call_find(
        self, peer: PeerID, keys: Collection[DHTID], *, nodes_only: bool = False, whole: bool = False
    ) -> dict[DHTID, Found] | None:
        """Ask `peer` for what it has under `keys`, unless it is `nodes_only`, and for nodes that are nearer to them.

        Of more than `SAMPLE` announcements it shows so many, drawn at random, unless the `whole` is asked for.

        Announcements that are not right are left out, and take no others with them. None where the peer did not answer.
        """
        keys = list(keys)
        mark = _NODES_ONLY if nodes_only else _WHOLE if whole else b""
        request = dht_pb2.FindRequest(keys=[key.to_bytes() + mark for key in keys], peer=self.node_info)
        response = await self._call(peer, "rpc_find", request)
        if response is None or len(response.results) != len(keys):
            return None
        found = {}
        for key, result in zip(keys, response.results, strict=True):
            announcements = await self._believe(result.value)
            # The field for hivemind's end of a dictionary tells how many there are.
            told = result.expiration_time if 0 <= result.expiration_time <= INDEX_RECORDS else 0
            nodes = _nodes(result.nearest_node_ids, result.nearest_peer_ids)
            found[key] = Found(announcements, nodes, max(len(announcements), int(told)))
        return found

    async def _call(self, peer: PeerID, name: str, request: Any) -> Any:
        """The answer of `peer`; None, and the peer leaves the routing table, where there is none in time."""
        try:
            with hivemind_errors(str(peer)):
                async with patience(self.wait_timeout):
                    response = await getattr(self.get_stub(peer), name)(request)
        except (ConnectionLost, TimeoutError) as error:
            logger.debug("%s of the DHT does not answer: %s", peer, error)
            response = None
        if response is None:
            await self.update_routing_table(None, peer, responded=False)
            return None
        if response.peer.node_id:
            await self.update_routing_table(_node_id(response.peer.node_id), peer)
        return response

    async def _believe(self, value: bytes) -> list[Announcement]:
        found: list[Announcement] = []
        if not value or len(value) > INDEX_RECORDS * (MAX_ANNOUNCEMENT_BYTES + 8):
            return found
        try:
            parts = _list_decoder.decode(value)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            logger.debug("an answer of the DHT is malformed: %s", error)
            return found
        for part in parts[:INDEX_RECORDS]:
            if (announcement := self._open(part)) is not None:
                found.append(announcement)
            await asyncio.sleep(0)  # a signature takes 0.1 ms
        return found

    def _open(self, data: bytes) -> Announcement | None:
        try:
            return self.opener.open(data, time())
        except (ProtocolError, AccessDenied) as error:
            logger.debug("an announcement is left out: %s", error)
            return None

    # Answers

    async def rpc_ping(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        """As hivemind's; a sender with an id that is none counts as no node (there a traceback is logged)."""
        if request.peer.node_id and len(request.peer.node_id) != KEY_BYTES:
            request = dht_pb2.PingRequest()
        return await super().rpc_ping(request, context)

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """Store announcements, each of which is checked by itself."""
        self._meet(request, context)
        response = dht_pb2.StoreResponse(peer=self.node_info)
        values = list(request.values)
        if len(values) == 1:
            values *= min(len(request.subkeys), MAX_SPOTS)
        for spot, value in zip(request.subkeys[:MAX_SPOTS], values, strict=False):
            response.store_ok.append(await self._take(spot, value, str(context.remote_id)))
            await asyncio.sleep(0)
        return response

    def put_own(self, spot: Spot, data: bytes) -> bool:
        """Store an announcement of this process, as the node that it is."""
        new = self._open(data)
        return new is not None and self.store.put(spot, new, NO_NETWORK, time())

    async def _take(self, spot: bytes, value: bytes, sender: str) -> bool:
        try:
            place = Spot.decode(spot)
        except ProtocolError:
            return False
        new = self._open(value)
        if new is None:
            return False
        if self.store.has(new) or new.peer != sender:
            network = self.store.network_of(new.peer)
        else:
            network = await self.network_of(sender) or NO_NETWORK
        if network is not None:
            return self.store.put(place, new, network, time())
        # Who hands on another's announcement may have made it up: its owner is looked for first.
        if len(self._to_reach) < MAX_TO_REACH:
            self._begin(self._reach_and_put(place, new), self._to_reach)
        return False

    async def _reach_and_put(self, place: Spot, new: Announcement) -> None:
        async with self._reaching:
            network = self.store.network_of(new.peer) or await self.reach(new.peer, new.record.addresses)
        if network is not None:
            self.store.put(place, new, network, time())

    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        """Answer with what is stored under each key, and the nearest nodes that are known."""
        self._meet(request, context)
        response, room = dht_pb2.FindResponse(peer=self.node_info), MAX_ANSWER_BYTES
        for key in request.keys[:MAX_KEYS]:
            result = dht_pb2.FindResult(type=dht_pb2.NOT_FOUND)
            mark = key[KEY_BYTES:]
            if len(key) >= KEY_BYTES and mark in (b"", _NODES_ONLY, _WHOLE):
                announcements = [] if mark == _NODES_ONLY else self.store.get(key[:KEY_BYTES], time())
                result.expiration_time = len(announcements)
                if mark != _WHOLE and len(announcements) > SAMPLE:
                    announcements = random.SystemRandom().sample(announcements, SAMPLE)
                if announcements and (value := _encoder.encode([each.data for each in announcements])):
                    room -= len(value)
                    if room > 0:
                        result.type, result.value = dht_pb2.FOUND_DICTIONARY, value
                sender = node_id_of(context.remote_id)
                for node, peer in self.routing_table.get_nearest_neighbors(
                    DHTID.from_bytes(key[:KEY_BYTES]), NEIGHBOURS, exclude=sender
                ):
                    result.nearest_node_ids.append(node.to_bytes())
                    result.nearest_peer_ids.append(peer.to_bytes())
            response.results.append(result)
        return response

    def _meet(self, request: dht_pb2.StoreRequest | dht_pb2.FindRequest, context: P2PContext) -> None:
        """Learn of the sender, where it is a node."""
        if request.peer.node_id and context.remote_id not in self.routing_table:
            self._begin(self.rpc_ping(dht_pb2.PingRequest(peer=request.peer), context), self._beside)

    # Nodes

    async def update_routing_table(self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        """As hivemind's, for nodes whose id is that of their peer id; a new one is handed what it should store."""
        if not responded:
            known = self.routing_table.get(peer_id=peer_id)
            if known is not None and known in self.routing_table:
                del self.routing_table[known]
            return
        if node_id is None or node_id != node_id_of(peer_id):
            return
        is_new = node_id not in self.routing_table
        to_ping = self.routing_table.add_or_update_node(node_id, peer_id)
        if to_ping is not None:  # its bucket is full: does the oldest one of it still answer?
            self._begin(self.call_ping(to_ping[1]), self._beside)
        if is_new and node_id in self.routing_table:
            self._begin(self._hand_over(node_id, peer_id), self._beside)

    async def _hand_over(self, node_id: DHTID, peer_id: PeerID) -> None:
        """Send to a new node what it should store, where it is on this node to do so."""
        data, spots = [], []
        for key_bytes, places in self.store.items(time()):
            key = DHTID.from_bytes(key_bytes)
            others = self.routing_table.get_nearest_neighbors(key, self.num_replicas, exclude=node_id)
            if others and (
                self.node_id.xor_distance(key) > others[0][0].xor_distance(key)
                or (len(others) == self.num_replicas and node_id.xor_distance(key) > others[-1][0].xor_distance(key))
            ):
                continue
            data += [place.announcement.data for place in places]
            spots += [place.spot for place in places]
        for start in range(0, len(data), MAX_SPOTS):
            part = slice(start, start + MAX_SPOTS)
            if await self.call_store(peer_id, data[part], spots[part]) is None:
                return


def _node_id(data: bytes) -> DHTID | None:
    return DHTID.from_bytes(data) if len(data) == KEY_BYTES else None


def _nodes(node_ids: Sequence[bytes], peer_ids: Sequence[bytes]) -> dict[DHTID, PeerID]:
    """The nodes that another one named, without those whose ids are not those of their peers."""
    found = {}
    for node_data, peer_data in zip(node_ids[:NEIGHBOURS], peer_ids[:NEIGHBOURS], strict=False):
        if len(peer_data) <= 64:
            peer = PeerID(peer_data)
            if _node_id(node_data) == (node := node_id_of(peer)):
                found[node] = peer
    return found

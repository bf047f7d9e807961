"""Attackers of a model in the DHT: real nodes next to its key that hide honest servers, and invented identities.

They run in a process of their own. Each has an address 127.0.x.1 of its own, and a key that was tried until the id of
its node was next to the key under which servers of the model stand; it says that it stores what it is sent, answers
look-ups with invented servers and with its fellows alone, and accepts streams on which it never answers.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import msgspec
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from petals_tune.net.dht.announcements import sign
from petals_tune.net.dht.directory import DhtDirectory
from petals_tune.net.dht.keys import INDEX_RECORDS, Shard, Spot
from petals_tune.net.dht.protocol import NEIGHBOURS, AnnouncementProtocol, node_id_of
from petals_tune.net.hivemind_p2p import HivemindTransport
from petals_tune.wire.records import PROTOCOL, ServerRecord, Throughput
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.span import BlockSpan

ATTACKERS = 16
FIRST_NETWORK = 100
KEYS_EACH = 4000  # that are tried for each attacker
TARPIT = 41999  # port at which connections are accepted and nothing is said
CLAIM = Throughput(step=9e11, batch=9e11)
LASTS_S = 590.0


@dataclass(frozen=True)
class Target:
    """The model that is attacked."""

    digest: str
    blocks: int
    initial_peers: tuple[str, ...]
    nodes: tuple[str, ...]  # peer ids of honest nodes

    def announcement(self, key: SigningKey, address: str) -> bytes:
        record = ServerRecord(
            peer=key.peer,
            addresses=(f"{address}/p2p/{key.peer}",),
            model=self.digest,
            model_name="tiny",
            blocks=BlockSpan(0, self.blocks),
            total_blocks=self.blocks,
            quantization="none",
            dtype="float32",
            throughput=CLAIM,
        )
        return sign(record, key, now_s=time.time(), ends_s=time.time() + LASTS_S)


def host(attacker: int) -> str:
    return f"127.0.{FIRST_NETWORK + attacker}.1"


def network(attacker: int) -> str:
    return f"127.0.{FIRST_NETWORK + attacker}.0/24"


def invented(target: Target, ports: Sequence[int]) -> Iterator[tuple[bytes, str]]:
    """Announcements of servers that are not there, without end, each with the network that it seems to be in.

    At a third of their addresses nobody listens, a third never says a word, and a third belongs to another peer.
    """
    for number in itertools.count():
        attacker = number % ATTACKERS
        port = (1, TARPIT, ports[attacker])[number // ATTACKERS % 3]
        key = SigningKey(f"invented {number}".encode().ljust(32))
        yield target.announcement(key, f"/ip4/{host(attacker)}/tcp/{port}"), network(attacker)


def attack(pipe: Connection, target: Target) -> None:
    """Entry point of the process: sends the attackers' ports, then shows as many invented servers as it is told."""
    asyncio.run(_attack(pipe, target))


async def _attack(pipe: Connection, target: Target) -> None:
    AnnouncementProtocol.rpc_find = _find  # type: ignore[method-assign]
    AnnouncementProtocol.rpc_store = _store  # type: ignore[method-assign]
    async with AsyncExitStack() as stack:
        nodes, ports = [], []
        for number, key in enumerate(_keys_near(DHTID.from_bytes(Shard(target.digest, 0).key))):
            address = f"/ip4/{host(number)}/tcp"
            transport = await HivemindTransport.start(target.initial_peers, host_maddrs=[f"{address}/0"], identity=key)
            stack.push_async_callback(transport.stop)
            await transport.accept(PROTOCOL, _never_answer)
            await stack.enter_async_context(await asyncio.start_server(_say_nothing, host(number), TARPIT))
            nodes.append(await DhtDirectory.join(transport, target.initial_peers, client_mode=False, identity=key))
            stack.push_async_callback(nodes[-1].leave)
            ports.append(int((await transport.addresses())[0].split("/")[4]))
            own = target.announcement(key, f"{address}/{ports[-1]}")
            _shown.append(own)
            for peer in map(PeerID.from_base58, target.nodes):
                await nodes[-1].node.protocol.call_ping(peer)
                await nodes[-1].node.protocol.call_store(peer, [own], [Spot(0, depth) for depth in range(4)])
            _fellows.append(transport.p2p.peer_id)
        pipe.send(ports)
        while (count := await asyncio.to_thread(pipe.recv)) is not None:
            del _shown[ATTACKERS:]
            _shown.extend(data for data, _ in itertools.islice(invented(target, ports), count))
            pipe.send(None)


_shown: list[bytes] = []
_fellows: list[PeerID] = []
_turns = itertools.count()


async def _find(self: Any, request: Any, context: Any) -> dht_pb2.FindResponse:
    results = []
    for _ in request.keys:
        first = next(_turns) * INDEX_RECORDS % max(len(_shown), 1)
        part = (_shown + _shown)[first : first + min(INDEX_RECORDS, len(_shown))]
        near = _fellows[:NEIGHBOURS]
        results.append(
            dht_pb2.FindResult(
                type=dht_pb2.FOUND_DICTIONARY,
                value=msgspec.msgpack.encode(part),
                nearest_node_ids=[node_id_of(peer).to_bytes() for peer in near],
                nearest_peer_ids=[peer.to_bytes() for peer in near],
            )
        )
    return dht_pb2.FindResponse(results=results, peer=self.node_info)


async def _store(self: Any, request: Any, context: Any) -> dht_pb2.StoreResponse:
    return dht_pb2.StoreResponse(store_ok=[True] * len(request.subkeys), peer=self.node_info)


async def _never_answer(connection: Any) -> None:
    with suppress(asyncio.CancelledError):  # hivemind cancels it when this process ends, and complains
        await asyncio.Event().wait()


async def _say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError, asyncio.CancelledError):
        await reader.read()


def _keys_near(key: DHTID) -> list[SigningKey]:
    """The keys, of many, whose nodes are the nearest to `key`."""
    tried = (SigningKey(f"attacker {number}".encode().ljust(32)) for number in range(ATTACKERS * KEYS_EACH))
    return sorted(tried, key=lambda each: node_id_of(PeerID.from_base58(each.peer)).xor_distance(key))[:ATTACKERS]

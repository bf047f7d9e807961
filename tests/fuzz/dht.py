"""Fuzz the boundary of the DHT: bad requests to a node and bad answers of one, over real daemons on 127.0.0.1.

    python tests/fuzz/dht.py --inputs 2400

After each input a newcomer, a client that has read before, and the server itself read the directory: each within 5 s,
and each sees the honest server. Prints what became of the inputs of each kind, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from petals_tune.errors import ConnectionLost
from petals_tune.net.dht.directory import DhtDirectory
from petals_tune.net.dht.protocol import AnnouncementProtocol, node_id_of
from petals_tune.net.hivemind_p2p import hivemind_errors
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from tests.fuzz.dht_inputs import ANSWERS, MODEL, REQUESTS, SLOW_ANSWERS
from tests.net.dht.nodes import node, record

WHOLE = BlockSpan(0, 24)
READING_S = 5.0
SENDING_S = 10.0
SENT = "sent"
BY_CLIENT, BY_SERVER = "fetched by the client", "fetched by the server"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=2400, help="of all kinds together (2400)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    told = asyncio.run(fuzz(given.inputs, random.Random(given.seed), slow=given.inputs // 40))
    for kind, counts in told.kinds.items():
        became = ", ".join(f"{what} {count}" for what, count in counts.most_common(6))
        print(f"{kind:<32}{counts[SENT]:>6,}   {became}")
    print(json.dumps({"inputs": told.inputs, "slowest_s": round(told.slowest_s, 2), "blinded": 0}))


@dataclass
class Told:
    """What became of the inputs, by kind."""

    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    slowest_s: float = 0.0  # reading

    @property
    def inputs(self) -> int:
        return sum(counts[SENT] for counts in self.kinds.values())


def nothing(request: Any) -> Any:
    return dht_pb2.FindResponse(results=[dht_pb2.FindResult()] * len(request.keys))


@dataclass
class Malicious:
    """A node that answers every look-up with `answer`, and counts who fetched it."""

    directory: DhtDirectory
    answer: Callable[[Any], Any] | None = nothing  # None: it never answers
    fetched: set[str] = field(default_factory=set)  # peers that asked

    @property
    def peer(self) -> PeerID:
        return self.directory.node.protocol.p2p.peer_id


@asynccontextmanager
async def malicious_node(peers: list[str]) -> AsyncIterator[tuple[Malicious, list[str]]]:
    played: Malicious | None = None

    async def rpc_find(self: Any, request: Any, context: Any) -> Any:
        assert played is not None
        played.fetched.add(str(context.remote_id))
        if played.answer is None:
            await asyncio.sleep(60)
        else:
            return played.answer(request)

    with mock.patch.object(AnnouncementProtocol, "rpc_find", rpc_find):
        entered = node(peers, name="malicious")
        directory, addresses = await entered.__aenter__()
    played = Malicious(directory)
    try:
        yield played, addresses
    finally:
        await entered.__aexit__(None, None, None)


@dataclass
class Network:
    """A server's node, a client's, and a malicious one that both know and ask."""

    server: DhtDirectory
    client: DhtDirectory
    malicious: Malicious
    first_peers: list[str]  # of a newcomer: the server's and the malicious one's
    honest: ServerRecord
    reading_s: float = READING_S

    def meet(self) -> None:
        """Both nodes know the malicious one again, whatever they saw of it before."""
        for directory in (self.server, self.client):
            peer = self.malicious.peer
            directory.node.protocol.routing_table.add_or_update_node(node_id_of(peer), peer)
            directory.node._silent.clear()
            directory.node._nearest.clear()
        self.malicious.answer = nothing
        self.malicious.fetched.clear()

    async def check(self) -> float:
        """Read as a newcomer, as a client that has read before, and as the server; the seconds of the slowest."""
        newcomer = DhtDirectory(self.client.node, initial_peers=self.first_peers)
        slowest_s = 0.0
        for reader in (newcomer, self.client, self.server):
            started_s = time.monotonic()
            async with asyncio.timeout(self.reading_s):
                snapshot = await reader.snapshot(MODEL, WHOLE)
            assert self.honest in snapshot.servers, f"{reader} does not see the honest server"
            slowest_s = max(slowest_s, time.monotonic() - started_s)
        return slowest_s


@asynccontextmanager
async def network() -> AsyncIterator[Network]:
    async with AsyncExitStack() as stack:
        server, peers = await stack.enter_async_context(node(name="server"))
        malicious, addresses = await stack.enter_async_context(malicious_node(peers))
        first = [*peers, *addresses]
        client, _ = await stack.enter_async_context(node(first, client=True))
        honest = record("server", 0, 24, model=MODEL, addresses=tuple(peers))
        await server.announce(honest, lasts_s=500)
        yield Network(server, client, malicious, first, honest)


async def fuzz(inputs: int, chance: random.Random, *, slow: int = 0, reading_s: float = READING_S) -> Told:
    """Try `inputs` inputs, and `slow` ones besides. Raises AssertionError or TimeoutError where a reader is blinded."""
    told = Told()
    async with network() as net:
        net.reading_s = reading_s
        await net.check()
        for kind in (*islice(cycle((*REQUESTS, *ANSWERS)), inputs), *islice(cycle(SLOW_ANSWERS), slow)):
            counts = told.kinds.setdefault(kind, Counter())
            counts[SENT] += 1
            net.meet()
            try:
                if kind in REQUESTS:
                    counts[await send(net, *REQUESTS[kind](chance))] += 1
                else:
                    net.malicious.answer = (ANSWERS | SLOW_ANSWERS)[kind](chance)
                told.slowest_s = max(told.slowest_s, await net.check())
            except Exception as error:
                error.add_note(f"input {told.inputs}: {kind}")
                raise
            if kind not in REQUESTS:
                for fetched, directory in {BY_CLIENT: net.client, BY_SERVER: net.server}.items():
                    counts[fetched] += str(directory.node.protocol.p2p.peer_id) in net.malicious.fetched
    return told


async def send(net: Network, method: str, request: Any) -> str:
    """Send a request from the malicious node to the server; what became of it."""
    protocol = net.malicious.directory.node.protocol
    stub = protocol.get_stub(net.server.node.protocol.p2p.peer_id)
    try:
        with hivemind_errors():
            answer = await getattr(stub, method)(request, timeout=SENDING_S)
    except ConnectionLost as error:
        if "DecodeError" not in str(error):
            raise
        return "answered that it is no message"
    if method == "rpc_store":
        return "answered, some stored" if any(answer.store_ok) else "answered, nothing stored"
    return "answered"


if __name__ == "__main__":
    main()

"""Thirty real nodes of the DHT in one process, and what they send and receive.

Messages and bytes are counted where the protocol calls another node. Inside a network namespace of its own, where
nobody else uses the loopback device, its counters say what libp2p and TCP add.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import statistics
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).parents[3]))

from petals_tune.net.dht.directory import DhtDirectory
from petals_tune.net.hivemind_p2p import HivemindTransport
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.span import BlockSpan
from tests.benchmarks.simulation.traffic import Counted, digest_of, typical_record

NODES = 30
CLIENTS = 6
BLOCKS = 24
MODELS = 2
LASTS_S = 60.0
REFRESH_S = 15.0
WARM_S, WATCHED_S = 140.0, 120.0  # the nearest nodes of a key are remembered for 120 s: then all have looked again


def blocks_of(number: int) -> BlockSpan:
    """The blocks of the server with this number, in the real network and in the simulated one."""
    start = (number // MODELS * 4) % (BLOCKS - 6)
    return BlockSpan(start, start + 6)


@dataclass
class Traffic:
    """What all processes of a network sent and received while they were watched."""

    server_bytes_per_s: float
    server_messages_per_s: float
    client_bytes_per_s: float
    client_messages_per_s: float
    by_kind: dict[str, float] = field(default_factory=dict)  # calls a second of all processes
    loopback_bytes_per_s: float | None = None  # of the whole network; None outside of a namespace
    payload_bytes_per_s: float = 0.0  # of the whole network, without framing


class _CountingStub:
    """Counts what is called through a stub of hivemind's."""

    def __init__(self, stub: Any, note: Callable[[str, int, int], None]):
        self._stub, self._note = stub, note

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._stub, name)

        async def counted(request: Any, timeout: float | None = None) -> Any:
            response = await call(request, timeout=timeout)
            self._note(name, request.ByteSize(), response.ByteSize())
            return response

        return counted


class RealNetwork:
    """Starts the nodes, and counts."""

    def __init__(self) -> None:
        self.counted: dict[str, Counted] = {}
        self.kinds: dict[str, int] = {}
        self.payload = 0

    def count(self, directory: DhtDirectory, own: str) -> None:
        """Count from now on what `directory`, of the peer `own`, calls."""
        self.counted[own] = Counted()
        get_stub = directory.node.protocol.get_stub

        def counting(peer: Any) -> _CountingStub:
            def note(name: str, sent: int, received: int) -> None:
                self.kinds[name] = self.kinds.get(name, 0) + 1
                self.payload += sent + received
                self.counted[own].add(sent, received)
                if (other := self.counted.get(str(peer))) is not None:
                    other.add(received, sent)

            return _CountingStub(get_stub(peer), note)

        directory.node.protocol.get_stub = counting

    def reset(self) -> None:
        self.payload = 0
        self.kinds.clear()
        for each in self.counted.values():
            each.__init__()  # type: ignore[misc]


async def measure(
    *, nodes: int = NODES, clients: int = CLIENTS, warm_s: float = WARM_S, watched_s: float = WATCHED_S
) -> Traffic:
    """Start a network on 127.0.0.1, let it run, and return what its processes sent and received."""
    network = RealNetwork()
    async with AsyncExitStack() as stack:
        work: list[asyncio.Task[None]] = []
        first: list[str] = []
        servers, readers = [], []
        for number in range(nodes):
            identity = SigningKey.new()
            transport = await HivemindTransport.start(first, identity=identity)
            stack.push_async_callback(transport.stop)
            directory = await DhtDirectory.join(transport, first, client_mode=False, identity=identity)
            stack.push_async_callback(directory.leave)
            network.count(directory, identity.peer)
            initial, first = first, first or list(await transport.addresses())
            servers.append(identity.peer)
            addresses = (tuple(await transport.addresses()) * 2)[:2]
            work.append(asyncio.create_task(_serve(directory, identity.peer, number, addresses)))
            work.append(asyncio.create_task(directory.stay_known(transport, initial)))
        for number in range(clients):
            transport = await HivemindTransport.start(first, listens=False)
            stack.push_async_callback(transport.stop)
            directory = await DhtDirectory.join(transport, first, client_mode=True)
            stack.push_async_callback(directory.leave)
            network.count(directory, str(transport.p2p.peer_id))
            readers.append(str(transport.p2p.peer_id))
            work.append(asyncio.create_task(_read(directory, digest_of(number % MODELS))))
            work.append(asyncio.create_task(directory.stay_known(transport, first)))
        await asyncio.sleep(warm_s)
        network.reset()
        before = loopback_bytes()
        await asyncio.sleep(watched_s)
        after = loopback_bytes()
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        return Traffic(
            server_bytes_per_s=statistics.mean(network.counted[each].bytes for each in servers) / watched_s,
            server_messages_per_s=statistics.mean(network.counted[each].messages for each in servers) / watched_s,
            client_bytes_per_s=statistics.mean(network.counted[each].bytes for each in readers) / watched_s,
            client_messages_per_s=statistics.mean(network.counted[each].messages for each in readers) / watched_s,
            by_kind={kind: number / watched_s for kind, number in sorted(network.kinds.items())},
            loopback_bytes_per_s=None if before is None or after is None else (after - before) / watched_s,
            payload_bytes_per_s=network.payload / watched_s,
        )


async def _serve(directory: DhtDirectory, peer: str, number: int, addresses: tuple[str, ...]) -> None:
    record = typical_record(peer, digest_of(number % MODELS), blocks_of(number), BLOCKS)
    record = msgspec.structs.replace(record, addresses=addresses)  # who hands an announcement on dials them
    while True:
        await directory.announce(record, lasts_s=LASTS_S)
        await asyncio.sleep(LASTS_S / 3)


async def _read(directory: DhtDirectory, model: str) -> None:
    await asyncio.sleep(random.uniform(0, REFRESH_S))
    thorough = True
    while True:
        await directory.snapshot(model, BlockSpan(0, BLOCKS), thorough=thorough)
        thorough = False
        await asyncio.sleep(REFRESH_S)


def loopback_bytes() -> int | None:
    """Bytes that the loopback device carried; None where others may use it too."""
    devices = [line.split(":") for line in Path("/proc/net/dev").read_text().splitlines() if ":" in line]
    if any(name.strip() not in ("lo", "sit0", "tunl0", "ip6tnl0") for name, _ in devices):
        return None
    return next((int(counters.split()[0]) for name, counters in devices if name.strip() == "lo"), None)


if __name__ == "__main__":  # in a process of its own: tests/benchmarks/network.py
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    print(json.dumps(asdict(asyncio.run(measure()))))

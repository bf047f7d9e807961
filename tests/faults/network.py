"""A network inside this process: real clients, streams, handlers and engines.

Servers can be killed, stopped, held and replaced at the very moment that a request of some kind is inside them.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from petals_tune.blocks.engine import Engine
from petals_tune.errors import ConnectionLost
from petals_tune.net.directory import Snapshot
from petals_tune.net.in_process import InProcessDirectory, InProcessNetwork
from petals_tune.net.peer import Peer
from petals_tune.net.transport import Connection, StreamConnection
from petals_tune.swarm import loop
from petals_tune.swarm.call import Calls
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.formats import Formats
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.swarm.routes.round_trips import HandOverRule
from petals_tune.swarm.verify import SpotChecks
from petals_tune.wire.messages import Chained, HandOver, Message
from petals_tune.wire.records import PROTOCOL, Arithmetic, ServerRecord
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import FormatOption
from servers.requests.hand_over import Neighbours
from servers.requests.handler import Handler
from servers.scheduling.compute_thread import ComputeThread
from tests.pretend_device import GpuEngine
from tests.servers.parts import load
from tests.servers.peers import LIMITS, stores

MODEL = "m"
GB = 2**30
CLIENT = "client"
EXACT = Arithmetic(quantization="none", dtype="float32", device="cpu")
_LASTS_S = 1e6


@dataclass
class Fault:
    """What happens when a request of class `inside` reaches `server`. That request is never answered."""

    server: str
    inside: type[Message]
    harm: Callable[[], Coroutine[Any, Any, None]]
    skip: int = 0  # requests of the class that come through before
    fired: threading.Event = field(default_factory=threading.Event)


class HeldHandler(Handler):
    """A handler whose requests run into the faults of its network."""

    network: Network
    name: str
    lie: Callable[[Message], Message] | None = None

    async def _reply(self, client: str, request: Message) -> Message:
        if isinstance(request, Chained):  # what is in it comes here next, once its tensor is there
            return await super()._reply(client, request)
        self.network.calls[self.name, type(request).__name__] += 1
        self.network.requests.append((self.name, request))
        for fault in self.network.faults:
            if fault.server == self.name and isinstance(request, fault.inside) and not fault.fired.is_set():
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.fired.set()
                await fault.harm()
                await asyncio.Event().wait()  # it is never answered
        reply = await super()._reply(client, request)
        return reply if self.lie is None else self.lie(reply)


class CountedNeighbours(Neighbours):
    """Tells the network which server handed something on."""

    def __init__(self, network: Network, name: str, peer: Peer):
        super().__init__(peer, MODEL, BlockSpan(0, 6))
        self._network, self._name = network, name

    async def hand_on(self, goes: HandOver, tensor: torch.Tensor) -> bool:
        went = await super().hand_on(goes, tensor)
        if went:
            self._network.handed_on.append(self._name)
        return went


class StoppableConnection(StreamConnection):
    """A server's end of a connection; nothing is read or written while the server is stopped."""

    def __init__(self, running: asyncio.Event, peer: str, *streams: Any):
        super().__init__(peer, *streams)
        self._running = running

    async def read_exactly(self, count: int) -> bytes:
        data = await super().read_exactly(count)
        await self._running.wait()
        return data

    async def write(self, *parts: bytes | memoryview) -> None:
        await self._running.wait()
        await super().write(*parts)


@dataclass
class FakeServer:
    """A handler that runs in this process, and what it announces."""

    handler: HeldHandler
    record: ServerRecord
    running: asyncio.Event  # cleared while it is stopped


class Network(InProcessNetwork):
    """Servers by name. Everything runs on the background loop, where a client of a real swarm has its work too."""

    def __init__(self, folder: Path, hand_over: HandOverRule = "never"):
        super().__init__()
        self.directory = SlowDirectory(self)
        self.hand_over = hand_over
        self._folder = folder
        self._compute = ComputeThread()
        self.servers: dict[str, FakeServer] = {}
        self.faults: list[Fault] = []
        self.at_lookup: Callable[[], Coroutine[Any, Any, None]] | None = None  # before the directory answers
        self.calls: Counter[tuple[str, str]] = Counter()
        self.requests: list[tuple[str, Message]] = []  # by server, in the order in which they came
        self.handed_on: list[str] = []  # names of servers that handed an output on
        self.apart: set[tuple[str, str]] = set()  # names of servers of which the first cannot reach the second

    # What a test does.

    def serve(self, name: str, span: str, **changes: Any) -> FakeServer:
        return loop.run(self.start(name, span, **changes))

    def kill(self, name: str) -> None:
        loop.run(self.end(name))

    def disconnect_clients(self) -> None:
        """End all streams of clients, which may go on with new ones."""
        loop.background_loop().call_soon_threadsafe(self.find(CLIENT).disconnect)

    def chain(self, *, verify: float = 0.0, wire_format: FormatOption = "float32", **policy: Any) -> Chain:
        async def make() -> Chain:
            retries = RetryPolicy(**{"timeout_s": 30.0, "first_pause_s": 0.01, **policy})
            client = SwarmClient(self.peer(CLIENT), MODEL, retries, BlockSpan(0, 6))
            formats = Formats(hidden=wire_format, grad=wire_format)
            checks = SpotChecks(client, share=verify, formats=formats) if verify else None
            calls = Calls(client, formats=formats, hand_over=self.hand_over, sums=not verify, observer=checks)
            return Chain(calls)

        return loop.run(make())

    def fault(self, server: str, inside: type[Message], harm: Callable[[], Any], *, skip: int = 0) -> Fault:
        self.faults.append(Fault(server=server, inside=inside, harm=harm, skip=skip))
        return self.faults[-1]

    def stop(self) -> None:
        async def end_all() -> None:
            for name in list(self.servers):
                await self.end(name)

        loop.run(end_all())
        self._compute.stop()

    # What happens on the loop.

    async def start(self, name: str, span: str, **changes: Any) -> FakeServer:
        """Server `name`, new or again: then it has its old address and no memory."""
        peer = self.peer(id_of(name))
        record = ServerRecord(
            peer=peer.id,
            addresses=(),
            model=MODEL,
            model_name="tiny",
            blocks=BlockSpan.parse(span),
            total_blocks=6,
            **{"quantization": "none", "dtype": "float32", **changes},
        )
        handler = HeldHandler(
            engine_of(self._folder, span, record.arithmetic),
            self._compute,
            stores(leases=GB, sessions=GB, adapters=GB, sums=GB),
            record,
            LIMITS,
            neighbours=CountedNeighbours(self, name, peer),
        )
        handler.network, handler.name = self, name
        await peer.transport.accept(PROTOCOL, handler.serve)
        server = self.servers[name] = FakeServer(handler, record, asyncio.Event())
        server.running.set()
        return server

    def engine(self, span: str) -> Engine:
        """The engine of all servers of `span`."""
        return engine_of(self._folder, span, EXACT)

    async def end(self, name: str) -> None:
        """As SIGKILL would end it."""
        neighbours = self.servers.pop(name).handler._neighbours
        assert neighbours is not None
        await neighbours.close()
        self.remove(id_of(name))

    async def connect(self, dialling: str, accepting: str) -> tuple[Connection, Connection]:
        """As in the base class, between peers that are not apart."""
        if any((id_of(name), id_of(other)) == (dialling, accepting) for name, other in self.apart):
            raise ConnectionLost(f"{dialling} and {accepting} are apart", peer=accepting)
        return await super().connect(dialling, accepting)

    def make_end(self, owner: str, peer: str, *streams: Any) -> Connection:
        """As in the base class; that of a server stops when it does."""
        for name, server in self.servers.items():
            if id_of(name) == owner:
                return StoppableConnection(server.running, peer, *streams)
        return super().make_end(owner, peer, *streams)


class SlowDirectory(InProcessDirectory):
    """Shows the servers that live now, after what a test wants to happen before."""

    def __init__(self, network: Network):
        super().__init__()
        self._network = network

    async def snapshot(self, model: str, blocks: BlockSpan, *, thorough: bool = False) -> Snapshot:
        if self._network.at_lookup is not None:
            await self._network.at_lookup()
        return Snapshot.of(server.record for server in self._network.servers.values() if server.record.model == model)

    async def models(self) -> tuple[ServerRecord, ...]:
        return tuple(server.record for server in self._network.servers.values())


@cache
def engine_of(folder: Path, span: str, arithmetic: Arithmetic) -> Engine:
    """One for all servers of a span, in all tests: to load it takes longer than a training step.

    A GPU is a pretended one.
    """
    dtype: torch.dtype = getattr(torch, arithmetic.dtype)
    loaded = load(folder, span, arithmetic.quantization, dtype)
    return GpuEngine(loaded) if arithmetic.device == "cuda" else Engine(loaded)


def id_of(name: str) -> str:
    """The peer id of a server; that of "b" is no part of that of "b2"."""
    return f"server-{name}-id"

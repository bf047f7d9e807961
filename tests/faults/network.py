"""A network inside this process: real clients, streams, handlers and engines, over pairs of connected sockets.

Servers can be killed, stopped, held and replaced at the very moment that a request of some kind is inside them.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from petals_tune.blocks.engine import Engine
from petals_tune.net.directory import Directory
from petals_tune.swarm import loop
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.hand_over import HandOverRule
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.swarm.verify import CheckedChain
from petals_tune.wire.messages import Chained, HandOver, Message
from petals_tune.wire.records import ServerRecord, encode_record
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import WireFormat
from servers.requests.hand_over import Neighbours
from servers.requests.handler import Handler
from servers.scheduling.compute_thread import ComputeThread
from tests.servers.parts import load
from tests.servers.peers import LIMITS, stores

MODEL = "m"
GB = 2**30


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


class FakeNeighbours(Neighbours):
    """Tells the network what was handed on, and cannot reach those from whom it is apart."""

    def __init__(self, network: Network, name: str, peer: str):
        super().__init__(network.daemon(peer), Directory(network), MODEL, None)  # type: ignore[arg-type]
        self._network, self._name = network, name

    async def hand_on(self, goes: HandOver, tensor: torch.Tensor) -> bool:
        with suppress(P2PDaemonError):  # it died
            if (self._name, self._network.name_of(goes.peer)) in self._network.apart:
                return False
        went = await super().hand_on(goes, tensor)
        if went:
            self._network.handed_on.append(self._name)
        return went


class FakeServer:
    """One server: a record, a handler, and the relays between it and its clients."""

    def __init__(self, handler: HeldHandler, record: ServerRecord):
        self.handler, self.record = handler, record
        self.running = asyncio.Event()  # cleared while it is stopped
        self.running.set()
        self.writers: list[asyncio.StreamWriter] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def connected(self, whom: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The end of `whom` of a new stream, with a relay in between that stands still while the server does."""
        near, far = await _pair()
        inner, outer = await _pair()
        relays = [_relay(self.running, far[0], inner[1]), _relay(self.running, inner[0], far[1])]
        serving = self.handler.serve(SimpleNamespace(peer_id=whom), *outer)  # type: ignore[arg-type]
        self.tasks += [asyncio.create_task(work) for work in (*relays, serving)]
        self.writers += [far[1], inner[1], outer[1]]
        return near

    async def end(self) -> None:
        assert self.handler._neighbours is not None
        await self.handler._neighbours.close()
        for writer in self.writers:
            writer.close()
        for task in self.tasks:
            if task is not asyncio.current_task():
                task.cancel()


async def _pair() -> tuple[Any, Any]:
    ends = socket.socketpair()
    left, right = [await asyncio.open_connection(sock=end) for end in ends]
    return left, right


async def _relay(running: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(2**16):
            await running.wait()
            writer.write(data)
            await writer.drain()
    except (ConnectionError, OSError):
        pass
    finally:
        writer.close()


class Network:
    """Servers by name. Everything runs on the background loop, where a client of a real swarm has its work too."""

    def __init__(self, folder: Path, hand_over: HandOverRule = "never"):
        self.hand_over = hand_over
        self._engines: dict[str, Engine] = {}
        self._folder = folder
        self._compute = ComputeThread()
        self.servers: dict[str, FakeServer] = {}
        self.faults: list[Fault] = []
        self.at_lookup: Callable[[], Coroutine[Any, Any, None]] | None = None  # before the DHT answers
        self.calls: Counter[tuple[str, str]] = Counter()
        self.handed_on: list[str] = []  # names of servers that handed an output on
        self.apart: set[tuple[str, str]] = set()  # names of servers of which the first cannot reach the second

    # What a test does.

    def serve(self, name: str, span: str, **changes: Any) -> FakeServer:
        return loop.run(self.start(name, span, **changes))

    def kill(self, name: str) -> None:
        loop.run(self.end(name))

    def chain(self, *, verify: float = 0.0, wire_format: WireFormat = "float32", **policy: Any) -> Chain:
        async def make() -> Chain:
            retries = RetryPolicy(**{"timeout_s": 30.0, "first_pause_s": 0.01, **policy})
            client = SwarmClient(self.daemon("client"), self, MODEL, retries)  # type: ignore[arg-type]
            if not verify:
                return Chain(client, hand_over=self.hand_over)
            return CheckedChain(client, share=verify, seed=0, wire_format=wire_format, grad_format=wire_format)

        return loop.run(make())

    def fault(self, server: str, inside: type[Message], harm: Callable[[], Any], *, skip: int = 0) -> Fault:
        self.faults.append(Fault(server=server, inside=inside, harm=harm, skip=skip))
        return self.faults[-1]

    def close(self) -> None:
        async def end_all() -> None:
            for name in list(self.servers):
                await self.end(name)

        loop.run(end_all())
        self._compute.stop()

    # What happens on the loop.

    async def start(self, name: str, span: str, **changes: Any) -> FakeServer:
        """Server `name`, new or again: then it has its old address and no memory."""
        record = ServerRecord(
            peer=PeerID(b"\x12\x20" + hashlib.sha256(name.encode()).digest()).to_base58(),
            addresses=(),
            model=MODEL,
            model_name="tiny",
            blocks=BlockSpan.parse(span),
            total_blocks=6,
            **{"quantization": "none", "dtype": "float32", **changes},
        )
        handler = HeldHandler(
            self.engine(span),
            self._compute,
            stores(leases=GB, sessions=GB, adapters=GB, sums=GB),
            record,
            LIMITS,
            neighbours=FakeNeighbours(self, name, record.peer),
        )
        handler.network, handler.name = self, name
        self.servers[name] = FakeServer(handler, record)
        return self.servers[name]

    def engine(self, span: str) -> Engine:
        """One for all servers of a span."""
        if span not in self._engines:
            self._engines[span] = Engine(load(self._folder, span))
        return self._engines[span]

    async def end(self, name: str) -> None:
        await self.servers.pop(name).end()

    # hivemind's P2P and DHT node, as far as they are asked.

    def daemon(self, whom: str) -> Any:
        """The p2p daemon of `whom`, a peer id."""

        async def connect(peer_id: PeerID, addresses: object) -> None:
            self._at(peer_id)

        async def call(peer_id: PeerID, protocol: str) -> tuple[Any, Any, Any]:
            return (None, *(await self._at(peer_id).connected(whom)))

        return SimpleNamespace(_client=SimpleNamespace(connect=connect), call_binary_stream_handler=call)

    def _at(self, peer_id: PeerID) -> FakeServer:
        return self.servers[self.name_of(peer_id.to_base58())]

    def name_of(self, peer: str) -> str:
        for name, server in self.servers.items():
            if server.record.peer == peer:
                return name
        raise P2PDaemonError("nobody there")

    async def get(self, key: str, latest: bool) -> Any:
        if self.at_lookup is not None:
            await self.at_lookup()
        records = [server.record for server in self.servers.values()]
        return SimpleNamespace(value={each.peer: SimpleNamespace(value=encode_record(each)) for each in records})


def close_client(chain: Chain) -> None:
    """End the streams and background tasks of a client on a network that has no daemon to stop."""

    async def close() -> None:
        client = chain.client
        for opening in client._streams.values():
            if opening.done() and not opening.cancelled() and not opening.exception():
                await opening.result().close()

    loop.run(close())

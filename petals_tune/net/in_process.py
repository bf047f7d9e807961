"""Peers of one process, joined by socket pairs: a transport and a directory that need no p2p daemon."""

from __future__ import annotations

import asyncio
import math
import socket
import time
import weakref
from collections.abc import Sequence

import msgspec

from petals_tune.errors import ConnectionLost
from petals_tune.net.directory import Snapshot
from petals_tune.net.members import Members
from petals_tune.net.peer import Peer
from petals_tune.net.transport import Connection, Serve, StreamConnection
from petals_tune.wire.records import ServerRecord, same_model
from petals_tune.wire.span import BlockSpan


class InProcessNetwork:
    """A swarm whose peers live on one event loop. A subclass may keep peers apart or slow their connections down."""

    def __init__(self) -> None:
        self.directory = InProcessDirectory()
        self._transports: dict[str, InProcessTransport] = {}

    def peer(self, peer_id: str, *, members: Members | None = None) -> Peer:
        """The peer `peer_id`, which accepts connections until it is removed."""
        transport = self._transports.setdefault(peer_id, InProcessTransport(peer_id, self))
        return Peer(id=peer_id, transport=transport, directory=self.directory, members=members)

    def remove(self, peer_id: str) -> None:
        """End a peer as the end of its process would: its connections break, and nobody can dial it any more."""
        if (transport := self._transports.pop(peer_id, None)) is not None:
            transport.disconnect()

    async def close(self) -> None:
        """Remove all peers, and wait until nothing is served any more."""
        serving = [task for transport in self._transports.values() for task in transport.serving]
        for peer_id in list(self._transports):
            self.remove(peer_id)
        await asyncio.gather(*serving, return_exceptions=True)

    async def connect(self, dialling: str, accepting: str) -> tuple[Connection, Connection]:
        """A new connection between two peers, as both see it. Raises ConnectionLost where a subclass wants it so."""
        near, far = [await asyncio.open_connection(sock=end) for end in socket.socketpair()]
        return self.make_end(dialling, accepting, *near), self.make_end(accepting, dialling, *far)

    def make_end(self, owner: str, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Connection:
        """The end of peer `owner` of a connection to `peer`."""
        return StreamConnection(peer, reader, writer)

    def find(self, peer_id: str) -> InProcessTransport:
        """The transport of a peer. Raises ConnectionLost where there is no such peer."""
        if (transport := self._transports.get(peer_id)) is None:
            raise ConnectionLost(f"there is no peer {peer_id} in this process", peer=peer_id)
        return transport


class InProcessTransport:
    """The transport of one peer of an InProcessNetwork."""

    def __init__(self, peer_id: str, network: InProcessNetwork):
        self.serving: dict[asyncio.Task[None], Connection] = {}
        self._dialled: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.id, self._network = peer_id, network
        self._protocols: dict[str, Serve] = {}

    async def dial(self, peer: str, addresses: Sequence[str], protocol: str) -> Connection:
        """As `Transport.dial`; a peer is found by its id alone."""
        other = self._network.find(peer)
        if (serve := other._protocols.get(protocol)) is None:
            raise ConnectionLost(f"peer {peer} does not accept {protocol}", peer=peer)
        near, far = await self._network.connect(self.id, peer)
        task = asyncio.create_task(_serve(serve, far))
        other.serving[task] = far
        task.add_done_callback(other.serving.pop)
        self._dialled.add(near)
        return near

    async def accept(self, protocol: str, serve: Serve) -> None:
        """As `Transport.accept`."""
        self._protocols[protocol] = serve

    def disconnect(self) -> None:
        """Abort all connections of this peer. The task that calls it goes on."""
        for connection in self._dialled:
            connection.abort()
        for task, connection in self.serving.items():
            connection.abort()
            if task is not asyncio.current_task():
                task.cancel()


async def _serve(serve: Serve, connection: Connection) -> None:
    await serve(connection)


class InProcessDirectory:
    """The records of an InProcessNetwork, each until it expires."""

    def __init__(self) -> None:
        self._records: dict[str, tuple[ServerRecord, float]] = {}  # by peer id, until time.monotonic()

    async def announce(self, record: ServerRecord, *, lasts_s: float) -> None:
        """As `Directory.announce`."""
        self._records[record.peer] = record, time.monotonic() + lasts_s

    async def withdraw(self, record: ServerRecord) -> None:
        """As `Directory.withdraw`; the offline record expires when the announced one would have."""
        _, until_s = self._records.get(record.peer, (record, -math.inf))
        self._records[record.peer] = msgspec.structs.replace(record, state="offline"), until_s

    async def snapshot(self, model: str, blocks: BlockSpan, *, thorough: bool = False) -> Snapshot:
        """As `Directory.snapshot`."""
        return Snapshot.of(
            record
            for record in self._live()
            if same_model(record.model, model)
            and record.blocks.start < blocks.stop
            and blocks.start < record.blocks.stop
        )

    async def find(self, peer: str, model: str, blocks: BlockSpan) -> ServerRecord | None:
        """As `Directory.find`."""
        servers = (await self.snapshot(model, blocks)).servers
        return next((server for server in servers if server.peer == peer), None)

    async def models(self) -> tuple[ServerRecord, ...]:
        """As `Directory.models`."""
        return tuple(record for record in self._live() if record.state != "offline")

    def _live(self) -> list[ServerRecord]:
        now_s = time.monotonic()
        return [record for record, until_s in self._records.values() if until_s > now_s]

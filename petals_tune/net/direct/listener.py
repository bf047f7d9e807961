"""The TCP port of a peer for direct connections: whoever connects shows a ticket that was agreed on before."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

from petals_tune.errors import ConfigError, ConnectionLost, ServerBusy
from petals_tune.net.direct.connection import DirectConnection
from petals_tune.net.transport import Serve

logger = logging.getLogger(__name__)

TICKET_BYTES: Final = 16
TICKET_S = 10.0  # how long a ticket is good
GREETING_S = 5.0  # for a ticket to arrive, and again for the first record
MAX_TICKETS = 1024
MAX_TICKETS_PER_PEER = 16
MAX_NEWCOMERS = 128  # TCP connections without a ticket; for one more, the oldest is closed


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A peer that is about to connect, and the keys of its connection."""

    peer: str
    remote_address: str
    sends: bytes
    receives: bytes
    serve: Serve


class Listener:
    """Accepts direct connections of the peers that it was told to expect. Used by the event loop alone."""

    def __init__(self) -> None:
        self.port: int
        self._servers: list[asyncio.Server] = []
        self._expected: dict[bytes, tuple[Expected, asyncio.TimerHandle]] = {}  # by ticket
        self._tickets: Counter[str] = Counter()  # by peer
        self._newcomers: dict[_Newcomer, None] = {}  # oldest first
        self._serving: dict[asyncio.Task[None], DirectConnection] = {}

    @classmethod
    async def start(cls, hosts: Sequence[str], port: int) -> Listener:
        """Listen at one port of all `hosts`, IP addresses of this machine; 0: any port. Raises ConfigError."""
        listener = cls()
        loop = asyncio.get_running_loop()
        bound = port
        try:
            for host in hosts:
                server = await loop.create_server(lambda: _Newcomer(listener), host, bound)
                listener._servers.append(server)
                bound = server.sockets[0].getsockname()[1]
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"swarm.direct_port={port}: cannot listen there on {', '.join(hosts)}: {error}\n"
                "  give a port that is free, 0 for any, or null for no direct connections",
                key="swarm.direct_port",
                seen=port,
            ) from None
        listener.port = bound
        return listener

    def expect(self, ticket: bytes, expected: Expected) -> None:
        """Accept one connection that shows `ticket` in the next TICKET_S. Raises ServerBusy."""
        if self._tickets[expected.peer] >= MAX_TICKETS_PER_PEER or len(self._expected) >= MAX_TICKETS:
            raise ServerBusy(f"peer {expected.peer} is to be expected at too many direct connections")
        if ticket in self._expected:
            raise ServerBusy("a ticket that is given already")
        expiry = asyncio.get_running_loop().call_later(TICKET_S, self._take, ticket)
        self._expected[ticket] = expected, expiry
        self._tickets[expected.peer] += 1

    def close(self) -> None:
        """Close the port and all connections."""
        for server in self._servers:
            server.close()
        for newcomer in list(self._newcomers):
            newcomer.transport.abort()
        for ticket in list(self._expected):
            self._take(ticket)
        for task, connection in self._serving.items():
            connection.abort()
            task.cancel()

    def enter(self, newcomer: _Newcomer) -> None:
        """Count one who has connected and shown no ticket."""
        if len(self._newcomers) >= MAX_NEWCOMERS:
            oldest = next(iter(self._newcomers))
            self.leave(oldest)
            oldest.transport.abort()
        self._newcomers[newcomer] = None

    def leave(self, newcomer: _Newcomer) -> None:
        """Count one less. Idempotent."""
        self._newcomers.pop(newcomer, None)

    def admit(self, newcomer: _Newcomer, ticket: bytes) -> None:
        """Serve one who showed `ticket`, or hang up. A ticket is good once."""
        self.leave(newcomer)
        if (expected := self._take(ticket)) is None:
            newcomer.transport.abort()
            return
        connection = DirectConnection(
            expected.peer,
            sends=expected.sends,
            receives=expected.receives,
            remote_address=expected.remote_address,
        )
        newcomer.transport.set_protocol(connection)
        connection.connection_made(newcomer.transport)
        task = asyncio.create_task(_serve(connection, ticket, expected.serve))
        self._serving[task] = connection
        task.add_done_callback(self._serving.pop)

    def _take(self, ticket: bytes) -> Expected | None:
        if ticket not in self._expected:
            return None
        expected, expiry = self._expected.pop(ticket)
        expiry.cancel()
        self._tickets[expected.peer] -= 1
        if not self._tickets[expected.peer]:
            del self._tickets[expected.peer]
        return expected


async def _serve(connection: DirectConnection, ticket: bytes, serve: Serve) -> None:
    """Greet, and serve whoever has the keys, not the ticket alone, which anybody on the line can read."""
    try:
        async with asyncio.timeout(GREETING_S):
            if await connection.read_exactly(TICKET_BYTES) != ticket:
                raise ConnectionLost("a greeting that is none")
            await connection.write(ticket)
    except (ConnectionLost, TimeoutError) as error:
        logger.info("a direct connection of peer %s: %s", connection.peer, str(error) or "no greeting came")
        connection.abort()
        return
    await serve(connection)


class _Newcomer(asyncio.BufferedProtocol):
    """A TCP connection of anybody, until it has shown a ticket. It takes TICKET_BYTES of memory, and GREETING_S."""

    def __init__(self, listener: Listener):
        self.transport: asyncio.Transport
        self._listener = listener
        self._ticket, self._filled = bytearray(TICKET_BYTES), 0
        self._limit: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's has its methods and another base
        self.transport = transport
        self._limit = asyncio.get_running_loop().call_later(GREETING_S, transport.abort)
        self._listener.enter(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._ticket)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled == TICKET_BYTES:
            self._limit.cancel()
            self._listener.admit(self, bytes(self._ticket))

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit.cancel()
        self._listener.leave(self)

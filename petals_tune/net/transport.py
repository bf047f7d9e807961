"""Byte streams between peers: what a transport provides, and what everything above it builds on."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import ClassVar, Protocol

from petals_tune.errors import ConnectionLost

# What asyncio and uvloop raise at a stream that ended. uvloop uses RuntimeError, which asyncio uses for bugs too.
_ENDED = (EOFError, OSError, RuntimeError, ValueError)


class Connection(ABC):
    """One duplex stream of bytes with one peer. A stream that ended raises ConnectionLost, whatever ended it."""

    direct: ClassVar[bool] = False  # whether it goes from process to process, without p2p daemons between them

    def __init__(self, peer: str, *, remote_address: str = ""):
        """`peer` is the id of the other end, `remote_address` the multiaddress that it connected from, if known."""
        self.peer, self.remote_address = peer, remote_address

    @abstractmethod
    async def read_exactly(self, count: int) -> bytes:
        """Read `count` bytes."""

    @abstractmethod
    async def write(self, *parts: bytes | memoryview) -> None:
        """Write `parts` with one system call; returns once the peer has taken enough of what was written before."""

    @abstractmethod
    def finish(self) -> None:
        """Send what was written, then the end of the stream. Reading goes on."""

    @abstractmethod
    def close(self) -> None:
        """Close both directions once the peer has taken what was written."""

    @abstractmethod
    def abort(self) -> None:
        """Close at once; what was written and not taken yet is dropped."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether this end was closed or the other end was seen to be gone."""


class StreamConnection(Connection):
    """A connection over a pair of asyncio's streams."""

    def __init__(
        self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, remote_address: str = ""
    ):
        super().__init__(peer, remote_address=remote_address)
        self._reader, self._writer = reader, writer
        self._finished = False

    async def read_exactly(self, count: int) -> bytes:
        try:
            return await self._reader.readexactly(count)
        except _ENDED as error:
            raise self._lost(error) from None

    async def write(self, *parts: bytes | memoryview) -> None:
        if self._finished or self._writer.is_closing():
            raise ConnectionLost(f"the connection to {self.peer} is closed", peer=self.peer)
        try:
            self._writer.writelines(parts)
            await self._writer.drain()
        except _ENDED as error:
            raise self._lost(error) from None

    def finish(self) -> None:
        if not self._finished and not self._writer.is_closing():
            self._finished = True
            with suppress(OSError):  # the peer has closed its end meanwhile: the reader notices
                self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()

    def abort(self) -> None:
        self._writer.transport.abort()

    @property
    def closed(self) -> bool:
        return self._writer.is_closing()

    def _lost(self, error: Exception) -> Exception:
        """ConnectionLost; `error` itself where the connection is open, since it is a bug then."""
        if isinstance(error, RuntimeError | ValueError) and not self.closed:
            return error
        return ConnectionLost(f"the connection to {self.peer} was lost: {error!r}", peer=self.peer)


Serve = Callable[[Connection], Awaitable[None]]


class Transport(Protocol):
    """Opens connections to other peers and accepts theirs. A protocol is a name that both sides know."""

    async def dial(self, peer: str, addresses: Sequence[str], protocol: str) -> Connection:
        """Open a connection to `peer` at one of `addresses`, or over a connection that exists.

        Raises ConnectionLost where nobody answers, or one who does not accept `protocol`.
        """
        ...

    async def accept(self, protocol: str, serve: Serve) -> None:
        """Call `serve` with every connection that other peers open for `protocol`. Raises ConnectionLost."""
        ...

"""A direct connection: encrypted records over TCP, behind the interface of every other connection."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import ClassVar, cast

from petals_tune.errors import ConnectionLost, ProtocolError
from petals_tune.net.direct.records import TAG_BYTES, RecordCipher
from petals_tune.net.transport import Connection
from petals_tune.wire.frames import HEADER, MAX_FRAME_BYTES

_LENGTH = struct.Struct(">I")  # before each record: its bytes, with the tag
MAX_RECORD_BYTES = MAX_FRAME_BYTES + TAG_BYTES
# Two frames; the header and the payload of one are two records.
_BUFFER_BYTES = 2 * (2 * _LENGTH.size + HEADER.size + TAG_BYTES + MAX_RECORD_BYTES)
_UNREAD_BYTES = MAX_FRAME_BYTES  # decrypted and not read: no more is decrypted, or taken from the socket
_OBJECT_BYTES = 64  # of a record in memory, beside its bytes
_UNSENT_BYTES = 2 * MAX_FRAME_BYTES  # a writer waits while more than this is not taken by the socket
# A peer whose machine or line is gone sends nothing, and would keep its stream and what it has on a server.
_KEEPALIVE = {
    getattr(socket, name): value
    for name, value in (
        ("TCP_KEEPIDLE", 30),  # seconds without a byte, before the kernel asks
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 120_000),  # ms for which what was written may stay without an answer
    )
    if hasattr(socket, name)  # Linux has all of them, other systems some
}


class DirectConnection(Connection, asyncio.BufferedProtocol):
    """One end of a direct connection. Each part that is written is a record; what is read need not be one.

    A record that the peer did not seal ends it, and so does a peer that is unreachable for a minute or two.
    """

    direct: ClassVar[bool] = True

    def __init__(self, peer: str, *, sends: bytes, receives: bytes, remote_address: str = ""):
        """`sends` and `receives` are the keys of the two directions."""
        super().__init__(peer, remote_address=remote_address)
        self.on_cut: Callable[[], None] = lambda: None  # called where the connection broke, and was not closed
        self._sealing, self._opening = RecordCipher(sends), RecordCipher(receives)
        self._transport: asyncio.Transport
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))  # what came, and is to be decrypted
        self._start = self._filled = 0  # the part of it that is in use
        self._records: deque[bytes] = deque()  # decrypted, and not read yet
        self._offset = 0  # bytes of the first of them that were read
        self._unread = 0
        self._wanted = 0  # bytes for which somebody waits
        self._arrived: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._why: str | None = None  # nothing more will be read
        self._paused = self._finished = self._aborted = False

    # As a connection

    async def read_exactly(self, count: int) -> bytes:
        if count < 0:
            raise ValueError("count is less than zero")
        while self._unread < count:
            if self._why is not None:
                raise self._lost()
            await self._wait_for(count)
        return self._take(count)

    async def write(self, *parts: bytes | memoryview) -> None:
        if self._finished or self.closed:
            raise ConnectionLost(f"the connection to {self.peer} is closed", peer=self.peer)
        sealed = []
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), MAX_FRAME_BYTES):
                record = self._sealing.seal(view[start : start + MAX_FRAME_BYTES])
                sealed += [_LENGTH.pack(len(record)), record]
        self._transport.writelines(sealed)
        await self._writable.wait()
        if self.closed:
            raise self._lost()

    def finish(self) -> None:
        if not self._finished and not self.closed:
            self._finished = True
            self._transport.write_eof()

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        self._aborted = True
        self._transport.abort()

    @property
    def closed(self) -> bool:
        return self._transport.is_closing()

    # As a protocol of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's has its methods and another base
        self._transport = transport
        transport.set_write_buffer_limits(_UNSENT_BYTES)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._start:
            self._buffer[: self._filled - self._start] = self._buffer[self._start : self._filled]
            self._start, self._filled = 0, self._filled - self._start
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        self._advance()

    def eof_received(self) -> bool:
        if self._filled > self._start:
            self._break("it ended in the middle of a record")
        else:
            self._end("the other end closed it")
        return True  # writing goes on

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self._aborted:
            self.on_cut()
        self._end("this end closed it" if exc is None else f"{exc!r}")
        self._writable.set()

    @property
    def _full(self) -> bool:
        held_bytes = self._unread + _OBJECT_BYTES * len(self._records)
        return held_bytes >= _UNREAD_BYTES and self._unread >= self._wanted

    def _advance(self) -> None:
        """Decrypt what came while there is room, wake the reader, and take more from the socket while there is room."""
        if self._aborted:
            return
        try:
            self._open_records()
        except ProtocolError as error:
            self._break(str(error))
            return
        if self._arrived is not None and self._unread >= self._wanted and not self._arrived.done():
            self._arrived.set_result(None)
        if self._full != self._paused and not self.closed:
            self._paused = not self._paused
            (self._transport.pause_reading if self._paused else self._transport.resume_reading)()

    def _open_records(self) -> None:
        """Decrypt whole records of the buffer while there is room. Raises ProtocolError."""
        while not self._full and self._filled - self._start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, self._start)
            if not TAG_BYTES < length <= MAX_RECORD_BYTES:
                raise ProtocolError(f"a record of {length} bytes", what="record")
            end = self._start + _LENGTH.size + length
            if end > self._filled:
                break
            record = self._opening.open(self._buffer[self._start + _LENGTH.size : end])
            self._records.append(record)
            self._unread += len(record)
            self._start = end

    def _take(self, count: int) -> bytes:
        """Return the next `count` bytes, of those that are here."""
        self._unread -= count
        if self._records and not self._offset and len(self._records[0]) == count:
            taken = self._records.popleft()
        else:
            pieces = []
            while count:
                first = memoryview(self._records[0])[self._offset :][:count]
                pieces.append(first)
                count -= len(first)
                self._offset += len(first)
                if self._offset == len(self._records[0]):
                    self._records.popleft()
                    self._offset = 0
            taken = b"".join(pieces)
        self._advance()
        return taken

    async def _wait_for(self, count: int) -> None:
        """Wait until something came, or nothing more will."""
        if self._arrived is not None:
            raise RuntimeError("another coroutine is reading from this connection")
        self._wanted, self._arrived = count, asyncio.get_running_loop().create_future()
        self._advance()
        try:
            await self._arrived
        finally:
            self._wanted, self._arrived = 0, None

    def _break(self, why: str) -> None:
        self._end(why)
        self.on_cut()
        self.abort()

    def _end(self, why: str) -> None:
        self._why = self._why or why
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def _lost(self) -> ConnectionLost:
        return ConnectionLost(f"the direct connection to {self.peer} was lost: {self._why}", peer=self.peer)

"""The other end of a stream, played by the test over a pair of connected sockets."""

import asyncio
import socket
from types import SimpleNamespace

from petals_tune.net.members import Members
from petals_tune.net.stats import SwarmStats
from petals_tune.net.stream import ServerStream
from petals_tune.wire.codec import decode, encode
from petals_tune.wire.frames import HEADER, Assembler, cut, read_header
from petals_tune.wire.messages import Hello, Message, Welcome
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan

PEER = "12D3KooWGRUaaqTyQ3mjBWbfu8yVaaWHXtmtzBqbLa9kGDGnkZBi"
RECORD = ServerRecord(
    peer=PEER,
    addresses=(),
    model="m",
    model_name="tiny",
    blocks=BlockSpan(0, 4),
    total_blocks=4,
    quantization="none",
    dtype="float32",
)
LONG_S = 60.0  # never reached where the code is right


class Peer:
    """The other end of the stream: reads what arrives and answers what the test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer
        self.read_bytes = self.written_bytes = 0
        self._assembler = Assembler(max_message_bytes=2**30, max_open_bytes=2**30)

    async def receive(self) -> tuple[int, Message]:
        while True:
            length, message_id, remaining = read_header(await self.reader.readexactly(HEADER.size))
            payload = await self.reader.readexactly(length)
            self.read_bytes += HEADER.size + length
            body = self._assembler.feed(message_id, payload, remaining)
            if body is not None:
                return message_id, decode(body)

    async def send(self, message_id: int, message: Message) -> None:
        for header, payload in cut(message_id, encode(message)):
            self.written_bytes += len(header) + len(payload)
            self.writer.write(header + bytes(payload))
        await self.writer.drain()

    async def welcome(self, *, max_in_flight: int = 32) -> None:
        message_id, hello = await self.receive()
        assert isinstance(hello, Hello)
        await self.send(message_id, Welcome(record=RECORD, max_in_flight=max_in_flight, max_message_bytes=2**30))


async def joined_ends() -> tuple[tuple[asyncio.StreamReader, asyncio.StreamWriter], Peer]:
    ours, theirs = socket.socketpair()
    return await asyncio.open_connection(sock=ours), Peer(*await asyncio.open_connection(sock=theirs))


class FakeP2P:
    """As much of hivemind's P2P as a stream asks for; gives out our end of the socket pair."""

    def __init__(self, ends: tuple[asyncio.StreamReader, asyncio.StreamWriter], failure: Exception | None = None):
        self._ends, self._failure = ends, failure
        self._client = SimpleNamespace(connect=self._connect)

    async def _connect(self, peer_id: object, addresses: object) -> None:
        if self._failure is not None:
            raise self._failure

    async def call_binary_stream_handler(self, peer_id: object, protocol: str) -> tuple:
        return (None, *self._ends)


def opening(
    p2p: FakeP2P,
    *,
    timeout_s: float = LONG_S,
    stats: SwarmStats | None = None,
    peer: str = PEER,
    members: Members | None = None,
) -> asyncio.Task[ServerStream]:
    more = {"members": members, "timeout_s": timeout_s, "stats": stats or SwarmStats()}
    work = ServerStream.open(p2p, peer, (), "m", **more)  # type: ignore[arg-type]
    return asyncio.create_task(work)

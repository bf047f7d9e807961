"""The other end of a connection, played by the test: it writes whatever it likes, and reads what arrives."""

from __future__ import annotations

import asyncio
from typing import Any

from petals_tune.errors import ConnectionLost
from petals_tune.net.in_process import InProcessNetwork
from petals_tune.net.members import Members
from petals_tune.net.stats import SwarmStats
from petals_tune.net.stream import ServerStream
from petals_tune.net.transport import Connection
from petals_tune.wire.codec import decode, encode
from petals_tune.wire.frames import HEADER, Assembler, cut, read_header
from petals_tune.wire.messages import Hello, Message, Pong, Refusal, Welcome
from petals_tune.wire.records import PROTOCOL, ServerRecord
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
LIMITS = {"max_in_flight": 32, "max_message_bytes": 2**30, "max_positions": 2**20, "max_tokens": 2**20}
LONG_S = 60.0  # never reached where the code is right


def welcome(**fields: Any) -> Welcome:
    return Welcome(**{"record": RECORD, **LIMITS, **fields})


class PlayedPeer:
    """Sends and reads messages, whole or not."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.read_bytes = self.written_bytes = 0
        self._assembler = Assembler(max_message_bytes=2**30, max_open_bytes=2**30)
        self._next_id = 0

    async def write(self, data: bytes) -> None:
        self.written_bytes += len(data)
        await self.connection.write(data)

    async def send(self, message: Message | bytes, message_id: int | None = None) -> int:
        """Write a message, or any bytes in its place; returns its id."""
        self._next_id += 1
        number = self._next_id if message_id is None else message_id
        for header, payload in cut(number, message if isinstance(message, bytes) else encode(message)):
            await self.write(header + bytes(payload))
        return number

    async def read(self) -> tuple[int, Message]:
        """(id, message) of the next message. Raises ConnectionLost where the other end closed."""
        async with asyncio.timeout(LONG_S):
            while True:
                length, number, remaining = read_header(await self.connection.read_exactly(HEADER.size))
                payload = await self.connection.read_exactly(length)
                self.read_bytes += HEADER.size + length
                body = self._assembler.feed(number, payload, remaining)
                if isinstance(body, bytes | bytearray):
                    return number, decode(bytes(body))

    async def ask(self, message: Message | bytes) -> Message:
        """The answer to `message`, others passed over."""
        number = await self.send(message)
        while True:
            answered, answer = await self.read()
            if answered == number:
                return answer

    async def refused(self, message: Message | bytes) -> Refusal:
        answer = await self.ask(message)
        assert isinstance(answer, Refusal), answer
        return answer

    async def last_words(self) -> list[Message]:
        """The messages that come until the other end closes."""
        received = []
        try:
            while True:
                received.append((await self.read())[1])
        except ConnectionLost:
            return received

    async def welcome(self, **fields: Any) -> Hello:
        """Answer the greeting of a client, and return it."""
        number, hello = await self.read()
        assert isinstance(hello, Hello)
        await self.send(welcome(**fields), number)
        return hello


async def accepted(network: InProcessNetwork, peer: str = PEER) -> asyncio.Queue[PlayedPeer]:
    """The played ends of the connections that others open to server `peer`, as they come."""
    ends: asyncio.Queue[PlayedPeer] = asyncio.Queue()

    async def serve(connection: Connection) -> None:
        ends.put_nowait(PlayedPeer(connection))

    await network.peer(peer).transport.accept(PROTOCOL, serve)
    return ends


async def opening(
    *,
    timeout_s: float = LONG_S,
    stats: SwarmStats | None = None,
    peer: str = PEER,
    members: Members | None = None,
) -> tuple[asyncio.Task[ServerStream], PlayedPeer]:
    """A stream that is being opened to server `peer`, and the server."""
    network = InProcessNetwork()
    ends = await accepted(network, peer)
    client = network.peer("client").transport
    work = ServerStream.open(client, peer, (), model="m", members=members, timeout_s=timeout_s, stats=stats)
    return asyncio.create_task(work), await ends.get()


async def answer_pings(network: InProcessNetwork, peer: str = PEER) -> None:
    """Have server `peer` greet its clients and answer their pings."""

    async def serve(connection: Connection) -> None:
        played = PlayedPeer(connection)
        try:
            await played.welcome()
            while True:
                number, _ = await played.read()
                await played.send(Pong(), number)
        except ConnectionLost:
            connection.close()

    await network.peer(peer).transport.accept(PROTOCOL, serve)

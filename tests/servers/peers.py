"""A handler with a real engine, and clients that may write to it whatever they like, over connected sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from petals_tune.blocks.engine import Engine
from petals_tune.net.members import Members
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.frames import HEADER, Assembler, cut, read_header
from petals_tune.wire.messages import Forward, Hello, Message, PutAdapter, Refusal, Welcome, decode, encode
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from servers.requests.admission import RequestLimits
from servers.requests.handler import Handler
from servers.scheduling.compute_thread import ComputeThread
from servers.stores.budgets import Budgets
from servers.stores.stores import Stores
from tests.servers.parts import load

SPAN = BlockSpan(1, 4)  # of six blocks
HIDDEN = 32
LIMITS = RequestLimits(
    max_streams=8,
    max_streams_per_client=3,
    max_in_flight=4,
    max_requests_per_s=100_000.0,
    max_request_s=60.0,
    max_receiving_bytes=4 * 2**20,
    max_message_bytes=2**20,
    max_positions=64,
    max_tokens=256,
)


@contextmanager
def engine_of(folder: Path) -> Iterator[tuple[Engine, ComputeThread]]:
    compute = ComputeThread(1)
    try:
        yield Engine(load(folder, str(SPAN))), compute
    finally:
        compute.stop()


def stores(**max_bytes: int) -> Stores:
    sizes = {"leases": 2**20, "sessions": 2**20, "adapters": 2**20, "sums": 2**20, **max_bytes}
    return Stores.within(Budgets(**sizes), max_lease_age_s=600, max_session_idle_s=600, token_bytes=256)


def record_of(peer: str = "server") -> ServerRecord:
    return ServerRecord(
        peer=peer,
        addresses=(),
        model="digest",
        model_name="tiny",
        blocks=SPAN,
        total_blocks=6,
        quantization="none",
        dtype="float32",
    )


def forward(rows: int = 1, positions: int = 2, **fields: Any) -> Forward:
    return Forward(**{"span": SPAN, "hidden": torch.ones(rows, positions, HIDDEN), **fields})


class House:
    """One handler, and its streams."""

    def __init__(
        self,
        engine: tuple[Engine, ComputeThread],
        *,
        limits: RequestLimits = LIMITS,
        kept: Stores | None = None,
        members: Members | None = None,
    ):
        self.stores = kept or stores()
        self.handler = Handler(*engine, self.stores, record_of(), limits, members)

    @asynccontextmanager
    async def stranger(self, client: str = "mallory") -> AsyncIterator[Peer]:
        """A stream on which nothing was said yet."""
        ours, theirs = socket.socketpair()
        server_side = await asyncio.open_connection(sock=theirs)
        reader, writer = await asyncio.open_connection(sock=ours)
        serving = asyncio.create_task(self.handler.serve(SimpleNamespace(peer_id=client), *server_side))  # type: ignore[arg-type]
        try:
            yield Peer(reader, writer, serving)
        finally:
            writer.close()
            async with asyncio.timeout(60):
                await serving

    @asynccontextmanager
    async def client(self, name: str = "mallory", token: bytes | None = None) -> AsyncIterator[Peer]:
        """A stream with its greeting behind it."""
        async with self.stranger(name) as peer:
            assert isinstance(await peer.ask(Hello(model="digest", token=token)), Welcome)
            yield peer


class Peer:
    """The other end of a stream."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, serving: asyncio.Task[None] | None = None
    ):
        """`serving` is what the handler does on this stream, where it runs in this process."""
        self.reader, self.writer, self.serving = reader, writer, serving
        self._assembler = Assembler(max_message_bytes=2**30, max_open_bytes=2**30)
        self._next_id = 0

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def send(self, message: Message | bytes, message_id: int | None = None) -> int:
        """Write a message, or any bytes in its place; its id."""
        self._next_id += 1
        number = self._next_id if message_id is None else message_id
        body = message if isinstance(message, bytes) else encode(message)
        for header, payload in cut(number, body):
            self.writer.write(header + bytes(payload))
        return number

    async def read(self) -> tuple[int, Message]:
        """(id, message) of the next answer. Raises IncompleteReadError where the server closed the stream."""
        async with asyncio.timeout(60):
            while True:
                length, number, remaining = read_header(await self.reader.readexactly(HEADER.size))
                body = self._assembler.feed(number, await self.reader.readexactly(length), remaining)
                if isinstance(body, bytes | bytearray):
                    return number, decode(bytes(body))

    async def ask(self, message: Message | bytes) -> Message:
        """The answer to `message`, others passed over."""
        number = self.send(message)
        while True:
            answered, answer = await self.read()
            if answered == number:
                return answer

    async def refused(self, message: Message | bytes) -> Refusal:
        answer = await self.ask(message)
        assert isinstance(answer, Refusal), answer
        return answer

    async def last_words(self) -> list[Message]:
        """What the server says until it closes the stream."""
        said = []
        try:
            while True:
                said.append((await self.read())[1])
        except (asyncio.IncompleteReadError, ConnectionError):
            return said


def lora(rank: int = 2, **fields: Any) -> AdapterPart:
    a, b = torch.ones(rank, HIDDEN), torch.ones(48, rank)
    return AdapterPart(**{"block": 1, "method": "lora", "module": "mlp.gate_proj", "tensors": [a, b], **fields})


def prompt(positions: int = 2, **fields: Any) -> AdapterPart:
    return AdapterPart(**{"block": 1, "method": "prompt", "tensors": [torch.ones(positions, HIDDEN)], **fields})


def put(*parts: AdapterPart, version: str = "v", span: BlockSpan = SPAN) -> PutAdapter:
    return PutAdapter(version=version, span=span, parts=list(parts))

"""Clients that use a server's memory and event loop up, over real streams; and honest ones that check each answer.

A hostile client does one of `ATTACKS` after the other on each of its streams, for `ATTACK_S` or until the server ends
the stream, whatever the answers are.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import torch

from petals_tune.errors import PetalsTuneError, ProtocolError, ServerError
from petals_tune.net.hivemind_p2p import HivemindTransport
from petals_tune.net.stream import ServerStream
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.frames import HEADER, MAX_FRAME_BYTES
from petals_tune.wire.messages import (
    MAX_LEASES,
    MAX_PARTS,
    MAX_TICKETS,
    Backward,
    Delivery,
    Forward,
    Forwarded,
    Gradients,
    Hello,
    Message,
    OpenSession,
    Ping,
    PutAdapter,
    Release,
    SessionOpened,
    Step,
    Stepped,
    Withdrawn,
)
from petals_tune.wire.records import PROTOCOL
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import in_format
from tests.models import relative_error
from tests.net.played_peer import PlayedPeer

ATTACK_S = 5.0
STREAMS = 3  # of a hostile client at a time
REPLY_S = 120.0
CLOSE_TO = (
    1e-5  # relative: a step shares its batch with others', and plain torch differs by so much between batch sizes
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server, and sizes that it allows."""

    address: str
    span: BlockSpan
    hidden: int
    module: str  # a linear of hidden x hidden on each block
    max_tokens: int
    max_positions: int
    max_message_bytes: int

    @property
    def peer(self) -> str:
        return self.address.rpartition("/")[2]

    def floats(self, share: float) -> torch.Tensor:
        """(1, S, H) of so large a share of the largest message."""
        return torch.zeros(1, int(share * self.max_message_bytes / 4 / self.hidden), self.hidden)

    def largest(self, **fields: object) -> Forward:
        """The largest forward that it takes."""
        rows = self.max_tokens // self.max_positions
        hidden = torch.ones(rows, self.max_positions, self.hidden)
        return Forward(**{"span": self.span, "hidden": hidden, **fields})


# Attacks: each gets a greeted stream


async def early_tensors(peer: PlayedPeer, target: Target) -> None:
    """Hand on tensors that no request waits for, and leave."""
    for number in range(4):
        await peer.send(Delivery(ticket=os.urandom(16), tensor=target.floats(0.15 + 0.05 * number)))


async def adapters_of_many_parts(peer: PlayedPeer, target: Target) -> None:
    """Upload as many parts as a message has on one linear, and have graphs kept that go through them."""
    pair = [torch.ones(1, target.hidden), torch.ones(target.hidden, 1)]
    for version, count in (("many", MAX_PARTS), ("some", 50)):
        part = AdapterPart(block=target.span.start, method="lora", module=target.module, tensors=pair)
        await peer.ask(PutAdapter(version=version, span=target.span, parts=[part] * count))
        for _ in range(5):
            await peer.send(target.largest(adapter=version, keep=True))
    await _read(peer)


async def replies_unread(peer: PlayedPeer, target: Target) -> None:
    """Ask for large replies and read none."""
    for _ in range(40):
        await peer.send(target.largest())
    await asyncio.sleep(ATTACK_S)


async def half_requests(peer: PlayedPeer, target: Target) -> None:
    """Claim the largest messages, send a byte of some and most of others, and then a byte now and then."""
    sizes = dict.fromkeys(range(1000, 1060), 1) | dict.fromkeys(range(1060, 1064), int(0.6 * target.max_message_bytes))
    left = {}
    for number, size in sizes.items():
        remaining = target.max_message_bytes
        while size:
            sent = min(size, MAX_FRAME_BYTES)
            size, remaining = size - sent, remaining - sent
            await peer.write(HEADER.pack(sent, number, remaining) + bytes(sent))
        left[number] = remaining
    while True:
        for number in left:
            left[number] -= 1
            await peer.write(HEADER.pack(1, number, left[number]) + b"\0")
        await asyncio.sleep(0.5)


async def eight_bits(peer: PlayedPeer, target: Target) -> None:
    """Send what becomes four times as large."""
    packed = in_format(target.floats(2.0), "blockwise8")
    for _ in range(3):
        await peer.send(Delivery(ticket=os.urandom(16), tensor=packed))
        await peer.send(target.largest(hidden=in_format(target.largest().hidden, "blockwise8")))
    await _read(peer)


async def masks(peer: PlayedPeer, target: Target) -> None:
    """Send the largest masks, and one with a byte that is no bool at its end."""
    size = int(0.9 * target.max_message_bytes)
    rows, positions = target.max_tokens // target.max_positions, target.max_positions
    await peer.send(target.largest(padding=torch.ones(rows, positions, dtype=torch.bool)))
    mask = Delivery(ticket=os.urandom(16), tensor=torch.ones(1, 1, size, dtype=torch.bool))
    await peer.send(mask)
    bad = b"\x06\x03" + (1).to_bytes(4, "big") * 2 + size.to_bytes(4, "big") + bytes(size - 1) + b"\2"
    ext = msgspec.msgpack.Ext(1, bad)
    await peer.send(msgspec.msgpack.encode({"kind": "delivery", "ticket": os.urandom(16), "tensor": ext}))
    await _read(peer)


async def large_steps(peer: PlayedPeer, target: Target) -> None:
    """Take short steps, then one of as many rows as fit."""
    small = await peer.ask(OpenSession(span=target.span, rows=1, max_length=8))
    large = await peer.ask(OpenSession(span=target.span, rows=target.max_tokens, max_length=2))
    for position in range(8):
        if isinstance(small, SessionOpened):
            hidden = torch.ones(1, 1, target.hidden)
            await peer.ask(Step(session=small.session, hidden=hidden, position=position))
    if isinstance(large, SessionOpened):
        hidden = torch.ones(target.max_tokens, 1, target.hidden)
        await peer.ask(Step(session=large.session, hidden=hidden, position=0))


async def many_small(peer: PlayedPeer, target: Target) -> None:
    """Send small messages as fast as they go."""
    for _ in range(20):
        for _ in range(100):
            await peer.send(Ping())
        await peer.send(Release(leases=list(range(MAX_LEASES))))
        await peer.send(Withdrawn(tickets=[os.urandom(16) for _ in range(MAX_TICKETS)]))
    await _read(peer)


async def abandoned(peer: PlayedPeer, target: Target) -> None:
    """Ask for work, and leave while it is done."""
    for _ in range(10):
        await peer.send(target.largest(keep=True))
    await peer.send(OpenSession(span=target.span, rows=8, max_length=target.max_positions))


async def garbage(peer: PlayedPeer, target: Target) -> None:
    """Send what is no message, in frames of any size."""
    for size in (0, 1, 1000, 10**6):
        await peer.send(os.urandom(size))
    await peer.write(os.urandom(1000))
    await _read(peer)


Attack = Callable[[PlayedPeer, Target], Awaitable[None]]
ATTACKS: tuple[Attack, ...] = (
    *(early_tensors, adapters_of_many_parts, replies_unread, half_requests, eight_bits),
    *(masks, large_steps, many_small, abandoned, garbage),
)


async def _read(peer: PlayedPeer) -> None:
    while True:
        await peer.read()


async def attack(transport: HivemindTransport, target: Target, until_s: float, chance: random.Random) -> Counter[str]:
    """Attack on STREAMS streams until `time.monotonic()` is `until_s`; returns how often each attack was made."""
    made: Counter[str] = Counter()

    async def on_one_stream() -> None:
        while time.monotonic() < until_s:
            one = chance.choice(ATTACKS)
            with suppress(PetalsTuneError, ProtocolError, TimeoutError):
                async with asyncio.timeout(2 * ATTACK_S):
                    peer = PlayedPeer(await transport.dial(target.peer, [target.address], PROTOCOL))
                try:
                    async with asyncio.timeout(ATTACK_S):
                        await peer.ask(Hello())
                        made[one.__name__] += 1
                        await one(peer, target)
                finally:
                    peer.connection.abort()
            await asyncio.sleep(0.05)

    await asyncio.gather(*(on_one_stream() for _ in range(STREAMS)))
    return made


# Honest clients


@dataclass
class Honest:
    """A client that generates and trains with the same inputs over and over, and compares answers with the first."""

    target: Target
    seed: int
    tokens: int = 0
    wrong: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    _expected: dict[str, torch.Tensor] = field(default_factory=dict)

    async def work(self, transport: HivemindTransport, until_s: float) -> None:
        """Work until `time.monotonic()` is `until_s`; whatever fails is begun again."""
        target, stream = self.target, None
        while time.monotonic() < until_s:
            try:
                if stream is None or not stream.alive:
                    stream = await ServerStream.open(
                        transport, target.peer, [target.address], model=None, timeout_s=REPLY_S
                    )
                await self._generate(stream, until_s)
                await self._train(stream)
            except ServerError as error:
                self.failed[f"{type(error).__name__} {getattr(error, 'limit', '')}".strip()] += 1
                await asyncio.sleep(0.1)
        if stream is not None:
            await stream.close()

    async def _generate(self, stream: ServerStream, until_s: float, length: int = 32) -> None:
        """A text of 16 positions, and single ones after it."""
        opened = await self._call(stream, OpenSession(span=self.target.span, rows=1, max_length=length))
        assert isinstance(opened, SessionOpened)
        position = 0
        for name in ["text", *map(str, range(16, length))]:
            hidden = self._input(name, 1, 16 if name == "text" else 1)
            reply = await self._call(stream, Step(session=opened.session, hidden=hidden, position=position))
            assert isinstance(reply, Stepped)
            self._check(name, reply.hidden, exact=name == "text")
            position += hidden.shape[1]
            if time.monotonic() > until_s:
                return

    async def _train(self, stream: ServerStream) -> None:
        """A forward and its backward."""
        hidden = self._input("train", 2, 32)
        reply = await self._call(stream, Forward(span=self.target.span, hidden=hidden, keep=True))
        assert isinstance(reply, Forwarded)
        self._check("output", reply.hidden)
        again = Forward(span=self.target.span, hidden=hidden) if reply.lease is None else None
        gradients = await self._call(stream, Backward(grad=hidden, lease=reply.lease, again=again))
        assert isinstance(gradients, Gradients)
        assert gradients.hidden is not None
        self._check("gradient", gradients.hidden)

    async def _call(self, stream: ServerStream, request: Message) -> Message:
        return await stream.call(request, timeout_s=REPLY_S, most_bytes=2**24)

    def _input(self, name: str, rows: int, positions: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + sum(name.encode()))
        return torch.randn(rows, positions, self.target.hidden, generator=generator)

    def _check(self, name: str, found: torch.Tensor, *, exact: bool = True) -> None:
        expected = self._expected.setdefault(name, found)
        same = torch.equal(found, expected) if exact else relative_error(found, expected) < CLOSE_TO
        self.wrong += not same
        self.tokens += found.shape[0] * found.shape[1]


async def start_daemons(count: int, target: Target) -> Sequence[HivemindTransport]:
    """Daemons of so many clients, each with an identity of its own."""
    return [await HivemindTransport.start([target.address], listens=False) for _ in range(count)]

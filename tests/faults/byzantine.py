"""A server that answers one kind of message wrongly, each time, and what a client does there: training and generation.

What it does wrong happens on its end of the connection: its own code, and the client's, are as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import torch

from petals_tune.errors import ConnectionLost
from petals_tune.remote import function
from petals_tune.swarm import loop
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.history import Inputs
from petals_tune.swarm.routes.round_trips import HandOverRule
from petals_tune.swarm.session import ChainSession
from petals_tune.swarm.sums import AdapterSums
from petals_tune.swarm.trace import CallContext, stages_of
from petals_tune.wire.codec import decode, encode
from petals_tune.wire.frames import HEADER, Assembler, cut, read_header
from petals_tune.wire.messages import (
    _REFUSALS,
    ChainedReply,
    CollectedSum,
    Done,
    Gradients,
    Message,
    Ping,
    Pong,
    Refusal,
    SessionOpened,
    Welcome,
)
from tests.faults.network import Network, StoppableConnection, id_of
from tests.faults.step import REPLY_S, ROWS, WHOLE, WIDTH, TrainingStep, adapter

LATE_S = 2 * REPLY_S
BAD = "bad"


# Misdeeds: what is written in place of a reply, under its id


@dataclass
class Turn:
    """One message that the bad server should answer, or none: a notification."""

    message_id: int
    reply: Message | None
    write: Callable[[int, bytes], Awaitable[None]]
    connection: Any

    async def send(self, message: Message | bytes, message_id: int | None = None) -> None:
        body = message if isinstance(message, bytes) else encode(message)
        await self.write(self.message_id if message_id is None else message_id, body)


Misdeed = Callable[[Turn], Awaitable[None]]


async def _instead(change: Callable[[Message], Message | bytes], turn: Turn) -> None:
    await turn.send(change(turn.reply or Done()))


async def _late(turn: Turn) -> None:
    await asyncio.sleep(LATE_S)
    if turn.reply is not None:
        await turn.send(turn.reply)


async def _never(turn: Turn) -> None:
    pass


async def _under_another_id(turn: Turn) -> None:
    await turn.send(turn.reply or Done(), turn.message_id + 1_000_000)


async def _twice(turn: Turn) -> None:
    for _ in range(2):
        await turn.send(turn.reply or Done())


async def _hundred_more(turn: Turn) -> None:
    for number in range(100):
        await turn.send(turn.reply or Done(), turn.message_id + 1_000_000 + number)


async def _hang_up(turn: Turn) -> None:
    turn.connection.abort()


async def _half(turn: Turn) -> None:
    """A frame that says that two gigabytes follow."""
    await turn.connection.write(HEADER.pack(3, turn.message_id, 2**31), b"abc")


def _other_kind(reply: Message) -> Message:
    return Pong() if isinstance(reply, Done) else Done()


def _absurd(reply: Message) -> Message:
    """The same reply with numbers and tensors that cannot be right."""
    match reply:
        case Welcome():
            numbers = {"max_in_flight": 2**62, "max_message_bytes": 1, "max_positions": 1, "max_tokens": 1}
            return msgspec.structs.replace(reply, **numbers)
        case SessionOpened():
            return SessionOpened(session=-(2**62))
        case CollectedSum():
            return CollectedSum(adapter=[each[:1] for each in reply.adapter], terms=reply.terms)
        case ChainedReply():
            inner: Any = _absurd(reply.reply)
            return ChainedReply(reply=inner, handed_on=reply.handed_on)
        case Gradients():
            return Gradients(hidden=reply.hidden, adapter=[*reply.adapter, torch.zeros(1)])
    if (hidden := getattr(reply, "hidden", None)) is not None:
        return msgspec.structs.replace(reply, hidden=hidden[:, :, 1:])
    return reply


def _not_finite(reply: Message) -> Message:
    if isinstance(reply, ChainedReply):
        inner: Any = _not_finite(reply.reply)
        return ChainedReply(reply=inner, handed_on=reply.handed_on)
    if (hidden := getattr(reply, "hidden", None)) is not None:
        return msgspec.structs.replace(reply, hidden=hidden * torch.nan)
    return reply


def _says_handed_on(reply: Message) -> Message:
    """Nothing was handed on to anybody: the network keeps the two apart."""
    return msgspec.structs.replace(reply, handed_on=True) if isinstance(reply, ChainedReply) else reply


def _refusing(name: str, **fields: Any) -> Misdeed:
    return partial(_instead, lambda _: Refusal(error=name, text="because", fields=fields))


# A client takes any other name for that of a ServerError (tests/wire/test_messages.py).
MISDEEDS: dict[str, Misdeed] = {name: _refusing(name) for name in sorted(_REFUSALS)}
MISDEEDS |= {
    "an unknown error": _refusing("SystemExit"),
    "a limit": _refusing("RequestRefused", limit="max_tokens", fits=1),
    "a limit without a number": _refusing("RequestRefused", limit="max_compute_gb"),
    "a limit that is absurd": _refusing("RequestRefused", limit="max_tokens", fits=-(2**62), max_length=-1),
    "busy, and leaving": _refusing("ServerBusy", leaving=True, max_length=-1),
    "another kind of reply": partial(_instead, _other_kind),
    "garbage": partial(_instead, lambda _: b"\xc1" * 100),
    "absurd numbers": partial(_instead, _absurd),
    "not finite": partial(_instead, _not_finite),
    "larger than due": partial(_instead, lambda _: bytes(2**21)),
    "handed on, it says": partial(_instead, _says_handed_on),
    "late": _late,
    "never": _never,
    "under another id": _under_another_id,
    "twice": _twice,
    "a hundred that nobody asked for": _hundred_more,
    "hung up": _hang_up,
    "half": _half,
}


@dataclass
class Plan:
    """What the bad server does wrong, and where."""

    kind: type[Message]
    misdeed: Misdeed
    fired: int = 0
    seen: set[type[Message]] = field(default_factory=set)  # kinds of messages that the client sent


class BadConnection(StoppableConnection):
    """The bad server's end of a connection to the client."""

    plan: Plan

    def __init__(self, plan: Plan, running: asyncio.Event, peer: str, *streams: Any):
        super().__init__(running, peer, *streams)
        self.plan = plan
        sizes = {"max_message_bytes": 2**30, "max_open_bytes": 2**30}
        self._asked, self._answers = Assembler(**sizes), Assembler(**sizes)
        self._header: tuple[int, int, int] | None = None
        self._wrong: set[int] = set()  # ids of the messages that are answered wrongly
        self._tasks: set[asyncio.Task[None]] = set()
        self._met = asyncio.Event()  # a Ping came: other replies wait for that where pings are what goes wrong

    async def read_exactly(self, count: int) -> bytes:
        data = await super().read_exactly(count)
        if self._header is None:
            self._header = read_header(data)
            if self._header[0]:
                return data
            data_in_frame = b""
        else:
            data_in_frame = data
        (_, message_id, remaining), self._header = self._header, None
        body = self._asked.feed(message_id, data_in_frame, remaining)
        if isinstance(body, bytes | bytearray):
            self._meet(message_id, decode(body))
        return data

    def _meet(self, message_id: int, message: Message) -> None:
        self.plan.seen.add(type(message))
        if isinstance(message, Ping):
            self._met.set()
        if isinstance(message, self.plan.kind):
            if type(message).__name__ in UNANSWERED:
                self._do_wrong(message_id, None)
            else:
                self._wrong.add(message_id)

    def _do_wrong(self, message_id: int, reply: Message | None) -> None:
        self.plan.fired += 1
        task = asyncio.create_task(self._act(Turn(message_id, reply, self._write_whole, self)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _act(self, turn: Turn) -> None:
        with suppress(ConnectionLost):  # the client has left
            await self.plan.misdeed(turn)

    async def write(self, *parts: bytes | memoryview) -> None:
        _, message_id, remaining = read_header(bytes(parts[0]))
        if self.plan.kind is Ping and not self.plan.fired and message_id not in self._wrong and message_id > 2:
            await asyncio.wait_for(self._met.wait(), LATE_S)
        if message_id not in self._wrong:
            await super().write(*parts)
            return
        body = self._answers.feed(message_id, bytes(parts[1]), remaining)
        if isinstance(body, bytes | bytearray):
            self._do_wrong(message_id, decode(body))

    async def _write_whole(self, message_id: int, body: bytes) -> None:
        for header, payload in cut(message_id, body):
            await super().write(header, payload)


# Message classes that a server does not answer.
UNANSWERED = {"Release", "CloseSession", "Delivery", "Withdrawn"}


class ByzantineNetwork(Network):
    """Blocks 0:3 at `a`; 3:6 at the bad server, which looks best, and at `b` where there is a second one."""

    def __init__(self, folder: Path, plan: Plan, *, hand_over: HandOverRule, has_second: bool):
        super().__init__(folder, hand_over)
        self.plan = plan
        self.serve("a", "0:3")
        self.serve(BAD, "3:6")
        if has_second:
            self.serve("b", "3:6")
        self.apart = {("a", BAD)} if hand_over == "always" else set()

    def make_end(self, owner: str, peer: str, *streams: Any) -> Any:
        if owner == id_of(BAD) and peer == "client":
            return BadConnection(self.plan, self.servers[BAD].running, peer, *streams)
        return super().make_end(owner, peer, *streams)


# Phases: what the client does. Each returns the numbers that came out.


def _prefer_bad(chain: Chain) -> None:
    chain.client.load.correction[id_of(BAD)] = 1e-9


async def _give_up(step: TrainingStep) -> None:
    context = CallContext(adapter=adapter())
    hops = await step.chain.client.route(WHOLE, work=1)
    stages = stages_of(hops, context, keep=False, input_grad=False)
    async with step.chain.calls.forwards(stages, step.hidden[: ROWS // 2], context):
        await asyncio.sleep(0.05)


def train(network: ByzantineNetwork, **policy: Any) -> list[torch.Tensor]:
    """A pass that is given up, a training step with LoRA in two micro-batches, and leases that are given back.

    Sums come with the last backward, or where nothing is handed on, are asked for, as after a fault.
    """
    step = TrainingStep(network, **policy)
    _prefer_bad(step.chain)
    loop.run(_give_up(step))
    asks = network.hand_over == "never"
    with patch.object(function, "AdapterSums", lambda count: AdapterSums()) if asks else nullcontext():
        step.run(after=lambda: loop.run(step.chain.release(step._traces)))
    return [step.output, step.hidden_grad, *step.adapter_grads]


def generate(network: ByzantineNetwork, **policy: Any) -> list[torch.Tensor]:
    """A prompt of three positions and then single ones, in a session with LoRA that is closed."""
    chain = network.chain(**{"reply_s": REPLY_S, **policy})
    _prefer_bad(chain)
    session = ChainSession(chain.calls, chain.repair, WHOLE, rows=1, max_length=16, adapter=adapter())
    drawn = torch.Generator().manual_seed(5)
    outputs, position = [], 0
    try:
        for length in (3, 1, 1, 1):
            inputs = Inputs(hidden=torch.randn(1, length, WIDTH, generator=drawn), padding=None, positions=None)
            outputs.append(loop.run(session.step(inputs, position=position, order=None)))
            position += length
        loop.run(session.close())
        loop.run(asyncio.sleep(0.01))  # what was closed arrives
    finally:
        network.disconnect_clients()
    return outputs


@dataclass(frozen=True)
class Phase:
    """What a client does, and how servers hand on meanwhile."""

    name: str
    run: Callable[..., list[torch.Tensor]]
    hand_over: HandOverRule


PHASES = [
    Phase("training", train, "never"),
    Phase("training, handed over", train, "always"),
    Phase("generation", generate, "never"),
    Phase("generation, handed over", generate, "always"),
]

"""Requests sent ahead to the servers of a chain, which hand their outputs on to each other.

The client still gets every output, off the critical path, so it can repair the chain from wherever it breaks.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from petals_tune.errors import AdapterMissing, NotHandedOn, ProtocolError, RequestRefused, ServerTimeout
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.route import Hop
from petals_tune.wire.messages import (
    TICKET_BYTES,
    Backward,
    Chained,
    ChainedReply,
    Delivery,
    Forward,
    HandOver,
    Message,
    Step,
    Withdrawn,
    carried,
    without_tensor,
)

HandOverRule = Literal["auto", "always", "never"]

FAR_S = 0.010  # servers whose round trip takes longer hand on by themselves: nearer ones are as fast through us
APART_S = 60.0  # two servers that could not reach each other are not asked to again for so long

AskAnything = Callable[[Hop, Message], Awaitable[Message]]
Ask = Callable[[Hop, Forward | Backward | Step], Awaitable[Message]]


class HandOverRules:
    """Which servers hand on to which. Lives as long as a chain of one client."""

    def __init__(self, client: SwarmClient, rule: HandOverRule):
        self._client, self._rule = client, rule
        self._apart_until_s: dict[tuple[str, str], float] = {}  # pairs of peers

    def applies(self, giver: Hop, taker: Hop) -> bool:
        """Whether the output of `giver` goes straight to `taker`."""
        pair = giver.server.peer, taker.server.peer
        if self._rule == "never" or self._apart_until_s.get(pair, 0.0) > time.monotonic():
            return False
        streams = [self._client.open_stream(hop.server) for hop in (giver, taker)]
        return self._rule == "always" or all(stream and stream.round_trip_s > FAR_S for stream in streams)

    def failed(self, giver: str, taker: str) -> None:
        """`giver` could not reach `taker`."""
        self._apart_until_s[giver, taker] = time.monotonic() + APART_S


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """A request at a server, for which its tensor is to come."""

    hop: Hop
    ticket: bytes
    reply: asyncio.Task[Message]


class Relay:
    """One way through a chain: requests sent ahead wait at their servers, each to be handed the output before its own.

    Used as a context: what still waits at its end is withdrawn.
    """

    def __init__(self, client: SwarmClient, rules: HandOverRules, ask: AskAnything):
        """`ask` asks a server and gives it what it needs before, such as an adapter."""
        self._client, self._rules, self._ask = client, rules, ask
        self._waiting: dict[int, _Waiting] = {}  # by the first block of the span
        self._goes: dict[int, HandOver] = {}  # where the output goes, by the first block of the span that makes it
        self._handed_on = False  # the output of the server asked last

    async def __aenter__(self) -> Relay:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for waiting in self._waiting.values():
            await self._withdraw(waiting)

    async def _withdraw(self, waiting: _Waiting) -> None:
        waiting.reply.cancel()
        if (stream := self._client.open_stream(waiting.hop.server)) is not None:
            await stream.notify(Withdrawn(tickets=[waiting.ticket]))

    def send_ahead(self, hops: Sequence[Hop], request: Callable[[int], Forward | Backward | Step]) -> None:
        """Send requests to all but the first of `hops`, in the order of the work, where their servers hand on.

        `request` makes the one of a hop, by its number; what its tensor holds does not matter.
        """
        tickets = [
            secrets.token_bytes(TICKET_BYTES) if self._rules.applies(giver, taker) else None
            for giver, taker in pairwise(hops)
        ]
        for ticket, (giver, taker) in zip(tickets, pairwise(hops), strict=True):
            if ticket is not None:
                self._goes[giver.span.start] = HandOver(peer=taker.server.peer, ticket=ticket)
        for number, ticket in enumerate(tickets, start=1):
            if ticket is None:
                continue
            giver, taker = hops[number - 1], hops[number]
            chained = Chained(
                request=without_tensor(request(number)),
                comes=HandOver(peer=giver.server.peer, ticket=ticket),
                goes=self._goes.get(taker.span.start),
            )
            reply = asyncio.ensure_future(self._ask(taker, chained))
            reply.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may never be awaited
            self._waiting[taker.span.start] = _Waiting(hop=taker, ticket=ticket, reply=reply)

    async def ask(self, hop: Hop, request: Forward | Backward | Step) -> Message:
        """The reply to `request`, now with its tensor, from whoever has it by now."""
        waiting = self._waiting.pop(hop.span.start, None)
        goes = self._goes.pop(hop.span.start, None)
        handed_on, self._handed_on = self._handed_on, False
        reply = None if waiting is None else await self._awaited(waiting, request, handed_on=handed_on)
        if reply is None:
            reply = await self._ask(hop, request if goes is None else Chained(request=request, goes=goes))
        if not isinstance(reply, ChainedReply):
            return reply
        self._handed_on = reply.handed_on
        if goes is not None and not reply.handed_on:
            self._rules.failed(hop.server.peer, goes.peer)
        return reply.reply

    async def _awaited(
        self, waiting: _Waiting, request: Forward | Backward | Step, *, handed_on: bool
    ) -> Message | None:
        """The reply to what was sent ahead; None where it has to be asked once more, with its tensor."""
        try:
            if not handed_on and not waiting.reply.done():
                stream = await self._client.stream(waiting.hop.server)
                await stream.notify(Delivery(ticket=waiting.ticket, tensor=carried(request)))
            done, _ = await asyncio.wait({waiting.reply}, timeout=self._client.policy.reply_s)
            if done:
                return waiting.reply.result()
        except (NotHandedOn, AdapterMissing, RequestRefused, ProtocolError):
            return None  # what was handed on may be what is wrong: with ours, it says so again
        finally:
            if not waiting.reply.done():
                await self._withdraw(waiting)
        error = ServerTimeout(f"server {waiting.hop.server.peer} has its input and does not answer (swarm.reply_s)")
        self._client.failed(waiting.hop.server, error)
        raise error

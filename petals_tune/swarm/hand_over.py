"""Which servers hand their outputs straight to the next one of a route, and what was sent ahead for that.

The client still gets every output, off the critical path, so it can repair the chain from wherever it breaks.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.routes.round_trips import FAR_S, HandOverRule
from petals_tune.swarm.routes.route import Hop
from petals_tune.wire.messages import TICKET_BYTES, HandOver, Message
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan

APART_S = 60.0  # two servers that could not reach each other are not asked to again for so long


class HandOverRules:
    """Which servers hand on to which. Lives as long as a client."""

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

    def tickets(self, hops: Sequence[Hop]) -> Iterator[tuple[Hop, Hop, bytes]]:
        """(giver, taker, a random ticket) for each two neighbours of which one hands on to the other."""
        for giver, taker in pairwise(hops):
            if self.applies(giver, taker):
                yield giver, taker, secrets.token_bytes(TICKET_BYTES)


@dataclass(frozen=True, kw_only=True)
class SentAhead:
    """A request that waits at its server for its tensor."""

    hop: Hop
    giver: ServerRecord  # hands the tensor on
    ticket: bytes
    reply: asyncio.Task[Message]


@dataclass
class Pass:
    """One pass along a route: requests that wait ahead, and where outputs go.

    By whole spans: where a lost server is replaced by several, the first of them has its first block, not its output.
    """

    goes: dict[BlockSpan, HandOver] = field(default_factory=dict)  # the output of this span
    waiting: dict[BlockSpan, SentAhead] = field(default_factory=dict)
    handed_on: bool = False  # the output of the server that answered last

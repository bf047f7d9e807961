"""How much each server takes at once: what it said when it was reached, and what it refused since. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from petals_tune.errors import RequestRefused, RequestTooLarge
from petals_tune.swarm.routes.table import Floats, Mask, ServerTable
from petals_tune.wire.span import BlockSpan

MAX_SERVERS = 10_000  # that are remembered
MOST_NAMED = 5  # in an error's text


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much a piece of work brings to each server of its route, in its largest request."""

    tokens: int = 1  # rows x positions
    positions: int = 1  # of a row
    message_bytes: int = 0  # of its tensors


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """The most that one server takes at once."""

    tokens: int
    positions: int
    message_bytes: int
    tokens_option: str = "max_tokens"  # the limit that `tokens` comes of

    def share(self, size: Size) -> float:
        """How much of a request fits, cut by tokens: 1 is all of it, 0 nothing, since a row has too many positions."""
        if size.positions > self.positions:
            return 0.0
        return min(1.0, self.tokens / size.tokens, self.message_bytes / max(size.message_bytes, 1))

    def exceeded(self, size: Size) -> str:
        """The limit that `size` exceeds most, as its option is called."""
        if size.positions > self.positions:
            return "max_positions"
        by_tokens, by_bytes = size.tokens / max(self.tokens, 1), size.message_bytes / max(self.message_bytes, 1)
        return self.tokens_option if by_tokens >= by_bytes else "max_message_mb"


LEAST = Size()
UNLIMITED = ServerLimits(tokens=2**62, positions=2**62, message_bytes=2**62)


@dataclass
class Limits:
    """The limits of the servers that were reached, by peer. One that was not is taken to have none."""

    of: dict[str, ServerLimits] = field(default_factory=dict)

    def said(self, peer: str, limits: ServerLimits) -> None:
        """Note what `peer` said when it was reached."""
        self.of.pop(peer, None)
        self.of[peer] = limits
        if len(self.of) > MAX_SERVERS:
            del self.of[next(iter(self.of))]

    def refused(self, peer: str, size: Size, said: RequestRefused) -> int:
        """Note that `peer` takes less than `size`, and return how many tokens. Without a number that fits: half."""
        old = self.of.get(peer, UNLIMITED)
        if said.limit == "max_positions":
            new = replace(old, positions=min(old.positions, size.positions - 1))
        else:
            named = said.fits is not None and 0 < said.fits < size.tokens
            tokens = said.fits if named and said.fits else size.tokens // 2
            new = old if tokens >= old.tokens else replace(old, tokens=tokens, tokens_option=said.limit or "max_tokens")
        self.said(peer, new)
        return new.tokens

    def smaller(self, table: ServerTable, size: Size) -> Mask:
        """Which servers of `table` take less than `size`."""
        return table.mask([peer for peer, limits in self.of.items() if limits.share(size) < 1])

    def too_large(self, table: ServerTable, usable: Mask, span: BlockSpan, size: Size) -> RequestTooLarge | None:
        """The error for work that the `usable` servers of `span` do not take at once; None where they do."""
        known = {table.places[peer]: limits for peer, limits in self.of.items() if peer in table.places}
        shares, positions = np.ones(len(table.servers)), np.full(len(table.servers), float(size.positions))
        for place, limits in known.items():
            shares[place], positions[place] = limits.share(size), min(limits.positions, size.positions)
        share = _largest(table, usable, span, shares)
        if share >= 1:
            return None
        if share > 0:
            least, fits = size.tokens, int(share * size.tokens)
            place = next(place for place, limits in known.items() if usable[place] and shares[place] == share)
            limit = known[place].exceeded(size)
            shorter = "fewer rows at once, swarm.micro_batch_rows, or shorter texts, data.max_tokens" + (
                "" if limit != "max_message_mb" else "; or swarm.wire_format=bfloat16 and swarm.grad_format=bfloat16"
            )
            what = f"{least} positions in all ({size.message_bytes / 2**20:.1f} MB)"
        else:
            least, fits = size.positions, int(_largest(table, usable, span, positions))
            limit, fits = ("max_positions", fits) if fits < least else ("max_tokens", 0)
            shorter = f"shorter texts: data.max_tokens={fits or 'N'}, less what a soft prompt adds"
            what = f"{least} positions a row"
        less = [table.servers[place].peer for place in known if usable[place] and shares[place] < 1]
        text = (
            f"{what} are more than the servers of blocks {span} take at once: {fits or 'not as many'} would fit (their "
            f"limits.{limit}; of servers {', '.join(less[:MOST_NAMED])})\n  {shorter}"
        )
        return RequestTooLarge(text, limit=limit, size=least, fits=fits)


def _largest(table: ServerTable, usable: Mask, span: BlockSpan, values: Floats) -> float:
    """The largest value that servers have, or exceed, which together hold all blocks of `span`; 0: there is none."""
    for value in sorted({float(each) for each in values[usable]}, reverse=True):
        if table.covers(usable & (values >= value), span):
            return value
    return 0.0

"""A route through the swarm. Pure: a table of servers, what they cost and who may be used go in, a chain comes out."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np

from petals_tune.errors import UncoveredBlocks
from petals_tune.swarm.routes.table import Floats, Handing, Mask, ServerTable
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan, gaps

HOP_COST_BLOCKS = 0.5  # one more server in a chain costs about as much as half a block
MOST_NAMED = 50  # servers in an error's text
FEW_PAIRS = 8  # for so many, one by one is faster than as arrays


@dataclass(frozen=True)
class Hop:
    """One server's part of a route."""

    server: ServerRecord
    span: BlockSpan


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What each server of a table costs: `fixed_s + per_block_s * blocks`, in seconds; inf: not to be used."""

    per_block_s: Floats
    fixed_s: Floats
    handing: Handing | None = None  # pairs of servers that cost less than both of them


def plan_route(table: ServerTable, wanted: BlockSpan, costs: Costs, *, usable: Mask) -> tuple[Hop, ...]:
    """The cheapest chain of `usable` servers that covers `wanted`.

    A shortest path over the cuts of the table, for all servers at once: at each cut, a server goes on with what led to
    it, or takes over from the cheapest chain so far. Of equal chains, the one whose servers come first in the table.
    Raises UncoveredBlocks naming every gap.
    """
    first, last = bisect_right(table.cuts, wanted.start) - 1, bisect_left(table.cuts, wanted.stop)
    if first < 0 or last >= len(table.cuts):
        raise _uncovered(table, wanted, usable)
    bounds = [wanted.start, *table.cuts[first + 1 : last], wanted.stop]
    slots = table.slots[first:last]
    per_block = np.append(np.where(usable, costs.per_block_s, np.inf), np.inf)  # the last one: of an empty slot
    fixed = np.append(costs.fixed_s, 0.0) + HOP_COST_BLOCKS * per_block
    running = per_block.take(slots)  # (intervals, columns): seconds from cut to cut
    np.multiply(running, np.diff(bounds)[:, None], out=running)
    entering = fixed.take(slots)  # to take over at a cut
    spent = np.empty((len(slots) + 1, slots.shape[1]))  # by the cheapest chain that ends with the server of a column
    spent[0] = np.inf
    cheapest, best, ends = 0.0, [0.0], [0]  # the cheapest chain up to a cut, and the column of its last server
    handing = None if costs.handing is None else _HandingOn(costs.handing, fixed, first, last)
    add, minimum = np.add, np.minimum
    for before, now, entry, run in zip(spent, spent[1:], entering, running, strict=False):
        add(entry, cheapest, out=entry)
        if handing is not None:
            handing.enter(len(best) - 1, before, entry)
        minimum(before, entry, out=now)
        add(now, run, out=now)
        column = now.argmin()
        cheapest = now.item(column)
        ends.append(column)
        best.append(cheapest)
    if cheapest == np.inf:
        raise _uncovered(table, wanted, usable)

    hops: list[Hop] = []
    stop, place = len(slots), slots.item(len(slots) - 1, ends[-1])
    while True:  # from the last server back to where it took over
        cuts, rate = range(max(table.first[place] - first, 0), stop), per_block.item(place)
        prices = [best[cut] - rate * bounds[cut] for cut in cuts]
        price = min(prices)
        start = cuts[prices.index(price)]
        giver = slots.item(start - 1, ends[start]) if start else None
        if handing is not None:
            start, giver = handing.origin(place, cuts, (start, giver), price, rate * np.array(bounds), spent)
        hops.append(Hop(table.servers[place], BlockSpan(bounds[start], bounds[stop])))
        if giver is None:
            return tuple(reversed(hops))
        stop, place = start, giver


class _HandingOn:
    """The pairs of a table within one plan. Cuts are counted from the first of the plan."""

    def __init__(self, pairs: Handing, fixed: Floats, first: int, last: int):
        self._pairs, self._first = pairs, first
        self._entering_s = fixed[pairs.taker] - pairs.saved_s
        self._begins: list[int] = np.searchsorted(pairs.cut, np.arange(first, last + 1)).tolist()

    def enter(self, cut: int, spent: Floats, entry: Floats) -> None:
        """Lower the prices of `entry` where a server takes over from one that it goes well with."""
        begin, end = self._begins[cut], self._begins[cut + 1]
        givers, takers = self._pairs.giver_column[begin:end], self._pairs.taker_column[begin:end]
        if end - begin > FEW_PAIRS:
            prices = spent.take(givers)
            np.add(prices, self._entering_s[begin:end], out=prices)
            np.minimum.at(entry, takers, prices)
            return
        for number in range(end - begin):
            price = spent.item(givers.item(number)) + self._entering_s.item(begin + number)
            if price < entry.item(takers.item(number)):
                entry[takers.item(number)] = price

    def origin(
        self,
        place: int,
        cuts: range,
        otherwise: tuple[int, int | None],
        price: float,
        running_s: Floats,
        spent: Floats,
    ) -> tuple[int, int | None]:
        """(cut, server) from which the server at `place` took over; `otherwise` where that has the lower `price`."""
        pairs = self._pairs
        begin, end = self._begins[cuts.start], self._begins[cuts.stop]
        ours = begin + np.flatnonzero(pairs.taker[begin:end] == place)
        if not len(ours):
            return otherwise
        at = pairs.cut[ours] - self._first
        prices = spent[at, pairs.giver_column[ours]] - pairs.saved_s[ours] - running_s[at]
        least = int(prices.argmin())
        return (int(at[least]), int(pairs.giver[ours[least]])) if prices[least] < price else otherwise


def _uncovered(table: ServerTable, wanted: BlockSpan, usable: Mask) -> UncoveredBlocks:
    used = [server.blocks for server, use in zip(table.servers, usable, strict=True) if use]
    missing = gaps(used, wanted)

    def describe(server: ServerRecord, use: bool) -> str:
        return f"{server.blocks}{'' if use else f' ({server.peer} failed lately)'}"

    seen = ", ".join(map(describe, table.servers[:MOST_NAMED], usable)) or "none"
    if len(table.servers) > MOST_NAMED:
        seen += f" and {len(table.servers) - MOST_NAMED} more"
    return UncoveredBlocks(
        f"no server holds blocks {', '.join(map(str, missing))}; servers seen: {seen}",
        missing=tuple(missing),
        seen=tuple(server.peer for server in table.servers),
    )

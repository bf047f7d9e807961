"""Planners that try everything: what the one that is used is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from petals_tune.swarm.routes.route import HOP_COST_BLOCKS, Costs, Hop
from petals_tune.swarm.routes.table import ServerTable
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan

Cost = Callable[[ServerRecord, float], float]  # of so many blocks there
Chain = list[tuple[ServerRecord, BlockSpan]]


def costs_of(table: ServerTable, cost: Cost) -> Costs:
    """The costs of a table's servers, where `cost` is a line in the number of blocks."""
    fixed = np.array([cost(server, 0) for server in table.servers])
    return Costs(per_block_s=np.array([cost(server, 1) for server in table.servers]) - fixed, fixed_s=fixed)


def plan_at_all_cuts(servers: Sequence[ServerRecord], wanted: BlockSpan, cost: Cost) -> tuple[Hop, ...] | None:
    """The cheapest chain, by trying each server from each block where some server's blocks begin or end to each other.

    None where there is no chain. Of equal chains, the one with the first peer ids.
    """
    cuts = sorted({wanted.start, wanted.stop, *(b for s in servers for b in (s.blocks.start, s.blocks.stop))})
    cuts = [cut for cut in cuts if wanted.start <= cut <= wanted.stop]
    best: dict[int, tuple[float, tuple[str, ...], tuple[Hop, ...]]] = {wanted.start: (0.0, (), ())}
    for start in cuts:
        if start not in best:
            continue
        spent, peers, hops = best[start]
        for server in servers:
            if start not in server.blocks:
                continue
            for stop in (cut for cut in cuts if start < cut <= server.blocks.stop):
                total = spent + cost(server, stop - start + HOP_COST_BLOCKS)
                candidate = (total, (*peers, server.peer), (*hops, Hop(server, BlockSpan(start, stop))))
                if stop not in best or candidate[:2] < best[stop][:2]:
                    best[stop] = candidate
    return best[wanted.stop][2] if wanted.stop in best else None


def every_chain(servers: Sequence[ServerRecord], start: int, stop: int) -> Iterator[Chain]:
    """All chains for blocks `start` to `stop`, changing servers at any block."""
    if start == stop:
        yield []
    for each in servers:
        for end in range(start + 1, stop + 1):
            if each.blocks.covers(BlockSpan(start, end)):
                yield from ([(each, BlockSpan(start, end)), *rest] for rest in every_chain(servers, end, stop))

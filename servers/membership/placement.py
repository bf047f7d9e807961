"""Placement rule: which blocks to host. A snapshot of the swarm goes in, a span comes out; no clock, no I/O.

A block's throughput is the sum over its servers, in tokens/s; a swarm is as fast as its slowest block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan


def block_throughputs(
    servers: Sequence[ServerRecord], total_blocks: int, stands_for: Mapping[str, float] | None = None
) -> np.ndarray:
    """Return tokens/s of each block (L,). `stands_for`: how many servers each one of a sample is, by peer."""
    rates = np.zeros(total_blocks)
    for server in servers:
        count = (stands_for or {}).get(server.peer, 1.0)
        rates[server.blocks.start : server.blocks.stop] += count * server.throughput.of_span(len(server.blocks))
    return rates


def block_replicas(servers: Sequence[ServerRecord], total_blocks: int) -> np.ndarray:
    """Return how many of `servers` hold each block (L,)."""
    counts = np.zeros(total_blocks, dtype=int)
    for server in servers:
        counts[server.blocks.start : server.blocks.stop] += 1
    return counts


def best_span(others: np.ndarray, length: int, *, otherwise: BlockSpan | None = None) -> BlockSpan:
    """Return the `length` blocks that need one more server most: by the slowest one, then the next slowest, and so on.

    `others` are the throughputs (L,) without this server. Of equal spans, it is `otherwise` or else the first.
    Source: Petals' rule for a server that joins (Borzunov et al. 2023, arXiv:2312.08361, appendix D).
    """
    length = min(length, len(others))
    windows = np.sort(sliding_window_view(others, length), axis=1)
    start = int(np.lexsort(windows.T[::-1])[0])
    if otherwise is not None and np.array_equal(windows[otherwise.start], windows[start]):
        return otherwise
    return BlockSpan(start, start + length)


def better_span(
    others: np.ndarray, replicas: np.ndarray, here: BlockSpan, rate: float, *, balance_quality: float
) -> BlockSpan | None:
    """Return where a server of `rate` tokens/s that holds `here` should move to; None where it should stay.

    `others` are the throughputs (L,) without this server, `replicas` how many others are online for each block (L,);
    servers that still load do not count. The slowest of the blocks that the server would leave or take up is compared
    before and after: a move is worth the reload where it was below `balance_quality` of what it would be. Every move
    improves the sorted throughputs, so servers that move one after the other come to rest. A block that is left keeps
    at least one server, and two where the move closes no gap: one of them may end while this one loads.
    """
    there = best_span(others, len(here))
    left, taken = _outside(here, there), _outside(there, here)
    if not len(left) or replicas[left].min() < (1 if others[taken].min() == 0 else 2):
        return None
    before = min(others[left].min() + rate, others[taken].min())
    after = min(others[left].min(), others[taken].min() + rate)
    return there if before < balance_quality * after else None


def _outside(span: BlockSpan, other: BlockSpan) -> np.ndarray:
    """Return the indices of the blocks of `span` that are not in `other`."""
    blocks = np.arange(span.start, span.stop)
    return blocks[(blocks < other.start) | (blocks >= other.stop)]

"""A route through the swarm. Pure: a snapshot, who is banned and what a server costs go in, a chain comes out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from shlex import quote

from petals_tune.errors import UncoveredBlocks
from petals_tune.wire.records import ServerRecord, same_model
from petals_tune.wire.span import BlockSpan, gaps

HOP_COST_BLOCKS = 0.5  # one more server in a chain costs about as much as half a block


@dataclass(frozen=True)
class Hop:
    """One server's part of a route."""

    server: ServerRecord
    span: BlockSpan


def plan_route(
    servers: Sequence[ServerRecord],
    wanted: BlockSpan,
    *,
    model: str,
    banned: Collection[str] = (),
    cost: Callable[[ServerRecord, float], float] = lambda server, blocks: blocks,
) -> tuple[Hop, ...]:
    """The cheapest chain of servers that covers `wanted`.

    `cost(server, blocks)` is the price of running that many blocks there, queue included. Equal routes are told apart
    by peer id: the result is deterministic. Raises UncoveredBlocks naming every gap.
    """
    ours = [server for server in servers if same_model(server.model, model)]
    usable = [server for server in ours if server.peer not in banned]
    missing = gaps([server.blocks for server in usable], wanted)
    if missing:
        raise UncoveredBlocks(
            _uncovered_text(missing, ours, banned), missing=tuple(missing), seen=tuple(server.peer for server in ours)
        )
    cuts = sorted({wanted.start, wanted.stop, *(b for s in usable for b in (s.blocks.start, s.blocks.stop))})
    cuts = [cut for cut in cuts if wanted.start <= cut <= wanted.stop]
    best: dict[int, tuple[float, tuple[str, ...], tuple[Hop, ...]]] = {wanted.start: (0.0, (), ())}
    for start in cuts:
        if start not in best:
            continue
        spent, peers, hops = best[start]
        for server in usable:
            if start not in server.blocks:
                continue
            for stop in (cut for cut in cuts if start < cut <= server.blocks.stop):
                total = spent + cost(server, stop - start + HOP_COST_BLOCKS)
                candidate = (total, (*peers, server.peer), (*hops, Hop(server, BlockSpan(start, stop))))
                if stop not in best or candidate[:2] < best[stop][:2]:
                    best[stop] = candidate
    return best[wanted.stop][2]


def _uncovered_text(missing: Sequence[BlockSpan], servers: Sequence[ServerRecord], banned: Collection[str]) -> str:
    def describe(server: ServerRecord) -> str:
        return f"{server.blocks}{' (failed lately)' if server.peer in banned else ''}"

    seen = ", ".join(describe(server) for server in servers) or "none"
    address = next((server.addresses[0] for server in servers if server.addresses), "ADDRESS")
    # What some server wrote is quoted: it shall be safe to copy into a shell.
    model = quote(f"model.source={servers[0].model_name if servers else 'MODEL'}")
    peers = quote(f"swarm.initial_peers=[{address}]")
    commands = "\n".join(f"  start one:  python -m servers {model} blocks={span} {peers}" for span in missing)
    return f"no server holds blocks {', '.join(map(str, missing))}; servers seen: {seen}\n{commands}"

"""A client's entry into a swarm: it is in once every block that it needs has a server."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from functools import partial

from petals_tune.errors import SwarmMismatch, UncoveredBlocks
from petals_tune.net.members import Members
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.repair import Repair
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.wire.records import mismatch_text
from petals_tune.wire.span import BlockSpan

JOIN_S = 5.0  # how long servers of all blocks are looked for before the missing blocks are reported


async def join_swarm(
    initial_peers: Sequence[str],
    *,
    model: str,
    source: str,
    blocks: Sequence[BlockSpan],
    policy: RetryPolicy,
    quantizations: Collection[str] | None = None,
    members: Members | None = None,
    direct: bool = True,
) -> SwarmClient:
    """Join the swarm, a private one as one of its `members`, and wait until all of `blocks` have a server.

    `model` is a digest, `source` how users name it. `blocks` are spans in their order: those that the client does not
    run itself. Servers that hold them in none of `quantizations` are passed over; None: all are used. `direct`: over
    direct connections where servers can be dialled.

    Raises ConfigError, ServerUnreachable, ClockSkew, AccessDenied, SwarmMismatch, or UncoveredBlocks after a few
    seconds of looking.
    """
    read = BlockSpan(blocks[0].start, blocks[-1].stop)
    client = await SwarmClient.join(
        initial_peers,
        model=model,
        source=source,
        blocks=read,
        policy=policy,
        quantizations=quantizations,
        members=members,
        direct=direct,
    )
    looking = Repair(client, RetryPolicy(timeout_s=JOIN_S, longest_pause_s=0.5))
    try:
        attempts = looking.attempts()
        for span in blocks:
            await looking.until_done(partial(client.route, span, work=1), attempts)
    except UncoveredBlocks:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(client.close)
            if not client.servers and not client.passed_over and (others := await client.models()):
                raise SwarmMismatch(
                    f"{mismatch_text(others, model, whose='your model')}\n"
                    f"  load a model that the network has, or host yours:  {client.command_to_host(blocks)}",
                    wanted=model,
                    found=tuple(dict.fromkeys(server.model for server in others)),
                ) from None
            raise
    except BaseException:
        await client.close()
        raise
    return client

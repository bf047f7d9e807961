"""The network of real_nodes.py, simulated: every process of it, with the same servers and readers."""

from __future__ import annotations

import asyncio
import random
import statistics

from petals_tune.wire.span import BlockSpan
from tests.benchmarks.simulation.actors import Actor
from tests.benchmarks.simulation.clock import run_virtual
from tests.benchmarks.simulation.real_nodes import (
    BLOCKS,
    CLIENTS,
    LASTS_S,
    MODELS,
    NODES,
    REFRESH_S,
    WARM_S,
    WATCHED_S,
    Traffic,
    blocks_of,
)
from tests.benchmarks.simulation.traffic import announcement_bytes, digest_of, typical_record
from tests.benchmarks.simulation.world import Upkeep, World


def simulate_small(
    *, nodes: int = NODES, clients: int = CLIENTS, warm_s: float = WARM_S, watched_s: float = WATCHED_S, seed: int = 0
) -> Traffic:
    """What the processes of the real network would send and receive by the simulation."""
    return run_virtual(_simulate(nodes, clients, warm_s, watched_s, seed))  # type: ignore[no-any-return]


async def _simulate(nodes: int, clients: int, warm_s: float, watched_s: float, seed: int) -> Traffic:
    chance = random.Random(seed)
    world = World(0, upkeep=Upkeep(0, 0), chance=chance)
    record_bytes, actors, work = announcement_bytes(), [], []
    for number in range(nodes + clients):
        first = [actors[0].peer] if actors else []
        actor = Actor(world, first, is_client=number >= nodes, record_bytes=record_bytes, chance=chance)
        if first:
            await actor.join()
        work.append(asyncio.create_task(actor.stay_known()))
        work.append(
            asyncio.create_task(_serve(actor, number) if number < nodes else _read(actor, number - nodes, chance))
        )
        actors.append(actor)
    await asyncio.sleep(warm_s)
    for actor in actors:
        actor.count_anew()
    await asyncio.sleep(watched_s)
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    counted = [actor.protocol.counted for actor in actors]
    answered = [sum(each.bytes for each in counted) / nodes, sum(each.messages for each in counted) / nodes]
    kinds = sum((actor.protocol.load.requests for actor in actors), type(actors[0].protocol.load.requests)())
    by_kind: dict[str, float] = {}
    for (kind, _), number in kinds.items():
        by_kind[kind] = by_kind.get(kind, 0.0) + number / watched_s
    return Traffic(
        server_bytes_per_s=(statistics.mean(each.bytes for each in counted[:nodes]) + answered[0]) / watched_s,
        server_messages_per_s=(statistics.mean(each.messages for each in counted[:nodes]) + answered[1]) / watched_s,
        client_bytes_per_s=statistics.mean(each.bytes for each in counted[nodes:]) / watched_s,
        client_messages_per_s=statistics.mean(each.messages for each in counted[nodes:]) / watched_s,
        by_kind=by_kind,
    )


async def _serve(actor: Actor, number: int) -> None:
    record = typical_record(actor.identity.peer, digest_of(number % MODELS), blocks_of(number), BLOCKS)
    while True:
        await actor.directory.announce(record, lasts_s=LASTS_S)
        await asyncio.sleep(LASTS_S / 3)


async def _read(actor: Actor, number: int, chance: random.Random) -> None:
    await asyncio.sleep(chance.uniform(0, REFRESH_S))
    thorough = True
    while True:
        await actor.directory.snapshot(digest_of(number % MODELS), BlockSpan(0, BLOCKS), thorough=thorough)
        thorough = False
        await asyncio.sleep(REFRESH_S)

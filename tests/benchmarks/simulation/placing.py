"""Placement by what a joining server sees: a sample of a large network, read by the real `Reader`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from hivemind.dht.routing import DHTID

from petals_tune.net.dht.reader import Reader
from servers.membership.placement import best_span, block_throughputs
from tests.benchmarks.simulation.clock import EPOCH_S, run_virtual
from tests.benchmarks.simulation.population import Model, Population, draw_size, new_peer
from tests.benchmarks.simulation.traffic import typical_record
from tests.benchmarks.simulation.world import Upkeep, World, renewed

BLOCKS = 70


class _SeesAll:
    """In place of a node: it finds what is stored without asking others."""

    def __init__(self, world: World):
        self._world = world

    async def find(
        self, keys: Collection[DHTID], *, enough: int | None, timeout_s: float, whole: bool = False
    ) -> dict[DHTID, Any]:
        now_s = EPOCH_S + asyncio.get_running_loop().time()
        found = {}
        for key in keys:
            store = self._world.stores.get(key.to_bytes())
            records = [] if store is None else store.get(key.to_bytes(), now_s)
            by_peer = {each.peer: renewed(each, now_s) for each in records}
            found[key] = SimpleNamespace(answered={1}, found=by_peer, held=len(by_peer))
        return found

    async def read_at(self, peers: Collection[str], keys: Collection[DHTID]) -> dict[DHTID, list[Any]]:
        return {}


@dataclass(frozen=True)
class Placed:
    """How well servers spread that chose their blocks by a sample, or by all there was."""

    servers: int
    worst_over_optimum: float
    seen: float  # servers that a joining one saw, on average
    with_all_seen: float  # worst over optimum where each saw all others


def place_by_samples(servers: int, seed: int = 0) -> Placed:
    """Let servers of one model join one after the other; then the slowest block against the optimum.

    The optimum is a bound: all throughput spread evenly over all blocks.
    """
    return run_virtual(_place(servers, seed))  # type: ignore[no-any-return]


async def _place(servers: int, seed: int) -> Placed:
    chance = random.Random(seed)
    world = World(0, upkeep=Upkeep(0, 0), chance=chance)
    model = Model(number=0, blocks=BLOCKS, servers=servers, clients=0)
    population = Population(world, [model], chance)
    all_seen, power, seen = np.zeros(BLOCKS), 0.0, 0
    for _ in range(servers):
        length, batch = draw_size(chance, BLOCKS)
        snapshot = await Reader(_SeesAll(world), (), chance).snapshot(model.digest, model.span)  # type: ignore[arg-type]
        seen += len(snapshot.servers)
        span = best_span(block_throughputs(snapshot.servers, BLOCKS, snapshot.stands_for), length)
        record = typical_record(new_peer(chance), model.digest, span, BLOCKS, batch)
        population.add(model, record, 0.0)
        rate = record.throughput.of_span(length)
        power += rate * length
        better = best_span(all_seen, length)
        all_seen[better.start : better.stop] += rate
    optimum = power / BLOCKS
    return Placed(servers, float(model.throughputs.min() / optimum), seen / servers, float(all_seen.min() / optimum))

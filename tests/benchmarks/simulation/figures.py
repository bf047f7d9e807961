"""The figures of a simulated network."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np

from petals_tune.swarm.routes.known import REFRESH_S
from tests.benchmarks.simulation.load import node_loads, reading_counts
from tests.benchmarks.simulation.population import Model, Place
from tests.benchmarks.simulation.simulate import Group, Watched
from tests.benchmarks.simulation.world import LIFE_S


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the table shows of one network. Bytes and messages are those sent and received, a second."""

    servers: int
    models: int
    client_bytes: float
    client_messages: float
    first_reading_bytes: float  # of a client, in all, joining the DHT included
    first_reading_s: float  # 95th percentile
    median_bytes: float
    busiest_bytes: float
    median_messages: float
    busiest_messages: float
    newcomer_s: float  # median
    newcomer_slow_s: float  # 95th percentile
    readings: int
    readings_anew: int
    failed_readings: int
    lost_searches: float  # share of the searches that found nothing, though there was something
    known: float  # servers that a client knows
    elapsed_s: float

    @property
    def busiest_over_median(self) -> float:
        return self.busiest_bytes / self.median_bytes


def figures_of(watched: Watched, seed: int = 0) -> Figures:
    """Compute the figures of one network."""
    chance = random.Random(seed)
    loads = node_loads(watched, chance)
    per_client = bytes_per_s(watched.clients) + first_bytes(watched.first_readings) / LIFE_S
    waits = newcomer_waits(watched, chance)
    searches = [group.load() for group in (watched.clients, watched.first_readings, watched.servers, watched.joins)]
    return Figures(
        servers=sum(model.servers for model in watched.models),
        models=len(watched.models),
        client_bytes=per_client,
        client_messages=sum(each.messages for each in watched.clients.counted) / watched.clients.seconds,
        first_reading_bytes=first_bytes(watched.first_readings),
        first_reading_s=float(np.quantile(watched.first_reading_s, 0.95)),
        median_bytes=float(np.median(loads.bytes)),
        busiest_bytes=float(loads.bytes.max()),
        median_messages=float(np.median(loads.messages)),
        busiest_messages=float(loads.messages.max()),
        newcomer_s=float(np.median(waits)),
        newcomer_slow_s=float(np.quantile(waits, 0.95)),
        readings=watched.readings,
        readings_anew=watched.readings_anew,
        failed_readings=watched.failed_readings,
        lost_searches=sum(load.lost for load in searches) / sum(sum(load.searches.values()) for load in searches),
        known=float(np.median(watched.known)),
        elapsed_s=watched.elapsed_s,
    )


def bytes_per_s(group: Group) -> float:
    return sum(each.bytes for each in group.counted) / group.seconds


def first_bytes(group: Group) -> float:
    return sum(each.bytes for each in group.counted) / len(group.counted)


def newcomer_waits(watched: Watched, chance: random.Random, draws: int = 20) -> list[float]:
    """Seconds from a newcomer's first announcement until the first client plans its routes with it.

    How long the announcement took was watched; the wait for a reader is drawn, at the rate at which all clients of the
    model read the shards in which it stands.
    """
    waits = []
    counts: dict[int, Counter[Place]] = {}
    for model, depths, announcing_s in watched.announced:
        if model.number not in counts:
            counts[model.number] = reading_counts(watched.world, model, chance, 5, watched.ended_s).later
        rate = sum(_rate(counts[model.number], model, group, depth) for group, depth in depths)
        waits += [announcing_s + chance.expovariate(rate) if rate else float("inf") for _ in range(draws)]
    return waits


def _rate(counts: Counter[Place], model: Model, group: int, depth: int) -> float:
    """How often a second one shard at this depth is read by a client."""
    place = next((place for place in counts if place[1:] == (group, depth)), None)
    return 0.0 if place is None else counts[place] * model.clients / REFRESH_S / 2**depth

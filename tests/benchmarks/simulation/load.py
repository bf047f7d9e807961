"""What each node of a simulated network carries, from the rates of all searches and what one search costs.

How often each shard is read follows from the real `Known` and `Look` of a few readers of each model; how often it is
stored at and looked for, from the population; how many nodes a search asks, and which, from the sampled processes.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from petals_tune.net.dht.keys import Shard
from petals_tune.net.dht.node import NEAREST_S, REPLICAS
from petals_tune.net.dht.protocol import NEIGHBOURS, SAMPLE
from petals_tune.net.dht.reader import Known
from petals_tune.swarm.routes.known import REFRESH_S
from tests.benchmarks.simulation import traffic
from tests.benchmarks.simulation.actors import NODES, PATH, PING, VALUES
from tests.benchmarks.simulation.clock import EPOCH_S
from tests.benchmarks.simulation.population import Model, Place
from tests.benchmarks.simulation.simulate import BALANCE_S, Group, Watched
from tests.benchmarks.simulation.world import LASTS_S, LIFE_S, NEAR, RENEWALS, World

READINGS = 12  # of a reader, after its first one


@dataclass
class Loads:
    """Bytes and messages a second of each node, sent and received, by its number among the living."""

    bytes: np.ndarray
    messages: np.ndarray


@dataclass(frozen=True)
class Cost:
    """What one search asks: requests by the rank of the node, and on the way."""

    near: np.ndarray  # (NEAR,)
    path: float

    @classmethod
    def of(cls, kind: str, *groups: Group) -> Cost:
        loads = [group.load() for group in groups]
        searches = sum(load.searches[kind] for load in loads)
        requests: Counter[int] = Counter()
        for load in loads:
            for (each, rank), number in load.requests.items():
                if each == kind:
                    requests[rank] += number
        return cls(np.array([requests[rank] for rank in range(NEAR)]) / searches, requests[PATH] / searches)


@dataclass
class Counts:
    """How often one reader reads each level of each group of a model: in its first reading, and in a later one."""

    first: Counter[Place] = field(default_factory=Counter)
    later: Counter[Place] = field(default_factory=Counter)


def reading_counts(world: World, model: Model, chance: random.Random, readers: int, now_s: float) -> Counts:
    """Let a few readers choose shards, by the real rules, among what is stored now."""
    counts = Counts()
    for _ in range(readers):
        known, clock = Known(model.digest), 0.0
        for reading in range(READINGS + 1):
            due = known.due(model.span, thorough=reading == 0)
            while due:
                again = []
                for look in due:
                    shard, clock = look.choose(chance), clock + 1
                    place = shard.model, shard.group, shard.depth
                    if reading == 0:
                        counts.first[place] += 1 / readers
                    else:
                        counts.later[place] += 1 / readers / READINGS
                    look.found(shard, world.records(shard.key, EPOCH_S + now_s), clock)
                    if look.next_depth is not None:
                        again.append(look)
                due = again
    return counts


def reading_rates(world: World, model: Model, chance: random.Random, readers: int, now_s: float) -> Counter[Place]:
    """How often a second each level of each group of `model` is read, by its clients and its servers."""
    counts = reading_counts(world, model, chance, readers, now_s)
    joins_per_s = (model.servers + model.clients) / LIFE_S
    later_per_s = model.clients / REFRESH_S + model.servers * (1 / BALANCE_S + 2 / LIFE_S)
    places = {*counts.first, *counts.later}
    return Counter({place: counts.first[place] * joins_per_s + counts.later[place] * later_per_s for place in places})


def node_loads(watched: Watched, chance: random.Random) -> Loads:
    """The loads of all living nodes."""
    world, population = watched.world, watched.population
    living = [node.place for node in world.nodes if not node.ended_s]
    number_of = {place: number for number, place in enumerate(living)}
    bytes_per_s, messages_per_s = np.zeros(len(living)), np.zeros(len(living))
    values = Cost.of(VALUES, watched.clients, watched.joins)
    nodes = Cost.of(NODES, watched.joins, watched.servers)
    request = traffic.find_request_bytes(1, nodes_only=False, from_client=True) + traffic.FRAMING_BYTES
    nodes_bytes = request + traffic.find_response_bytes([(0, NEIGHBOURS)], 0)
    store_bytes = (
        traffic.store_request_bytes(1, watched.record_bytes) + traffic.store_response_bytes(1) + traffic.FRAMING_BYTES
    )
    reads: Counter[Place] = Counter()
    for model in watched.models:
        readers = max(40 // len(watched.models), 3)
        reads.update(reading_rates(world, model, chance, readers, watched.ended_s))
    tries = {place: number / watched.watched_s for place, number in population.tries.items()}
    renewals = {place: number / watched.watched_s for place, number in population.renewals.items()}
    on_the_way = 0.0  # requests a second, of all searches
    looked_for = 0.0
    for place in {*reads, *tries, *renewals}:
        model_digest, group, depth = place
        shards = 2**depth
        stores = (tries.get(place, 0.0) + renewals.get(place, 0.0)) / shards
        finds = (tries.get(place, 0.0) + renewals.get(place, 0.0) * LASTS_S / RENEWALS / NEAREST_S) / shards
        read = reads[place] / shards
        on_the_way += shards * (read * values.path + finds * nodes.path)
        looked_for += shards * finds
        for path in range(shards):
            key = Shard(model_digest, group, depth, path).key
            records = world.records(key, EPOCH_S + watched.ended_s)
            full_bytes = request + traffic.find_response_bytes(
                [(min(records, SAMPLE), NEIGHBOURS)], watched.record_bytes
            )
            for rank, near in enumerate(world.nearest(key)):
                number, holds = number_of[near], rank < REPLICAS
                asked = read * values.near[rank]
                bytes_per_s[number] += asked * (full_bytes if holds else nodes_bytes)
                bytes_per_s[number] += finds * nodes.near[rank] * nodes_bytes
                messages_per_s[number] += 2 * (asked + finds * nodes.near[rank])
                if holds:
                    bytes_per_s[number] += stores * store_bytes
                    messages_per_s[number] += 2 * stores
                    handed_over = 1 / LIFE_S * (REPLICAS if rank == 0 else 1)  # to those that take an ended one's place
                    bytes_per_s[number] += handed_over * records * watched.record_bytes
    own = watched.servers
    count = len(living)
    each_bytes = sum(each.bytes for each in own.counted) / own.seconds
    each_bytes += sum(each.bytes for each in watched.joins.counted) / len(watched.joins.counted) / LIFE_S
    each_messages = sum(each.messages for each in own.counted) / own.seconds
    each_messages += sum(each.messages for each in watched.joins.counted) / len(watched.joins.counted) / LIFE_S
    pings = sum(load.requests[PING, PATH] for load in own.loads) / own.seconds
    ping_bytes = sum(traffic.ping_bytes(from_client=False)) + traffic.FRAMING_BYTES
    bytes_per_s += each_bytes + on_the_way / count * nodes_bytes + pings * ping_bytes
    messages_per_s += each_messages + 2 * on_the_way / count + 2 * pings
    initial = np.array([number_of[place] for place in watched.initial])
    servers, clients = (sum(getattr(model, kind) for model in watched.models) for kind in ("servers", "clients"))
    pinged = servers * watched.servers.initial_pings / watched.servers.seconds
    pinged += clients * watched.clients.initial_pings / watched.clients.seconds
    pinged /= len(initial)
    bytes_per_s[initial] += pinged * ping_bytes
    messages_per_s[initial] += 2 * pinged
    return Loads(bytes_per_s, messages_per_s)

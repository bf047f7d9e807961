"""A large network: a population of servers in the trees, and a sample of processes that run the real directory."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import dataclass, field

from petals_tune.net.dht.keys import groups
from petals_tune.swarm.routes.known import REFRESH_S, KnownServers
from petals_tune.wire.span import gaps
from servers.membership.placement import best_span, block_throughputs
from tests.benchmarks.simulation.actors import Actor, Load
from tests.benchmarks.simulation.clock import run_virtual
from tests.benchmarks.simulation.population import LASTS_S, RENEWALS, Model, Population, draw_size, popular_models
from tests.benchmarks.simulation.traffic import Counted, announcement_bytes, typical_record
from tests.benchmarks.simulation.world import Upkeep, World

CLIENTS = 10_000
INITIAL_PEERS = 8  # of the network; each process is given two of them
GIVEN_PEERS = 2
MET = 300  # nodes that a server has met, beside those that it called
BALANCE_S = 300.0  # between two looks of a server for better blocks
LOADING_S = (0.5, 2.0)  # between announcing a choice and looking again


@dataclass
class Group:
    """What was counted of processes of one kind."""

    counted: list[Counted] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    seconds: float = 0.0  # of all of them together
    initial_pings: int = 0  # of the initial peers
    calls: int = 0
    failed_calls: int = 0

    def take(self, actor: Actor, seconds: float) -> None:
        """Add what `actor` did in so many seconds, and let it count anew."""
        self.counted.append(actor.protocol.counted)
        self.loads.append(actor.protocol.load)
        self.seconds += seconds
        self.initial_pings += actor.initial_pings
        self.calls += actor.protocol.calls
        self.failed_calls += actor.protocol.failed_calls
        actor.count_anew()

    def load(self) -> Load:
        """The loads of all of them together."""
        total = Load()
        for each in self.loads:
            total.searches.update(each.searches)
            total.requests.update(each.requests)
            total.lost += each.lost
        return total


@dataclass
class Watched:
    """All that the simulation of one network found out."""

    world: World
    population: Population
    models: list[Model]
    initial: list[int]  # places of the initial peers
    record_bytes: int
    watched_s: float
    clients: Group = field(default_factory=Group)  # while they go on reading
    first_readings: Group = field(default_factory=Group)  # of clients, from joining on
    servers: Group = field(default_factory=Group)  # while they go on renewing
    joins: Group = field(default_factory=Group)  # of servers, until they are announced
    readings: int = 0
    groups_read: list[int] = field(default_factory=list)  # in a reading, where it was not the first
    readings_anew: int = 0  # of all blocks, since some were missing
    failed_readings: int = 0  # after which a client still lacked blocks that servers hold
    reading_s: list[float] = field(default_factory=list)
    first_reading_s: list[float] = field(default_factory=list)
    announced: list[tuple[Model, list[tuple[int, int]], float]] = field(
        default_factory=list
    )  # group and depth; seconds
    known: list[int] = field(default_factory=list)  # servers that a client knows in the end
    ended_s: float = 0.0  # virtual time
    elapsed_s: float = 0.0


def simulate(
    *,
    servers: int,
    models: int,
    clients: int = CLIENTS,
    sampled_clients: int = 60,
    sampled_servers: int = 20,
    newcomers: int = 30,
    warm_s: float = 100.0,
    watched_s: float = 150.0,
    seed: int = 0,
) -> Watched:
    """Simulate one network. The sampled processes are of models drawn by their popularity.

    The sampled servers come on top of the others; of a small network there are few.
    """
    sampled_servers, newcomers = min(sampled_servers, servers // 20), min(newcomers, servers // 10)
    began = time.perf_counter()
    watched = run_virtual(
        _Run(servers, popular_models(models, servers, clients), random.Random(seed), Upkeep(), watched_s, warm_s).run(
            sampled_clients, sampled_servers, newcomers
        )
    )
    watched.elapsed_s = time.perf_counter() - began
    return watched  # type: ignore[no-any-return]


class _Run:
    def __init__(
        self, servers: int, models: list[Model], chance: random.Random, upkeep: Upkeep, watched_s: float, warm_s: float
    ):
        self.chance, self.warm_s, self.models = chance, warm_s, models
        world = World(servers, upkeep=upkeep, chance=chance)
        initial = [world.random_node() for _ in range(min(INITIAL_PEERS, servers))]
        self.initial = [node.peer for node in initial]
        self.watched = Watched(
            world,
            Population(world, models, chance),
            models,
            [node.place for node in initial],
            announcement_bytes(),
            watched_s,
        )

    async def run(self, clients: int, servers: int, newcomers: int) -> Watched:
        watched, population = self.watched, self.watched.population
        population.fill(0.0)
        turning = asyncio.create_task(self._turn())
        shares = [model.clients for model in self.models]
        work = [
            asyncio.create_task(self._client(model)) for model in self.chance.choices(self.models, shares, k=clients)
        ]
        shares = [model.servers for model in self.models]
        drawn = self.chance.choices(self.models, shares, k=servers + newcomers)
        work += [asyncio.create_task(self._server(model, is_steady=True)) for model in drawn[:servers]]
        work += [asyncio.create_task(self._server(model, is_steady=False)) for model in drawn[servers:]]
        await asyncio.sleep(self.warm_s)
        population.tries.clear()
        population.renewals.clear()
        await asyncio.sleep(watched.watched_s)
        watched.ended_s = asyncio.get_running_loop().time()
        for task in (turning, *work):
            task.cancel()
        for result in await asyncio.gather(turning, *work, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        return watched

    async def _turn(self) -> None:
        for second in itertools.count(1):
            await asyncio.sleep(1.0)
            self.watched.population.turn(second, asyncio.get_running_loop().time())

    def _actor(self, *, is_client: bool) -> Actor:
        initial = self.chance.sample(self.initial, min(GIVEN_PEERS, len(self.initial)))
        actor = Actor(
            self.watched.world,
            initial,
            is_client=is_client,
            record_bytes=self.watched.record_bytes,
            chance=random.Random(self.chance.random()),
        )
        return actor

    async def _client(self, model: Model) -> None:
        watched, loop = self.watched, asyncio.get_running_loop()
        await asyncio.sleep(self.chance.uniform(0, self.warm_s / 2))
        actor = self._actor(is_client=True)
        began_s = loop.time()
        await actor.join()
        staying = asyncio.create_task(actor.stay_known())
        client = KnownServers(
            actor.directory, model.digest, model.span, is_open=lambda _: False, has_failed=lambda _: False
        )
        await client.refresh()
        watched.first_reading_s.append(loop.time() - began_s)
        watched.first_readings.take(actor, loop.time() - began_s)
        await self._check(model, client)
        try:
            is_watched = False
            while True:
                await asyncio.sleep(REFRESH_S)
                if not is_watched and loop.time() > self.warm_s:
                    is_watched, counted_from_s = True, loop.time()
                    actor.count_anew()
                began_s = loop.time()
                await client.refresh_soon()
                await self._check(model, client)
                if is_watched:
                    watched.reading_s.append(loop.time() - began_s)
                    looks = actor.directory._reader._known[model.digest].looks.values()
                    watched.groups_read.append(sum(look.read_s >= began_s for look in looks))
        finally:
            staying.cancel()
            if is_watched:
                watched.clients.take(actor, loop.time() - counted_from_s)
                watched.known.append(len(client.servers))

    async def _check(self, model: Model, client: KnownServers) -> None:
        """Look for missing blocks as routing does: all blocks are read anew before it gives up."""
        self.watched.readings += 1
        if model.throughputs.min() > 0 and _lacks_blocks(model, client):
            self.watched.readings_anew += 1
            await client.refresh()
            self.watched.failed_readings += _lacks_blocks(model, client)

    async def _server(self, model: Model, *, is_steady: bool) -> None:
        """Join, choose blocks, announce; a steady one goes on renewing and looking for better blocks."""
        watched, loop, chance = self.watched, asyncio.get_running_loop(), self.chance
        latest_s = self.warm_s / 2
        await asyncio.sleep(chance.uniform(0, latest_s) if is_steady else self.warm_s + chance.uniform(0, 60))
        actor = self._actor(is_client=False)
        began_s = loop.time()
        await actor.join()
        staying = asyncio.create_task(actor.stay_known())
        try:
            record = await self._place(actor, model)
            announced_s = loop.time()
            await actor.directory.announce(record, lasts_s=LASTS_S)
            depths = [(group, actor.directory._depths[group].depth) for group in groups(record.blocks)]
            watched.announced.append((model, depths, loop.time() - announced_s))
            watched.joins.take(actor, loop.time() - began_s)
            if not is_steady:
                return
            for _ in range(MET):
                node = watched.world.random_node()
                actor.protocol.routing_table.add_or_update_node(node.id, node.peer)
            await self._go_on(actor, model, record)
        finally:
            staying.cancel()

    async def _place(self, actor: Actor, model: Model):  # type: ignore[no-untyped-def]
        """As servers do: a look at the speeds, one to choose, and one more after the choice was announced."""
        length, batch = draw_size(self.chance, model.blocks)
        await actor.directory.snapshot(model.digest, model.span)
        snapshot = await actor.directory.snapshot(model.digest, model.span)
        span = best_span(block_throughputs(snapshot.servers, model.blocks, snapshot.stands_for), length)
        record = typical_record(actor.identity.peer, model.digest, span, model.blocks, batch)
        await asyncio.sleep(self.chance.uniform(*LOADING_S))
        await actor.directory.snapshot(model.digest, model.span)
        return record

    async def _go_on(self, actor: Actor, model: Model, record) -> None:  # type: ignore[no-untyped-def]
        loop = asyncio.get_running_loop()
        looks_s = loop.time() + self.chance.uniform(0, BALANCE_S)
        counted_from_s: float | None = None
        try:
            while True:
                await asyncio.sleep(LASTS_S / RENEWALS)
                if counted_from_s is None and loop.time() > self.warm_s:
                    counted_from_s = loop.time()
                    actor.count_anew()
                await actor.directory.announce(record, lasts_s=LASTS_S)
                if loop.time() > looks_s:
                    looks_s += BALANCE_S * self.chance.uniform(0.5, 1.5)
                    await actor.directory.snapshot(model.digest, model.span)
        finally:
            if counted_from_s is not None:
                self.watched.servers.take(actor, loop.time() - counted_from_s)


def _lacks_blocks(model: Model, client: KnownServers) -> bool:
    return bool(gaps([server.blocks for server in client.servers], model.span))

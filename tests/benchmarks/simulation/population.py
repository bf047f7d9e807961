"""The servers and clients that are not simulated one by one: where the servers stand in the trees of shards.

Servers join, renew, try the shard above theirs, and end, by the real `Depth` and the real store. A renewal at the depth
where a server stands is only counted, since a store always takes it.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
from hivemind.p2p import PeerID

from petals_tune.net.dht.announcements import Announcement
from petals_tune.net.dht.keys import SHARD_RECORDS, Spot, groups, key_at, model_part
from petals_tune.net.dht.node import REPLICAS
from petals_tune.net.dht.tree import Depth
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from servers.membership.placement import best_span
from tests.benchmarks.simulation.clock import EPOCH_S
from tests.benchmarks.simulation.traffic import digest_of, typical_record
from tests.benchmarks.simulation.world import LASTS_S, LIFE_S, RENEWALS, World

HELD_BLOCKS = (2, 4, 6, 8, 12, 16, 24)
MODEL_BLOCKS = (30, 48, 70, 80, 126)

Place = tuple[str, int, int]  # part of a model's digest, group, depth


@dataclass
class Model:
    """One model: its blocks, and how many servers and clients it has."""

    number: int
    blocks: int
    servers: int
    clients: int
    throughputs: np.ndarray = field(init=False)  # of each block, by the servers that live

    def __post_init__(self) -> None:
        self.digest = digest_of(self.number)
        self.throughputs = np.zeros(self.blocks)

    @property
    def span(self) -> BlockSpan:
        return BlockSpan(0, self.blocks)


def popular_models(models: int, servers: int, clients: int) -> list[Model]:
    """Models by Zipf's law: the second has half as many servers and clients as the first, and so on."""
    shares = np.array([1 / (number + 1) for number in range(models)])
    shares /= shares.sum()
    return [
        Model(
            number=number,
            blocks=126 if models == 1 else MODEL_BLOCKS[(number * 3 + 4) % len(MODEL_BLOCKS)],
            servers=max(round(servers * share), 40),
            clients=max(round(clients * share), 1),
        )
        for number, share in enumerate(shares)
    ]


@dataclass(eq=False, slots=True)
class Server:
    """A server that is not simulated as a process."""

    model: Model
    record: ServerRecord
    announcement: Announcement
    depths: dict[int, Depth]
    ends_s: float  # of virtual time


def draw_size(chance: random.Random, blocks: int) -> tuple[int, float]:
    """Blocks that a server holds, and its tokens/s through one."""
    return min(chance.choice(HELD_BLOCKS), blocks), chance.lognormvariate(8.0, 1.0)


def new_peer(chance: random.Random) -> str:
    """The id of a peer that there was not yet."""
    return str(PeerID(chance.randbytes(38)))


class Population:
    """All servers but the simulated processes."""

    def __init__(self, world: World, models: list[Model], chance: random.Random):
        self.world, self.models, self._chance = world, models, chance
        self.turns: list[list[Server]] = [[] for _ in range(int(LASTS_S / RENEWALS))]
        self.tries: Counter[Place] = Counter()  # rounds of announcing at a place where the server did not stand
        self.renewals: Counter[Place] = Counter()
        self.living: defaultdict[Place, int] = defaultdict(int)  # servers by where they stand

    def fill(self, now_s: float) -> None:
        """All servers join, one after the other."""
        for model in self.models:
            for _ in range(model.servers):
                self.join(model, now_s)

    def join(self, model: Model, now_s: float) -> Server:
        length, batch = draw_size(self._chance, model.blocks)
        span = best_span(model.throughputs, length)
        record = typical_record(new_peer(self._chance), model.digest, span, model.blocks, batch)
        return self.add(model, record, now_s)

    def add(self, model: Model, record: ServerRecord, now_s: float) -> Server:
        """A server that holds the blocks of `record` announces itself."""
        ends_s = now_s + self._chance.expovariate(1 / LIFE_S)
        # Half of them are killed: their announcements stay until they expire.
        stays_s = self._chance.choice((0.0, self._chance.uniform(LASTS_S * (1 - 1 / RENEWALS), LASTS_S)))
        announcement = Announcement(
            record=record, issued_s=EPOCH_S + now_s, ends_s=EPOCH_S + ends_s + stays_s, data=b""
        )
        server = Server(model, record, announcement, {group: Depth() for group in groups(record.blocks)}, ends_s)
        model.throughputs[record.blocks.start : record.blocks.stop] += record.throughput.of_span(len(record.blocks))
        for group, depth in server.depths.items():
            self._publish(server, group, depth, now_s)
            self.living[self._place(server, group, depth.depth)] += 1
        self._chance.choice(self.turns).append(server)
        return server

    def _place(self, server: Server, group: int, depth: int) -> Place:
        return model_part(server.record.model), group, depth

    def _publish(self, server: Server, group: int, depth: Depth, now_s: float) -> None:
        """As `DhtDirectory._publish`, of one group."""
        while True:
            at = depth.to_try(self._chance)
            self.tries[self._place(server, group, at)] += 1
            taken = self._put(server, Spot(group, at), now_s)
            if depth.tried(at, taken=REPLICAS * taken, asked=REPLICAS):
                return

    def _put(self, server: Server, spot: Spot, now_s: float) -> bool:
        key = key_at(server.record, spot)
        assert key is not None
        if (
            now_s == 0
            and (store := self.world.stores.get(key)) is not None
            and len(store._shards[key]) >= SHARD_RECORDS
        ):
            return False  # nothing has expired yet
        return self.world.put(spot, server.announcement, EPOCH_S + now_s)

    def turn(self, second: int, now_s: float) -> None:
        """The renewals of one second; servers that ended are replaced."""
        number = second % len(self.turns)
        servers, self.turns[number] = self.turns[number], []
        for server in servers:
            if server.ends_s <= now_s:
                self._end(server, now_s)
                self.join(server.model, now_s)
            else:
                self.turns[number].append(server)
                for group, depth in server.depths.items():
                    self._renew(server, group, depth, now_s)

    def _renew(self, server: Server, group: int, depth: Depth, now_s: float) -> None:
        before = depth.depth
        while (at := depth.to_try(self._chance)) != before:
            self.tries[self._place(server, group, at)] += 1
            taken = self._put(server, Spot(group, at), now_s)
            if depth.tried(at, taken=REPLICAS * taken, asked=REPLICAS):
                self._moved(server, group, before, at, now_s)
                return
        self.renewals[self._place(server, group, at)] += 1

    def _moved(self, server: Server, group: int, before: int, at: int, now_s: float) -> None:
        """It stands higher now; its announcement below expires."""
        self.living[self._place(server, group, before)] -= 1
        self.living[self._place(server, group, at)] += 1
        old = server.announcement
        expires_s = EPOCH_S + now_s + LASTS_S * (1 - 1 / RENEWALS)
        if expires_s < old.ends_s:
            expiring = Announcement(record=old.record, issued_s=old.issued_s, ends_s=expires_s, data=b"")
            self.world.put(Spot(group, before), expiring, EPOCH_S + now_s)

    def _end(self, server: Server, now_s: float) -> None:
        blocks = server.record.blocks
        server.model.throughputs[blocks.start : blocks.stop] -= server.record.throughput.of_span(len(blocks))
        for group, depth in server.depths.items():
            self.living[self._place(server, group, depth.depth)] -= 1

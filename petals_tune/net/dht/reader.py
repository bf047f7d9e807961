"""Reading of the directory: what a client or a server knows of each model, and how it learns more."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence

import msgspec
from hivemind.dht.routing import DHTID

from petals_tune.net.dht.announcements import Announcement
from petals_tune.net.dht.keys import MAX_DEPTH, Shard, groups, index_keys, peer_path, roots
from petals_tune.net.dht.node import Node
from petals_tune.net.dht.protocol import SAMPLE
from petals_tune.net.dht.tree import Look
from petals_tune.net.directory import Snapshot
from petals_tune.net.own_lag import awake_s
from petals_tune.wire.records import PROTOCOL, ServerRecord, same_model
from petals_tune.wire.span import BlockSpan

logger = logging.getLogger(__name__)

READING_S = 4.0  # deadline of a snapshot, a look for one server, a list of models
HOLDERS = 2  # nodes whose answers about a shard are put together
INITIAL_S = 30.0  # between two questions to the initial peers: less than an announcement lasts
BYTES_A_READING = 170_000  # about as much a snapshot brings, unless it is thorough
RECORD_BYTES = 1_200  # of one announcement, about
MAX_KNOWN = 1_000  # servers of a model that are kept in mind
_DEPTHS_AT_ONCE = 5  # at which one server is looked for at the same time


class Known:
    """What was read of one model."""

    def __init__(self, model: str):
        self.looks: dict[int, Look] = {}  # by group
        self.announcements: dict[str, Announcement] = {}  # by peer
        self.asked_initial_s = -math.inf
        self._model = model
        self._told_of_others = False

    def due(self, blocks: BlockSpan, *, thorough: bool) -> list[Look]:
        """The groups to read now: all in a thorough reading, else those that were read longest ago."""
        found = [self.looks.setdefault(root.group, Look(root)) for root in roots(self._model, blocks)]
        found.sort(key=lambda look: look.read_s)
        if thorough:
            return found
        due: list[Look] = []
        room = BYTES_A_READING
        for look in found:
            room -= min(look.records, SAMPLE) * RECORD_BYTES * HOLDERS
            if due and room < 0:
                break
            due.append(look)
        return due

    def add(self, announcements: Iterable[Announcement]) -> None:
        for new in announcements:
            known = self.announcements.get(new.peer)
            if known is None or known.issued_s <= new.issued_s:
                self.announcements.pop(new.peer, None)  # what was heard last stands last
                self.announcements[new.peer] = new
        now_s = time.time()
        self.announcements = {peer: each for peer, each in self.announcements.items() if each.ends_s > now_s}
        while len(self.announcements) > MAX_KNOWN:
            del self.announcements[next(iter(self.announcements))]

    def snapshot(self, blocks: BlockSpan) -> Snapshot:
        """The servers of our release that hold some of `blocks`."""
        records = [each.record for each in self.announcements.values()]
        ours = [record for record in records if record.protocol == PROTOCOL]
        if len(ours) < len(records) and not self._told_of_others:
            self._told_of_others = True
            others = sorted({record.version or record.protocol for record in records if record.protocol != PROTOCOL})
            logger.warning(
                "%d of %d servers are passed over: they run another release of petals_tune (%s) and speak another "
                "protocol than %s",
                *(len(records) - len(ours), len(records), ", ".join(others), PROTOCOL),
            )
        snapshot = Snapshot.of(
            record for record in ours if record.blocks.start < blocks.stop and blocks.start < record.blocks.stop
        )
        return msgspec.structs.replace(snapshot, stands_for=self._stand_for(ours))

    def _stand_for(self, records: Sequence[ServerRecord]) -> dict[str, float]:
        """How many servers each of `records` stands for, where its groups are too large to be read whole."""
        of_group = {record.peer: groups(record.blocks) for record in records if record.state != "offline"}
        seen = Counter(group for some in of_group.values() for group in some)
        factors = {
            group: look.servers / seen[group]
            for group, look in self.looks.items()
            if (look.levels > 0 or look.records > SAMPLE) and 0 < seen[group] < look.servers
        }
        return {
            peer: statistics.fmean(factors.get(group, 1.0) for group in some)
            for peer, some in of_group.items()
            if any(group in factors for group in some)
        }


class Reader:
    """Reads announcements through one node; each reading has a deadline and adds to what is known."""

    def __init__(
        self,
        node: Node,
        initial: Sequence[str],
        chance: random.Random | None = None,
        *,
        ask_why: Callable[[], Awaitable[None]] | None = None,
    ):
        """`initial`: ids of the peers through which this one joined; they are asked for what they have themselves.

        `ask_why` is awaited where no node answered, and raises where they do not want to: AccessDenied.
        """
        self._node, self._initial, self._ask_why = node, initial, ask_why
        self._chance = chance or random.SystemRandom()
        self._known: dict[str, Known] = {}

    async def snapshot(self, model: str, blocks: BlockSpan, *, thorough: bool = False) -> Snapshot:
        """As `Directory.snapshot`."""
        known = self._known.setdefault(model, Known(model))
        asks_initial = thorough or time.monotonic() - known.asked_initial_s >= INITIAL_S
        due = known.due(blocks, thorough=thorough)
        readings = [self._look(known, due, model)]
        if asks_initial:
            known.asked_initial_s = time.monotonic()
            readings.append(self._read_initial(known, [look.root for look in due], model))
        if not any(await asyncio.gather(*readings)) and self._initial:
            if not known.announcements:  # else there are servers to ask, whatever the nodes of the DHT say of us
                await self._was_silent()
            logger.warning(
                "no node of the directory answered in %g s; going on with the %d servers that are known",
                *(READING_S, len(known.announcements)),
            )
        return known.snapshot(blocks)

    async def _was_silent(self) -> None:
        if self._ask_why is not None:
            await self._ask_why()

    async def _look(self, known: Known, due: Sequence[Look], model: str) -> bool:
        """Look for the shards that are due, and below those that are full; whether any node answered in time."""
        deadline_s = awake_s() + READING_S
        has_heard = False
        while due and awake_s() < deadline_s:
            shards = {DHTID.from_bytes((shard := look.choose(self._chance)).key): (look, shard) for look in due}
            searches = await self._node.find(shards, enough=HOLDERS, timeout_s=deadline_s - awake_s())
            due = []
            for key, search in searches.items():
                look, shard = shards[key]
                if not search.answered and not search.found:
                    continue
                has_heard = True
                known.add(each for each in search.found.values() if same_model(each.record.model, model))
                look.found(shard, max(search.held, len(search.found)), time.monotonic())
                if look.next_depth is not None:
                    due.append(look)
        return has_heard

    async def _read_initial(self, known: Known, shards: Sequence[Shard], model: str) -> bool:
        """Ask the initial peers themselves: strangers may stand nearer to a key and hide what is stored there."""
        found = await self._node.read_at(self._initial, [DHTID.from_bytes(shard.key) for shard in shards])
        announcements = [each for some in found.values() for each in some]
        known.add(each for each in announcements if same_model(each.record.model, model))
        return bool(announcements)

    async def find(self, peer: str, model: str, blocks: BlockSpan) -> ServerRecord | None:
        """As `Directory.find`: the shards on the way from the root to where `peer` may stand are read."""
        known = self._known.setdefault(model, Known(model))
        for start in range(0, MAX_DEPTH + 1, _DEPTHS_AT_ONCE):
            depths = range(start, min(start + _DEPTHS_AT_ONCE, MAX_DEPTH + 1))
            shards = [
                Shard(root.model, root.group, depth, peer_path(peer, depth))
                for root in roots(model, blocks)
                for depth in depths
            ]
            keys = [DHTID.from_bytes(shard.key) for shard in shards]
            searches = await self._node.find(keys, enough=HOLDERS, timeout_s=READING_S, whole=True)
            found_here = [each for search in searches.values() for each in search.found.values()]
            known.add(each for each in found_here if same_model(each.record.model, model))
            if (found := known.announcements.get(peer)) is not None:
                return found.record if found.record.state == "online" else None
            if not found_here:
                return None  # nobody stands deeper than this
        return None

    async def models(self) -> tuple[ServerRecord, ...]:
        """As `Directory.models`."""
        keys = [DHTID.from_bytes(key) for key in index_keys()]
        searches = await self._node.find(keys, enough=HOLDERS, timeout_s=READING_S, whole=True)
        if not any(search.answered or search.found for search in searches.values()):
            await self._was_silent()
        records = [each.record for search in searches.values() for each in search.found.values()]
        there = [record for record in records if record.state != "offline"]
        return tuple(sorted(there, key=lambda record: (record.model_name, record.model, record.peer)))

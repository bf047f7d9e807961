"""Where in the trees of shards a server stands, and which shards a reader looks at. Pure; chance is an argument."""

from __future__ import annotations

import random
from dataclasses import dataclass

from petals_tune.net.dht.keys import MAX_DEPTH, SHARD_RECORDS, Shard

FULL = SHARD_RECORDS * 3 // 4  # records from which a reader takes a shard for a full one, and looks below it too
STEP = 2  # levels that a first look goes down at a time
SMOOTHING = 0.2  # weight of the newest reading of the deepest level
UP = 1 / 8  # share of the renewals with which a server tries the shard above its own


@dataclass
class Depth:
    """The depth at which a server stands in the tree of one group. It goes down where a shard is full."""

    depth: int = 0

    def to_try(self, chance: random.Random) -> int:
        """The depth to announce at now: now and then the one above, where there may be room again."""
        return self.depth - 1 if self.depth > 0 and chance.random() < UP else self.depth

    def tried(self, depth: int, *, taken: int, asked: int) -> bool:
        """Note how many of the `asked` nodes took the announcement; False where another depth is to be tried."""
        if not asked or taken * 2 >= asked:
            self.depth = depth
            return True
        if depth < self.depth:
            return False  # no room above; it stays where it was
        if self.depth < MAX_DEPTH:
            self.depth += 1
            return False
        return True


@dataclass
class Look:
    """A reader's way through the tree of one group: first from the root down, later one shard at a time."""

    root: Shard
    levels: int = 0  # the deepest level that holds records, as far as is known
    next_depth: int | None = 0  # of the first look; None: it is over
    read_s: float = float("-inf")
    records: int = 0  # that the last reading brought
    deepest: float = 0.0  # records in a shard of the deepest level, smoothed

    def choose(self, chance: random.Random) -> Shard:
        """The shard to read next: in the first look the next one down, then one drawn by the records of its level."""
        depth = self.next_depth
        if depth is None:
            (depth,) = chance.choices(range(self.levels + 1), weights=[2**level for level in range(self.levels + 1)])
        return Shard(self.root.model, self.root.group, depth, chance.getrandbits(depth) if depth else 0)

    def found(self, shard: Shard, records: int, now_s: float) -> None:
        """Note that `shard` holds so many records."""
        self.read_s, self.records = now_s, records
        levels, is_full = self.levels, records >= FULL
        if self.next_depth is None:
            if is_full and shard.depth == self.levels < MAX_DEPTH:
                self.levels += 1
            elif not records and shard.depth == self.levels > 0:
                self.levels -= 1
        elif is_full and shard.depth < MAX_DEPTH:
            self.levels, self.next_depth = shard.depth + 1, min(shard.depth + STEP, MAX_DEPTH)
        else:
            self.levels, self.next_depth = (shard.depth if records else max(shard.depth - 1, 0)), None
            if not records:  # the level above was not read: between empty and full
                self.deepest = SHARD_RECORDS / 2
        if shard.depth == self.levels:
            is_new = levels != self.levels or self.levels == 0
            self.deepest = records if is_new else self.deepest + SMOOTHING * (records - self.deepest)

    @property
    def servers(self) -> float:
        """About how many servers the group has: the levels above the deepest one are full."""
        return SHARD_RECORDS * (2**self.levels - 1) + 2**self.levels * self.deepest

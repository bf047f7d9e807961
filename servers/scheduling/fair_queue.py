"""In which order a server computes: short steps before long batches, clients by turns. Pure; seconds are arguments.

Steps of generation go first: a step waits for the batch that runs, and no other. For each second of batches, though,
steps may take only so many seconds while more batches wait, so these are not starved.

Among steps, and among batches, the client that has computed least is next. Who begins to wait starts where an equal
share would have brought it by now: being idle saves nothing up, and nobody waits for ever, however many newcomers come.
Source: fair queueing, Demers, Keshav and Shenker 1989 (SIGCOMM), with seconds of computing as the cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable
from enum import IntEnum
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")

STEP_SHARE = 0.8  # of the computing time that steps may take while batches wait


class Priority(IntEnum):
    """What of one client goes first. A backward frees memory that a forward would take, so it goes before it."""

    STEP = 0
    BACKWARD = 1
    FORWARD = 2


class Turns(Generic[Key]):
    """Whose turn it is among those who wait."""

    def __init__(self) -> None:
        self._got: dict[Key, float] = {}
        self._served: dict[Key, int] = {}  # when last: the number of the turn
        self._equal = 0.0  # what somebody who always waited would have got, were all served at once in equal shares
        self._waiting: frozenset[Key] = frozenset()  # the last time
        self._turn = 0
        self._chosen: Key

    def __len__(self) -> int:
        return len(self._got)

    def next(self, waiting: Iterable[Key]) -> Key:
        """The one of `waiting` that got least; of equals, the one who was served longest ago."""
        waiting = tuple(waiting)
        for key in waiting:
            if key not in self._waiting:
                self._got[key] = max(self._got.get(key, 0.0), self._equal)
        self._waiting = frozenset(waiting)
        for key in self._got.keys() - self._waiting:
            if self._got[key] <= self._equal:  # it would start anew in any case
                del self._got[key]
                self._served.pop(key, None)
        self._turn += 1
        self._chosen = min(waiting, key=lambda key: (self._got[key], self._served.get(key, 0)))
        self._served[self._chosen] = self._turn
        return self._chosen

    def charge(self, amount: float) -> None:
        """What the one who was chosen last got."""
        self._got[self._chosen] += amount
        self._equal += amount / len(self._waiting)


class WorkQueue(Generic[Item]):
    """What waits to be computed, of all clients."""

    def __init__(self) -> None:
        self._steps: _Clients[Item] = _Clients()
        self._batches: _Clients[Item] = _Clients()
        self._ahead_s = 0.0  # how much more than their share steps had; below 0: how much is still theirs
        self._running = self._steps

    def __len__(self) -> int:
        return len(self._steps) + len(self._batches)

    def push(self, priority: Priority, client: str, item: Item) -> None:
        (self._steps if priority is Priority.STEP else self._batches).push(priority, client, item)

    def pop(self) -> Item:
        """The next one. Raises IndexError where nothing waits."""
        if not self:
            raise IndexError("nothing waits")
        steps_first = self._ahead_s <= 0 or not self._batches
        self._running = self._steps if self._steps and steps_first else self._batches
        return self._running.pop()

    def ran(self, elapsed_s: float) -> None:
        """What was popped last took so long."""
        self._running.turns.charge(elapsed_s)
        if self._running is self._batches:
            self._ahead_s = max(self._ahead_s, 0.0) - elapsed_s * STEP_SHARE / (1 - STEP_SHARE)
        elif self._batches:
            self._ahead_s += elapsed_s


class _Clients(Generic[Item]):
    """Work of one kind, by client."""

    def __init__(self) -> None:
        self.turns: Turns[str] = Turns()
        self._items: dict[str, list[tuple[Priority, int, Item]]] = {}
        self._count = 0  # of all that ever came: the older goes first

    def __len__(self) -> int:
        return sum(len(items) for items in self._items.values())

    def push(self, priority: Priority, client: str, item: Item) -> None:
        self._count += 1
        heapq.heappush(self._items.setdefault(client, []), (priority, self._count, item))

    def pop(self) -> Item:
        client = self.turns.next(self._items)
        *_, item = heapq.heappop(self._items[client])
        if not self._items[client]:
            del self._items[client]
        return item

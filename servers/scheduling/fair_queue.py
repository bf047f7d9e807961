"""Fair-queue scheduler: generation steps before training batches, round-robin by compute time per client. No clock.

A generation step waits for the batch that runs, and for no other. While batches wait, steps take at most `STEP_SHARE`
of the compute time, so that batches are not starved.

Among steps, and among batches, the client with the least compute time is next. A client that starts to wait is counted
as if it had received an equal share until now: being idle earns no credit, and newcomers cannot starve the others.
Source: fair queueing, Demers, Keshav and Shenker 1989 (SIGCOMM), with seconds of compute as the cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable
from enum import IntEnum
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")

STEP_SHARE = 0.8  # of the compute time that steps may take while batches wait


class Priority(IntEnum):
    """Request order within one client. A backward frees memory that a forward would take, so it goes first."""

    STEP = 0
    BACKWARD = 1
    FORWARD = 2


class FairScheduler(Generic[Key]):
    """Chooses among waiting clients by the compute time that each has received."""

    def __init__(self) -> None:
        self._received: dict[Key, float] = {}
        self._last_chosen: dict[Key, int] = {}  # number of the choice
        self._equal_share = 0.0  # received by a client that always waited, were all served at once in equal shares
        self._waiting: frozenset[Key] = frozenset()  # at the last choice
        self._choices = 0
        self._chosen: Key

    def __len__(self) -> int:
        """How many clients it remembers."""
        return len(self._received)

    def choose(self, waiting: Iterable[Key]) -> Key:
        """Return the waiting client with the least compute time (ties: least recently served)."""
        waiting = tuple(waiting)
        for key in waiting:
            if key not in self._waiting:
                self._received[key] = max(self._received.get(key, 0.0), self._equal_share)
        self._waiting = frozenset(waiting)
        for key in self._received.keys() - self._waiting:
            if self._received[key] <= self._equal_share:  # it would start there in any case
                del self._received[key]
                self._last_chosen.pop(key, None)
        self._choices += 1
        self._chosen = min(waiting, key=lambda key: (self._received[key], self._last_chosen.get(key, 0)))
        self._last_chosen[self._chosen] = self._choices
        return self._chosen

    def charge(self, elapsed_s: float) -> None:
        """Add the compute time of the client that was chosen last."""
        self._received[self._chosen] += elapsed_s
        self._equal_share += elapsed_s / len(self._waiting)


class FairQueue(Generic[Item]):
    """Work of all clients that waits for the compute thread."""

    def __init__(self) -> None:
        self._steps: _ClientQueues[Item] = _ClientQueues()
        self._batches: _ClientQueues[Item] = _ClientQueues()
        self._steps_ahead_s = 0.0  # compute time of steps beyond their share; below 0: what is left of the share
        self._running = self._steps

    def __len__(self) -> int:
        return len(self._steps) + len(self._batches)

    def push(self, priority: Priority, client: str, item: Item) -> None:
        (self._steps if priority is Priority.STEP else self._batches).push(priority, client, item)

    def discard(self, priority: Priority, client: str, item: Item) -> bool:
        """Remove an item that waits; False where it does not (any more)."""
        return (self._steps if priority is Priority.STEP else self._batches).discard(client, item)

    def pop(self) -> Item:
        """Remove and return the next item. Raises IndexError where nothing waits."""
        if not self:
            raise IndexError("nothing waits")
        steps_first = self._steps_ahead_s <= 0 or not self._batches
        self._running = self._steps if self._steps and steps_first else self._batches
        return self._running.pop()

    def charge(self, elapsed_s: float) -> None:
        """Account for the compute time of the item that was popped last."""
        self._running.scheduler.charge(elapsed_s)
        if self._running is self._batches:
            self._steps_ahead_s = max(self._steps_ahead_s, 0.0) - elapsed_s * STEP_SHARE / (1 - STEP_SHARE)
        elif self._batches:
            self._steps_ahead_s += elapsed_s


class _ClientQueues(Generic[Item]):
    """One priority queue per client, and the scheduler that chooses among them."""

    def __init__(self) -> None:
        self.scheduler: FairScheduler[str] = FairScheduler()
        self._items: dict[str, list[tuple[Priority, int, Item]]] = {}
        self._count = 0  # of all items ever pushed: among equal priorities the older goes first

    def __len__(self) -> int:
        return sum(len(items) for items in self._items.values())

    def push(self, priority: Priority, client: str, item: Item) -> None:
        self._count += 1
        heapq.heappush(self._items.setdefault(client, []), (priority, self._count, item))

    def discard(self, client: str, item: Item) -> bool:
        items = self._items.get(client, [])
        for place, (*_, each) in enumerate(items):
            if each == item:
                del items[place]
                heapq.heapify(items)
                if not items:
                    del self._items[client]
                return True
        return False

    def pop(self) -> Item:
        client = self.scheduler.choose(self._items)
        *_, item = heapq.heappop(self._items[client])
        if not self._items[client]:
            del self._items[client]
        return item

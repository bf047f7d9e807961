"""In which order a server computes: short steps before long batches, clients by turns. Pure; seconds are arguments.

Two questions, one rule. First steps of generation or batches of training, then, among those, which client: whoever
has computed least, by weight, is next. Who begins to wait starts where the others are, so nothing is saved up by being
idle, and nobody waits for ever.
Source: start-time fair queueing, Goyal, Vin and Cheng 1996 (SIGCOMM), with seconds of computing as the cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable
from enum import IntEnum
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")

STEP_SHARE = 0.8  # of the computing time that steps may take while batches wait; they wait for one batch at most


class Priority(IntEnum):
    """What of one client goes first. A backward frees memory that a forward would take, so it goes before it."""

    STEP = 0
    BACKWARD = 1
    FORWARD = 2


class Turns(Generic[Key]):
    """Whose turn it is among those who wait."""

    def __init__(self) -> None:
        self._got: dict[Key, float] = {}
        self._now = 0.0  # what the one who was served last had got until then

    def __len__(self) -> int:
        return len(self._got)

    def next(self, waiting: Iterable[Key]) -> Key:
        """The one of `waiting` that got least; of equals, the first."""
        waiting = list(waiting)
        for key in waiting:
            self._got[key] = max(self._got.get(key, 0.0), self._now)
        chosen = min(waiting, key=self._got.__getitem__)
        self._now = self._got[chosen]
        for key in self._got.keys() - set(waiting):
            if self._got[key] <= self._now:
                del self._got[key]  # it would start anew in any case
        return chosen

    def charge(self, key: Key, amount: float) -> None:
        self._got[key] = self._got.get(key, self._now) + amount


class WorkQueue(Generic[Item]):
    """What waits to be computed, of all clients."""

    def __init__(self) -> None:
        self._waiting: dict[bool, dict[str, list[tuple[Priority, int, Item]]]] = {True: {}, False: {}}  # steps, batches
        self._kinds: Turns[bool] = Turns()
        self._clients: dict[bool, Turns[str]] = {True: Turns(), False: Turns()}
        self._count = 0
        self._running: tuple[bool, str] | None = None

    def __len__(self) -> int:
        return sum(len(items) for clients in self._waiting.values() for items in clients.values())

    def push(self, priority: Priority, client: str, item: Item) -> None:
        self._count += 1
        items = self._waiting[priority is Priority.STEP].setdefault(client, [])
        heapq.heappush(items, (priority, self._count, item))

    def pop(self) -> Item:
        """The next one. Raises IndexError where nothing waits."""
        kinds = [kind for kind, clients in self._waiting.items() if clients]
        if not kinds:
            raise IndexError("nothing waits")
        is_step = self._kinds.next(kinds)
        clients = self._waiting[is_step]
        client = self._clients[is_step].next(clients)
        *_, item = heapq.heappop(clients[client])
        if not clients[client]:
            del clients[client]
        self._running = is_step, client
        return item

    def ran(self, elapsed_s: float) -> None:
        """What was popped last took so long."""
        assert self._running is not None
        is_step, client = self._running
        self._kinds.charge(is_step, elapsed_s / (STEP_SHARE if is_step else 1 - STEP_SHARE))
        self._clients[is_step].charge(client, elapsed_s)

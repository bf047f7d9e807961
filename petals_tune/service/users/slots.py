"""Slots of work that runs at the same time, shared fairly between keys. Used by one event loop."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class Slot:
    """A place among what runs."""

    owner: str
    is_due: bool = False  # another key has fewer: give it back at the next token, and wait for another one


@dataclass(eq=False)
class _Waiting:
    owner: str
    granted: asyncio.Future[Slot]


class Slots:
    """At most `most` slots. A free one goes to the key that has fewest, and of equals to the one served longest ago.

    Where no slot is free and one key has two more than another one that waits, a slot of the former is marked as due:
    whoever holds it gives it back as soon as it can. So long answers of one key do not keep another one waiting.
    """

    def __init__(self, most: int):
        self.most = most
        self._held: list[Slot] = []  # the oldest first
        self._queue: list[_Waiting] = []
        self._served: dict[str, int] = {}  # number of the last grant, by key
        self._grants = 0

    def waiting(self, owner: str | None = None) -> int:
        """How many wait: of one key, or of all."""
        return sum(owner in (None, each.owner) for each in self._queue)

    @asynccontextmanager
    async def held(self, owner: str) -> AsyncIterator[Slot]:
        """Wait for a slot, and hold it within the block."""
        waiting = _Waiting(owner, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._grant()
        try:
            slot = await waiting.granted
        except asyncio.CancelledError:
            if waiting in self._queue:
                self._queue.remove(waiting)
            elif waiting.granted.done() and not waiting.granted.cancelled():
                self._give_back(waiting.granted.result())  # granted, and cancelled before it was told
            raise
        try:
            yield slot
        finally:
            self._give_back(slot)

    def _give_back(self, slot: Slot) -> None:
        self._held.remove(slot)
        self._grant()

    def _grant(self) -> None:
        while self._queue and len(self._held) < self.most:
            counts = Counter(slot.owner for slot in self._held if not slot.is_due)
            first = next(self._by_need(counts))
            self._queue.remove(first)
            if first.granted.cancelled():
                continue
            self._grants += 1
            self._served[first.owner] = self._grants
            slot = Slot(first.owner)
            self._held.append(slot)
            first.granted.set_result(slot)
        self._mark_due()

    def _by_need(self, counts: Counter[str]) -> Iterator[_Waiting]:
        """Those who wait in the order of grants, where keys hold as many slots as in `counts`, which is changed."""
        left = list(self._queue)
        while left:
            first = min(left, key=lambda each: (counts[each.owner], self._served.get(each.owner, 0)))
            left.remove(first)
            yield first
            counts[first.owner] += 1

    def _mark_due(self) -> None:
        due = sum(slot.is_due for slot in self._held)
        counts = Counter(slot.owner for slot in self._held if not slot.is_due)
        for place, waiting in enumerate(self._by_need(counts)):
            if place < due:
                continue  # it gets a slot that is due already
            richest = max(counts, key=lambda owner: counts[owner], default=waiting.owner)
            if counts[richest] < counts[waiting.owner] + 2:
                break
            next(slot for slot in self._held if slot.owner == richest and not slot.is_due).is_due = True
            counts[richest] -= 1

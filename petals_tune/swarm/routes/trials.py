"""Work for servers that were never measured: when they get it, and how long they may take. Pure: no clock of its own.

What a server announces costs nothing to invent, so a newcomer is tried with work that others could do too, and one that
fails puts the next newcomer off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from petals_tune.swarm.routes.table import Mask, ServerTable
from petals_tune.wire.records import ServerRecord

ANSWERS = 4  # requests that a server has to answer in time until it is a newcomer no more
LEAST_S = 10.0  # for an answer of a newcomer
MOST_TIMES = 5.0  # or so many times what the work would take a server of the speed that it is believed to have
FIRST_PAUSE_S = 2.0  # after a newcomer failed, until the next one is tried
LONGEST_PAUSE_S = 60.0
MAX_HOSTS = 10_000  # that are remembered: addresses can be invented too


@dataclass
class Trials:
    """Newcomers that have work, and whom their failures make suspect."""

    limits_s: dict[str, float] = field(default_factory=dict)  # for an answer; by peer
    _answers: dict[str, int] = field(default_factory=dict)
    _failures: int = 0  # in a row
    _pause_until_s: float = -math.inf
    _failed_at: dict[str, int] = field(default_factory=dict)  # failures less successes, by host
    _at: tuple[ServerTable, dict[str, list[int]]] | None = None  # places in the last table, by host

    def allowed(self, now_s: float) -> bool:
        """Whether a newcomer may be given work that a measured server could do."""
        return now_s >= self._pause_until_s

    def begin(self, peer: str, expected_s: float) -> None:
        """`peer` gets work that should take `expected_s`."""
        if self._answers.get(peer, 0) < ANSWERS:
            self.limits_s[peer] = max(LEAST_S, MOST_TIMES * expected_s, self.limits_s.get(peer, 0.0))

    def answered(self, server: ServerRecord) -> None:
        """It did some work."""
        count = self._answers[server.peer] = self._answers.get(server.peer, 0) + 1
        if count == 1:
            self._count(server, -1)
            self._failures = 0
        if count >= ANSWERS:
            self.limits_s.pop(server.peer, None)

    def failed(self, server: ServerRecord, now_s: float) -> None:
        """It failed, or could not be reached. One that did much before is none of the newcomers."""
        on_trial = self.limits_s.pop(server.peer, None) is not None
        if self._answers.pop(server.peer, 0):
            return
        self._count(server, 1)
        if on_trial:
            self._failures += 1
            self._pause_until_s = now_s + min(FIRST_PAUSE_S * 2 ** min(self._failures - 1, 32), LONGEST_PAUSE_S)

    def suspects(self, table: ServerTable, slow: Iterable[str] = ()) -> Mask:
        """Servers at a host from which more failed than worked, or where a `slow` peer is: names are free."""
        if self._at is None or self._at[0] is not table:
            places: dict[str, list[int]] = {}
            for place, server in enumerate(table.servers):
                for host in hosts_of(server):
                    places.setdefault(host, []).append(place)
            self._at = table, places
        bad = {host for host, count in self._failed_at.items() if count > 0}
        for peer in slow:
            if (known := table.places.get(peer)) is not None:
                bad.update(hosts_of(table.servers[known]))
        mask = np.zeros(len(table.servers), dtype=np.bool_)
        for host in bad:
            mask[self._at[1].get(host, [])] = True
        return mask

    def _count(self, server: ServerRecord, change: int) -> None:
        for host in hosts_of(server):
            self._failed_at[host] = self._failed_at.pop(host, 0) + change
        while len(self._failed_at) > MAX_HOSTS:  # those that nothing was heard of for longest
            del self._failed_at[next(iter(self._failed_at))]


def hosts_of(server: ServerRecord) -> Sequence[str]:
    """The IP addresses or names that `server` announces; those of relays, which many share, left out."""
    parts = [address.split("/") for address in server.addresses if "/p2p-circuit" not in address]
    return tuple(dict.fromkeys(each[2] for each in parts if len(each) > 2)) or (server.peer,)

"""The networks of peers, by the addresses at which the daemon sees them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from petals_tune.errors import ConnectionLost
from petals_tune.net.dht.store import network_of_address
from petals_tune.net.hivemind_p2p import HivemindTransport
from petals_tune.net.own_lag import patience

REACH_S = 5.0
LIST_S = 1.0  # how long a list of the connected peers is good for


class Networks:
    """Finds the networks of peers: of those that are connected, and of those that can be dialled."""

    def __init__(self, transport: HivemindTransport):
        self._transport = transport
        self._connected: dict[str, str] = {}
        self._listed_s = float("-inf")

    async def of(self, peer: str) -> str | None:
        """The network of a peer that is connected now; None for another one."""
        if peer not in self._connected or time.monotonic() - self._listed_s > LIST_S:
            try:
                self._connected = await self._transport.connected()
            except ConnectionLost:  # the daemon ends
                return None
            self._listed_s = time.monotonic()
        address = self._connected.get(peer)
        return None if address is None else network_of_address(address)

    async def reach(self, peer: str, addresses: Sequence[str]) -> str | None:
        """The network of a peer that can be reached at one of `addresses`; None where it cannot."""
        try:
            async with patience(REACH_S):
                await self._transport.reach(peer, addresses)
        except (ConnectionLost, TimeoutError):
            return None
        return await self.of(peer)

"""Peers of one process whose streams stand for those of p2p daemons; their direct connections are TCP on 127.0.0.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from petals_tune.errors import ConnectionLost
from petals_tune.net.address_policy import AddressPolicy, Scope
from petals_tune.net.in_process import InProcessNetwork
from petals_tune.net.transport import Connection, Serve


@dataclass
class PlayedDaemon:
    """The daemon of one peer. It sees others at `seen_at`, None: through a relay."""

    network: InProcessNetwork
    id: str
    seen_at: str | None = "127.0.0.1"
    policy: AddressPolicy = field(default_factory=lambda: AddressPolicy(narrowest=Scope.LOOPBACK))
    unreachable: bool = False
    dialled: list[tuple[str, str]] = field(default_factory=list)  # (peer, protocol)

    def __post_init__(self) -> None:
        self._streams = InProcessNetwork.peer(self.network, self.id).transport  # whatever a subclass makes of it

    async def reach(self, peer: str, addresses: Sequence[str]) -> None:
        if self.unreachable:
            raise ConnectionLost("nobody answers", peer=peer)

    async def host(self, peer: str) -> str | None:
        return self.seen_at

    async def dial(self, peer: str, addresses: Sequence[str], protocol: str) -> Connection:
        self.dialled.append((peer, protocol))
        return await self._streams.dial(peer, addresses, protocol)

    async def accept(self, protocol: str, serve: Serve) -> None:
        await self._streams.accept(protocol, serve)

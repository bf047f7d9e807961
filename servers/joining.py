"""A place in a swarm: an identity, a p2p daemon that has to live, a node of the DHT."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P

from petals_tune.errors import ServerError
from petals_tune.swarm.members import Members, identity_beside, load_identity
from petals_tune.swarm.p2p import start_dht, start_p2p, stop_dht, stop_p2p
from petals_tune.wire.signing import SigningKey

T = TypeVar("T")

_SAME_STOP_S = 2.0  # whoever stops the daemon may be about to stop us too


@dataclass(frozen=True, kw_only=True)
class Joined:
    """This process as a peer of a swarm."""

    p2p: P2P
    node: DHTNode
    members: Members | None  # None: the swarm is open

    @property
    def peer(self) -> str:
        return str(self.p2p.peer_id)

    @property
    def daemon_lives(self) -> bool:
        return self.p2p._child is not None and self.p2p._child.returncode is None

    async def addresses(self) -> tuple[str, ...]:
        """Where others can dial this peer."""
        return tuple(str(address) for address in await self.p2p.get_visible_maddrs())

    async def while_daemon_lives(self, work: Coroutine[Any, Any, T], stop: asyncio.Event) -> T:
        """The result of `work`. Raises ServerError where the daemon ends before it, and nobody set `stop`.

        A peer without its daemon answers nobody, and would be announced all the same until its record expires.
        """
        assert self.p2p._child is not None
        working = asyncio.create_task(work)
        ending = asyncio.create_task(self.p2p._child.wait())
        try:
            await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), _SAME_STOP_S)
            if not working.done() and not stop.is_set():
                raise ServerError(
                    f"the p2p daemon of this process ended ({_ending(ending.result())}): nobody can reach it any more\n"
                    "  start it again; a supervisor does so by itself (docs/hosting.md, a unit for systemd)"
                )
            return await working
        finally:
            for task in (working, ending):
                task.cancel()
            await asyncio.wait({working, ending})


@asynccontextmanager
async def joined(
    initial_peers: Sequence[str],
    *,
    host_maddrs: Sequence[str] = (),
    announce_maddrs: Sequence[str] = (),
    identity_path: str | None = None,
    key: str | None = None,
    token: str | None = None,
    listens: bool = True,
) -> AsyncIterator[Joined]:
    """Join a swarm (or, without initial peers, begin one) and leave it with this block.

    In a private swarm, whoever `listens` stores records for others and needs the swarm's `key`, a file; who only looks
    on can do with a `token`. Raises ConfigError, AccessDenied, ClockSkew, ServerUnreachable.
    """
    async with AsyncExitStack() as stack:
        if token is not None and not listens:
            identity = identity_beside(token, identity_path)
        elif identity_path is not None:
            identity = load_identity(identity_path, make=True)
        else:
            identity = SigningKey.new()
        members = None
        if key is not None:
            members = Members.with_key(key, token, identity)
        elif token is not None:
            members = Members.with_token(token, identity)
        p2p = await start_p2p(
            initial_peers,
            host_maddrs=host_maddrs,
            announce_maddrs=announce_maddrs,
            identity=identity,
            listens=listens,
        )
        stack.push_async_callback(stop_p2p, p2p)
        node = await start_dht(p2p, initial_peers, client_mode=not listens, identity=identity, members=members)
        stack.push_async_callback(stop_dht, node)
        yield Joined(p2p=p2p, node=node, members=members)


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

"""A place in a swarm: an identity, a p2p daemon that has to live, a node of the DHT."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P

from petals_tune.errors import ServerError
from petals_tune.net.circuit_relay import Relayed, start_relay
from petals_tune.net.dial_back import PROTOCOL as DIAL_BACK
from petals_tune.net.dial_back import DialBack, dialled_back
from petals_tune.net.hivemind_p2p import on_this_machine, start_dht, start_p2p, stay_known, stop_dht, stop_p2p
from petals_tune.net.members import Members, identity_beside, load_identity
from petals_tune.wire.frames import BROKEN
from petals_tune.wire.signing import SigningKey

logger = logging.getLogger(__name__)

Reach = Literal["auto", "direct", "relay"]  # auto: direct where a peer of the swarm can dial this one
T = TypeVar("T")

OWN_ADDRESSES = 15  # a record has room for them and for that of a relay
_SAME_STOP_S = 2.0  # whoever stops the daemon may be about to stop us too


@dataclass(frozen=True, kw_only=True)
class Joined:
    """This process as a peer of a swarm."""

    p2p: P2P
    node: DHTNode
    members: Members | None  # None: the swarm is open
    own_addresses: tuple[str, ...]
    relayed: Relayed | None  # None: others dial this peer itself

    @property
    def peer(self) -> str:
        return str(self.p2p.peer_id)

    @property
    def daemon_lives(self) -> bool:
        return self.p2p._child is not None and self.p2p._child.returncode is None

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this peer now: the relay comes last, since it is the longer way."""
        if self.relayed is None:
            return self.own_addresses
        return *(address for address in self.own_addresses if not on_this_machine([address])), self.relayed.address

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
    relays: bool = False,
    reach: Reach = "auto",
) -> AsyncIterator[Joined]:
    """Join a swarm (or, without initial peers, begin one) and leave it with this block.

    In a private swarm, whoever `listens` stores records for others and needs the swarm's `key`, a file; who only looks
    on can do with a `token`. One that `relays` carries traffic for those who cannot be dialled; `reach` says how others
    come to this one. Raises ConfigError, AccessDenied, ClockSkew, ServerUnreachable.
    """
    asyncio.get_running_loop().set_exception_handler(_on_exception)
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
        start = partial(
            start_p2p,
            initial_peers,
            host_maddrs=host_maddrs,
            announce_maddrs=announce_maddrs,
            identity=identity,
            listens=listens,
            relays=relays,
        )
        p2p = await (start_relay(start) if relays else start())
        stack.push_async_callback(stop_p2p, p2p)
        relayed: Relayed | None = None
        own_addresses: tuple[str, ...] = ()
        if listens:
            own_addresses = tuple(str(address) for address in await p2p.get_visible_maddrs())[:OWN_ADDRESSES]
            await p2p.add_binary_stream_handler(DIAL_BACK, DialBack(members).serve)
            dialled = None
            if reach == "auto" and not on_this_machine(initial_peers):
                dialled = await dialled_back(p2p, initial_peers, own_addresses, members, given=bool(announce_maddrs))
            if reach == "relay" or dialled is False:
                relayed = await Relayed.find(p2p, initial_peers)
                stack.callback(asyncio.create_task(relayed.keep()).cancel)
        client_mode = not listens or relayed is not None
        node = await start_dht(p2p, initial_peers, client_mode=client_mode, identity=identity, members=members)
        stack.push_async_callback(stop_dht, node)
        stack.callback(asyncio.create_task(stay_known(p2p, node, initial_peers)).cancel)
        yield Joined(p2p=p2p, node=node, members=members, own_addresses=own_addresses, relayed=relayed)


def _on_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody awaits: hivemind's tasks that talk with the daemon fail when it ends, which is said elsewhere."""
    task, error = context.get("future"), context.get("exception")
    of_hivemind = isinstance(task, asyncio.Task) and "ControlClient." in repr(task.get_coro())
    # RuntimeError is uvloop's, at a write to what is closed.
    if of_hivemind and isinstance(error, (*BROKEN, RuntimeError)):
        logger.debug("the daemon is gone: %s", error)
    else:
        loop.default_exception_handler(context)


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

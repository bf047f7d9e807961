"""This process as a peer of a swarm: its identity, its transport and its directory, for clients and servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from petals_tune.errors import Refused, ServerError, ServerUnreachable
from petals_tune.net.background import begin
from petals_tune.net.circuit_relay import Reservation, start_relay
from petals_tune.net.dht.directory import DhtDirectory
from petals_tune.net.dial_back import PROTOCOL as DIAL_BACK
from petals_tune.net.dial_back import DialBack, is_dialable
from petals_tune.net.direct.listener import Listener
from petals_tune.net.direct.transport import DirectOptions, DirectTransport
from petals_tune.net.directory import Directory
from petals_tune.net.hivemind_p2p import HivemindTransport, handle_loop_exception, host_of, on_this_machine, peer_of
from petals_tune.net.members import Members, credentials
from petals_tune.net.stream import ServerStream
from petals_tune.net.transport import Transport
from petals_tune.net.verdict import verdict

Reach = Literal["auto", "direct", "relay"]  # auto: direct where a peer of the swarm can dial this one
T = TypeVar("T")

OWN_ADDRESSES = 15  # a record has room for them and for that of a relay
_SAME_STOP_S = 2.0  # whoever stops the daemon may be about to stop us too


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A peer of a swarm, as this process is one."""

    id: str
    transport: Transport
    directory: Directory
    members: Members | None = None  # None: the swarm is open
    own_addresses: tuple[str, ...] = ()
    reservation: Reservation | None = None  # None: others dial this peer itself
    daemon_ended: asyncio.Task[str] | None = None  # done when the p2p daemon has ended: how; None: there is no daemon

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this peer now: the relay comes last, since it is the longer way."""
        if self.reservation is None:
            return self.own_addresses
        return *(address for address in self.own_addresses if not on_this_machine([address])), self.reservation.address

    @property
    def daemon_lives(self) -> bool:
        return self.daemon_ended is None or not self.daemon_ended.done()

    async def while_daemon_lives(self, work: Coroutine[Any, Any, T], stop: asyncio.Event) -> T:
        """The result of `work`. Raises ServerError where the daemon ends before it, and nobody set `stop`.

        A peer without its daemon answers nobody, and would be announced all the same until its record expires.
        """
        assert self.daemon_ended is not None
        working = asyncio.create_task(work)
        try:
            await asyncio.wait({working, self.daemon_ended}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), _SAME_STOP_S)
            if not working.done() and not stop.is_set():
                raise ServerError(
                    f"the p2p daemon of this process ended ({self.daemon_ended.result()}): nobody can reach it any "
                    "more\n  start it again; a supervisor does so by itself (docs/hosting.md, a unit for systemd)",
                    peer=self.id,
                )
            return await working
        finally:
            working.cancel()
            await asyncio.wait({working})


@asynccontextmanager
async def joined(
    initial_peers: Sequence[str],
    *,
    host_maddrs: Sequence[str] = (),
    announce_maddrs: Sequence[str] = (),
    identity_path: str | None = None,
    key: str | None = None,
    token: str | None = None,
    members: Members | None = None,
    listens: bool = True,
    relays: bool = False,
    reach: Reach = "auto",
    direct: DirectOptions | None = None,
    connect_s: float = 5.0,
) -> AsyncIterator[Peer]:
    """Join a swarm (or, without initial peers, begin one) and leave it with this block.

    In a private swarm, whoever `listens` stores records for others and needs the swarm's `key`, a file; a client or a
    monitor can do with a `token`, or brings `members` read from one. A peer that `relays` carries traffic for those who
    cannot be dialled; `reach` says how others come to this one. With `direct` it opens direct connections where it can,
    and accepts them where it `listens`. `connect_s` limits the question below.

    Raises ConfigError, AccessDenied, ClockSkew, ServerUnreachable.
    """
    asyncio.get_running_loop().set_exception_handler(handle_loop_exception)
    async with AsyncExitStack() as stack:
        if members is None:
            identity, members = credentials(identity_path, key=key, token=token, listens=listens)
        else:
            identity = members.identity
        start = partial(
            HivemindTransport.start,
            initial_peers,
            host_maddrs=host_maddrs,
            announce_maddrs=announce_maddrs,
            identity=identity,
            listens=listens,
            relays=relays,
            swarm="open" if members is None else "private",
        )
        transport = await (start_relay(start) if relays else start())
        stack.push_async_callback(transport.stop)
        daemon_ended = asyncio.create_task(transport.ended())
        stack.callback(daemon_ended.cancel)
        reservation: Reservation | None = None
        own_addresses: tuple[str, ...] = ()
        if listens:
            own_addresses = (await transport.addresses())[:OWN_ADDRESSES]
            await transport.accept(DIAL_BACK, DialBack(members, transport.policy).serve)
            dialable = None
            if reach == "auto" and not on_this_machine(initial_peers):
                dialable = await is_dialable(
                    transport, initial_peers, own_addresses, members, given=bool(announce_maddrs)
                )
            if reach == "relay" or dialable is False:
                reservation = await Reservation.make(transport, initial_peers)
                stack.callback(begin(reservation.renew(), "the renewal of this server's place at its relay").cancel)
        ask_why = partial(_ask_for_the_reason, transport, initial_peers, members, timeout_s=connect_s)
        directory = await DhtDirectory.join(
            transport,
            initial_peers,
            client_mode=not listens or reservation is not None,
            identity=identity,
            members=members,
            ask_why=None if listens else ask_why,
        )
        stack.push_async_callback(directory.leave)
        staying = directory.stay_known(transport, initial_peers)
        stack.callback(begin(staying, "the way by which this peer stays known in the DHT").cancel)
        carrier: Transport = transport
        if direct is not None:
            listener = None
            hosts = list(dict.fromkeys(filter(None, map(host_of, host_maddrs))))
            if listens and hosts:
                listener = await Listener.start(hosts, direct.port)
                stack.callback(listener.close)
            carrier = DirectTransport(transport, members, listener, announced_port=direct.announced_port)
        yield Peer(
            id=transport.id,
            transport=carrier,
            directory=directory,
            members=members,
            own_addresses=own_addresses,
            reservation=reservation,
            daemon_ended=daemon_ended,
        )


async def _ask_for_the_reason(
    transport: Transport, initial_peers: Sequence[str], members: Members | None, *, timeout_s: float
) -> None:
    """Ask the initial peers why the DHT is silent: that of a private swarm does not answer whom it refuses.

    Raises AccessDenied, or what else they refuse, where two say so or there is only one; ServerUnreachable where one of
    several says so and no other one answers. Returns where one of them lets us in, or none answers.
    """

    async def ask(address: str) -> Refused | bool | None:
        """What the peer refuses; None where it does not answer, True where it lets us in."""
        try:
            stream = await ServerStream.open(
                transport, peer_of(address), [address], model=None, members=members, timeout_s=timeout_s
            )
        except Refused as error:
            return error
        except ServerError:
            return None
        await stream.close()
        return True

    by_peer = {peer_of(address): address for address in initial_peers}  # one may have several addresses
    answers = await asyncio.gather(*map(ask, by_peer.values()))
    refused = [answer for answer in answers if isinstance(answer, Refused)]
    if True in answers or not refused:
        return
    if (final := verdict(refused, alone=len(by_peer) == 1)) is not None:
        raise final
    raise ServerUnreachable(
        f"of {len(by_peer)} initial peers only {refused[0].peer} answers, and it says: {refused[0]}",
        peer=refused[0].peer,
    )

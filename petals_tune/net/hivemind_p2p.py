"""hivemind's p2p daemon as a transport: a child process that dials, accepts, encrypts and relays.

Together with hivemind_dht.py and dht_auth.py, all that knows hivemind, its private parts and its exceptions.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from google.protobuf.message import DecodeError
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.multiaddr.exceptions import Error as MultiaddrError

from petals_tune.errors import ClockSkew, ConfigError, ConnectionLost, PetalsTuneError, ServerUnreachable
from petals_tune.files import write_bytes
from petals_tune.net.address_policy import CIRCUIT, AddressPolicy
from petals_tune.net.transport import Connection, Serve, StreamConnection
from petals_tune.wire.signing import SigningKey, identity_bytes

logger = logging.getLogger(__name__)

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
_P2P = bytes.fromhex("a503")  # the code of /p2p/ in a binary multiaddr
_CANNOT_LISTEN = ("failed to listen", "failed to parse multiaddr")  # in the daemon's last words


class HivemindTransport:
    """A running p2p daemon. `start` makes one, `stop` ends it."""

    def __init__(self, p2p: P2P, policy: AddressPolicy):
        self.p2p, self.policy = p2p, policy
        self.id = str(p2p.peer_id)
        self._stopped = False

    @classmethod
    async def start(
        cls,
        initial_peers: Sequence[str] = (),
        *,
        host_maddrs: Sequence[str] = (LOOPBACK,),
        announce_maddrs: Sequence[str] = (),
        identity: SigningKey | None = None,
        listens: bool = True,
        relays: bool = False,
        swarm: Literal["open", "private"] = "open",
    ) -> HivemindTransport:
        """Start a daemon and connect it to `initial_peers`. Its peer id is that of `identity`, or a new one.

        Of the addresses that others announce, it dials those that make sense in its `swarm` (address_policy.py).

        It reaches others through relays, unless its swarm is all on this machine; one that `relays` carries the traffic
        between others. No hole punching and no port mapping: hivemind's defaults ask the network's gateway for ports.
        Raises ConfigError for an address that is none, ServerUnreachable where no initial peer answers.
        """
        for maddr in initial_peers:
            if part_of(maddr, "p2p") is None:
                raise ConfigError(
                    f"swarm.initial_peers: {maddr!r} is not like /ip4/127.0.0.1/tcp/31337/p2p/12D3Koo...",
                    key="swarm.initial_peers",
                    seen=maddr,
                )
        with TemporaryDirectory() as folder:  # the daemon reads its key from a file, and only when it starts
            identity_path = None
            if identity is not None:
                identity_path = Path(folder, "identity")
                write_bytes(identity_path, identity_bytes(identity), private=True, shared=True)
            try:
                # petals_tune/net/circuit_relay.py says why one that relays has a single Go thread.
                with _one_go_thread() if relays else nullcontext(), hivemind_errors():
                    p2p = await P2P.create(
                        initial_peers=list(initial_peers) or None,
                        host_maddrs=list(host_maddrs) if listens else None,
                        announce_maddrs=list(announce_maddrs) or None,
                        identity_path=None if identity_path is None else str(identity_path),
                        check_if_identity_free=False,  # it would start a daemon that asks the gateway for ports
                        dht_mode="server" if listens else "client",
                        no_listen=not listens,
                        auto_nat=False,
                        nat_port_map=False,
                        use_relay=relays or not on_this_machine(initial_peers),
                        use_auto_relay=False,
                        force_reachability="public" if relays else None,
                    )
            except ConnectionLost as error:
                raise _start_error(error, initial_peers, host_maddrs, announce_maddrs, listens) from None
        control = p2p._client.control
        assert isinstance(control._pending_calls, dict)
        control._pending_calls = PendingCalls(control._pending_calls)
        own = [str(address) for address in await p2p.get_visible_maddrs()] if listens else []
        return cls(p2p, await AddressPolicy.make(initial_peers, own=own, swarm=swarm))

    async def stop(self) -> None:
        """End the daemon and wait until it is gone. Idempotent.

        Not by `P2P.shutdown` alone: uvloop learns of a child's end through SIGCHLD, and whoever put that signal's
        handler back meanwhile (Lightning does, after each fit) would make it wait for ever.
        """
        shutdown = asyncio.ensure_future(self.p2p.shutdown())
        await asyncio.sleep(0)  # it sends the signal before it waits
        if not self._stopped and self.p2p._child.returncode is None:
            with suppress(ChildProcessError):  # the loop did notice
                await asyncio.to_thread(os.waitpid, self.p2p._child.pid, 0)
        shutdown.cancel()
        self._stopped = True  # the loop may never learn of the end that was waited for here

    @property
    def alive(self) -> bool:
        """Whether the daemon runs."""
        return not self._stopped and self.p2p._child.returncode is None

    async def ended(self) -> str:
        """Wait until the daemon has ended; returns how, for an error's text."""
        code = await self.p2p._child.wait()
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    async def addresses(self) -> tuple[str, ...]:
        """Multiaddresses at which the daemon listens, the peer id included. Raises ConnectionLost."""
        with hivemind_errors(self.id):
            return tuple(str(address) for address in await self.p2p.get_visible_maddrs())

    async def connect(self, address: str) -> None:
        """Connect to the peer at `address`, which ends in its id; no stream is opened. Raises ConnectionLost.

        It is dialled, whatever it is: not for addresses that others announce.
        """
        await self._connect(peer_of(address), [address])

    async def reach(self, peer: str, addresses: Sequence[str]) -> None:
        """Connect to `peer` at one of `addresses`, as it announced them; no stream is opened. Raises ConnectionLost.

        Those that the policy refuses are not dialled.
        """
        dialled, refused = self.policy.dialled(peer, addresses)
        if dialled:
            await self._connect(peer, dialled)
        elif peer not in await self.connected():
            reasons = "; ".join(f"{address:.256} is {why}" for address, why in refused.items()) or "it announces none"
            raise ConnectionLost(
                f"none of its addresses is dialled: {reasons}\n"
                "  if these are machines of yours: give addresses of the same network as swarm.initial_peers, or make "
                "the swarm private (docs/private-swarms.md); a server behind a router sets swarm.announce_maddrs",
                peer=peer,
            )

    async def _connect(self, peer: str, addresses: Sequence[str]) -> None:
        with hivemind_errors(peer):
            await self.p2p._client.connect(PeerID.from_base58(peer), [encode_address(each) for each in addresses])

    async def connected(self) -> dict[str, str]:
        """The peers that are connected now, and the address of each as it is seen from here. Raises ConnectionLost."""
        with hivemind_errors(self.id):
            peers = await self.p2p.list_peers()
        return {str(peer.peer_id): str(peer.addrs[0]) for peer in peers if peer.addrs}

    async def host(self, peer: str) -> str | None:
        """The IP address at which `peer` is connected; None where it is not, or through a relay. Raises ConnectionLost.

        libp2p has proved that the peer answers there, whatever addresses it or others announce.
        """
        with hivemind_errors(peer):
            peers = await self.p2p.list_peers()
        hosts = (host_of(str(address)) for each in peers if str(each.peer_id) == peer for address in each.addrs)
        return next((host for host in hosts if host is not None), None)

    async def dial(self, peer: str, addresses: Sequence[str], protocol: str) -> Connection:
        """As `Transport.dial`."""
        if addresses:
            await self.reach(peer, addresses)
        with hivemind_errors(peer):
            _, reader, writer = await self.p2p.call_binary_stream_handler(PeerID.from_base58(peer), protocol)
        return StreamConnection(peer, reader, writer)

    async def accept(self, protocol: str, serve: Serve) -> None:
        """As `Transport.accept`."""

        async def handle(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await serve(StreamConnection(str(info.peer_id), reader, writer, remote_address=str(info.addr)))

        with hivemind_errors(self.id):
            await self.p2p.add_binary_stream_handler(protocol, handle)


class PendingCalls(dict[Any, "asyncio.Future[Any]"]):
    """hivemind's calls to the daemon that wait for an answer, without those that were given up.

    An answer to one that was cancelled and is still listed raises InvalidStateError in the task that reads all answers,
    which ends with it: the process would hear nothing any more (`ControlClient._read_from_persistent_conn` in
    hivemind/p2p/p2p_daemon_bindings/control.py).
    """

    def __contains__(self, call: object) -> bool:
        waiting = self.get(call)
        return waiting is not None and not waiting.done()


def _lost(error: Exception, peer: str) -> PetalsTuneError:
    return ConnectionLost(str(error) or type(error).__name__, peer=peer)


def _not_validated(error: Exception, peer: str) -> PetalsTuneError:
    if "local time" in str(error):
        return ClockSkew(
            f"this machine's clock and the swarm's differ by more than 3 s: {error}\n"
            "  set it:  timedatectl set-ntp true"
        )
    return ServerUnreachable(
        f"the swarm cannot reach this server: {error}\n"
        "  check swarm.host_maddrs, and behind a firewall a forwarded port and swarm.announce_maddrs"
    )


# Our errors for what hivemind raises. The built-in ones come from its sockets to the daemon: no such socket, one that
# was closed in the middle of a reply (EOFError), uvloop's at a write to what is closed (RuntimeError); and from ids and
# addresses of other peers that are none (ValueError).
OURS: dict[type[Exception], Callable[[Exception, str], PetalsTuneError]] = {
    ValidationError: _not_validated,
    P2PDaemonError: _lost,
    P2PHandlerError: _lost,
    MultiaddrError: _lost,
    DecodeError: _lost,
    EOFError: _lost,
    OSError: _lost,  # TimeoutError, too
    RuntimeError: _lost,
    ValueError: _lost,
}


@contextmanager
def hivemind_errors(peer: str = "") -> Iterator[None]:
    """Translate errors of hivemind to ours, most to ConnectionLost of `peer`. Around calls of hivemind alone."""
    try:
        yield
    except tuple(OURS) as error:
        raise next(ours for kind, ours in OURS.items() if isinstance(error, kind))(error, peer) from None


def handle_loop_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handler for an event loop: hides the errors of hivemind's background tasks, which fail when the daemon ends."""
    task, error = context.get("future"), context.get("exception")
    of_hivemind = isinstance(task, asyncio.Task) and "ControlClient." in repr(task.get_coro())
    if of_hivemind and isinstance(error, tuple(OURS)):
        logger.debug("the daemon is gone: %s", error)
    else:
        loop.default_exception_handler(context)


def _start_error(
    error: ConnectionLost,
    initial_peers: Sequence[str],
    host_maddrs: Sequence[str],
    announce_maddrs: Sequence[str],
    listens: bool,
) -> PetalsTuneError:
    if listens and any(sign in str(error) for sign in _CANNOT_LISTEN):
        return ConfigError(
            f"swarm.host_maddrs=[{','.join(host_maddrs)}], "
            f"swarm.announce_maddrs=[{','.join(announce_maddrs)}]: the p2p daemon cannot listen: {error}\n"
            "  host_maddrs are addresses of this machine, such as /ip4/0.0.0.0/tcp/31337, at a port that is "
            "free; those of a router in front of it go into announce_maddrs",
            key="swarm.host_maddrs",
            seen=tuple(host_maddrs),
        )
    return ServerUnreachable(
        f"the p2p daemon cannot reach the swarm through {', '.join(initial_peers) or 'no peers'}: {error}\n"
        "  check that the first server runs and prints this address"
    )


def on_this_machine(addresses: Sequence[str]) -> bool:
    """Whether all of `addresses` are of the loopback interface."""
    return all(address.startswith(("/ip4/127.", "/ip6/::1/")) for address in addresses)


def peer_of(address: str) -> str:
    """The peer id at the end of a multiaddress."""
    return address.rpartition("/p2p/")[2]


def part_of(address: str, protocol: str) -> str | None:
    """The value of `protocol` ("ip4", "tcp", "p2p") in a multiaddress; None where it has none, or is no address."""
    try:
        with hivemind_errors():
            return str(Multiaddr(address)[protocol])
    except ConnectionLost:
        return None


def host_of(address: str) -> str | None:
    """The IP address in a multiaddress; None where there is none, or where it is a relay's."""
    return None if CIRCUIT in address else part_of(address, "ip4") or part_of(address, "ip6")


def encode_address(address: str) -> Multiaddr:
    """`address` as the daemon wants it: without the peer that it leads to, and with a relay's id in its own encoding.

    hivemind writes an Ed25519 id as a CID, go-libp2p as the plain multihash.
    Source: libp2p specs, addressing and peer-ids.
    """
    *relays, last = address.split(CIRCUIT)
    parts = []
    for relay in relays:
        place, _, peer = relay.rpartition("/p2p/")
        multihash = PeerID.from_base58(peer).to_bytes()
        parts += [Multiaddr(place).to_bytes(), _P2P, bytes([len(multihash)]), multihash, Multiaddr(CIRCUIT).to_bytes()]
    place = last.partition("/p2p/")[0]
    return Multiaddr(b"".join(parts) + (Multiaddr(place).to_bytes() if place else b""))


@contextmanager
def _one_go_thread() -> Iterator[None]:
    """Environment for daemons that are started inside this block."""
    before = os.environ.get("GOMAXPROCS")
    os.environ["GOMAXPROCS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["GOMAXPROCS"]
        else:
            os.environ["GOMAXPROCS"] = before

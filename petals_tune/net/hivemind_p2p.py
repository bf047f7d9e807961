"""The p2p daemon, hivemind's, started by our own event loop. Shared by clients and servers."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from petals_tune.errors import ClockSkew, ConfigError, ServerUnreachable
from petals_tune.files import write_bytes
from petals_tune.net.dht_auth import MembersOnly, SignedRecords
from petals_tune.net.members import Members
from petals_tune.wire.frames import BROKEN
from petals_tune.wire.signing import SigningKey, identity_bytes

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
LEAVING_S = 3.0
GREET_S = 20.0  # between two greetings, give or take half
CIRCUIT = "/p2p-circuit"  # in an address: what is before it relays
_P2P = bytes.fromhex("a503")  # the code of /p2p/ in a binary multiaddr
_CANNOT_LISTEN = ("failed to listen", "failed to parse multiaddr")  # in the daemon's last words


async def start_p2p(
    initial_peers: Sequence[str] = (),
    *,
    host_maddrs: Sequence[str] = (LOOPBACK,),
    announce_maddrs: Sequence[str] = (),
    identity: SigningKey | None = None,
    listens: bool = True,
    relays: bool = False,
) -> P2P:
    """Start a daemon and connect it to `initial_peers`. Its peer id is that of `identity`, or a new one.

    It reaches others through relays, unless its swarm is all on this machine; one that `relays` carries the traffic
    between others. No hole punching and no port mapping: hivemind's defaults ask the network's gateway for ports.
    Raises ConfigError for an address that is none, ServerUnreachable where no initial peer answers.
    """
    for maddr in initial_peers:
        try:
            Multiaddr(maddr)["p2p"]
        except (ValueError, LookupError):
            raise ConfigError(
                f"swarm.initial_peers: {maddr!r} is not like /ip4/127.0.0.1/tcp/31337/p2p/12D3Koo..."
            ) from None
    with TemporaryDirectory() as folder:  # the daemon reads its key from a file, and only when it starts
        identity_path = None
        if identity is not None:
            identity_path = Path(folder, "identity")
            write_bytes(identity_path, identity_bytes(identity), private=True, shared=True)
        try:
            with _one_go_thread() if relays else nullcontext():  # petals_tune/net/circuit_relay.py says why
                return await P2P.create(
                    initial_peers=list(initial_peers) or None,
                    host_maddrs=list(host_maddrs) if listens else None,
                    announce_maddrs=list(announce_maddrs) or None,
                    identity_path=None if identity_path is None else str(identity_path),
                    check_if_identity_free=False,  # it would start a daemon that asks the network's gateway for ports
                    dht_mode="server" if listens else "client",
                    no_listen=not listens,
                    auto_nat=False,
                    nat_port_map=False,
                    use_relay=relays or not on_this_machine(initial_peers),
                    use_auto_relay=False,
                    force_reachability="public" if relays else None,
                )
        except P2PDaemonError as error:
            if listens and any(sign in str(error) for sign in _CANNOT_LISTEN):
                raise ConfigError(
                    f"swarm.host_maddrs=[{','.join(host_maddrs)}], "
                    f"swarm.announce_maddrs=[{','.join(announce_maddrs)}]: the p2p daemon cannot listen: {error}\n"
                    "  host_maddrs are addresses of this machine, such as /ip4/0.0.0.0/tcp/31337, at a port that is "
                    "free; those of a router in front of it go into announce_maddrs"
                ) from None
            raise ServerUnreachable(
                f"the p2p daemon cannot reach the swarm through {', '.join(initial_peers) or 'no peers'}: {error}\n"
                "  check that the first server runs and prints this address"
            ) from None


def on_this_machine(addresses: Sequence[str]) -> bool:
    """Whether all of `addresses` are of the loopback interface."""
    return all(address.startswith(("/ip4/127.", "/ip6/::1/")) for address in addresses)


def dialled(address: str) -> Multiaddr:
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
    """For daemons that are started in here."""
    before = os.environ.get("GOMAXPROCS")
    os.environ["GOMAXPROCS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["GOMAXPROCS"]
        else:
            os.environ["GOMAXPROCS"] = before


async def start_dht(
    p2p: P2P,
    initial_peers: Sequence[str],
    *,
    client_mode: bool,
    identity: SigningKey | None = None,
    members: Members | None = None,
) -> DHTNode:
    """Join the DHT; what is announced there is signed by `identity`, and a private one is for `members` only.

    Raises ServerUnreachable where no initial peer answers, ClockSkew where the clocks differ too much for the DHT.
    """
    try:
        return await DHTNode.create(
            p2p=p2p,
            initial_peers=list(initial_peers) or None,
            client_mode=client_mode,
            record_validator=SignedRecords(identity),
            authorizer=None if members is None else MembersOnly(members),
        )
    except ValidationError as error:
        if "local time" in str(error):
            raise ClockSkew(
                f"this machine's clock and the swarm's differ by more than 3 s: {error}\n"
                "  set it:  timedatectl set-ntp true"
            ) from None
        raise ServerUnreachable(
            f"the swarm cannot reach this server: {error}\n"
            "  check swarm.host_maddrs, and behind a firewall a forwarded port and swarm.announce_maddrs"
        ) from None
    except (RuntimeError, P2PDaemonError) as error:
        raise ServerUnreachable(
            f"no initial peer answers: {', '.join(initial_peers)} ({error})\n"
            "  check that the first server runs and prints this address; a private swarm answers only those who give "
            "swarm.token=FILE"
        ) from None


async def stay_known(p2p: P2P, node: DHTNode, initial_peers: Sequence[str]) -> None:
    """Greet the peers through which this one joined, again and again, for ever.

    The DHT forgets a peer that did not answer once, and one that was started again knows nobody: without this, those
    who come through it then find an empty swarm.
    """
    while True:
        await asyncio.sleep(GREET_S * random.uniform(0.5, 1.5))
        await asyncio.gather(*(_greet(p2p, node, address) for address in initial_peers))


async def _greet(p2p: P2P, node: DHTNode, address: str) -> None:
    peer = PeerID.from_base58(address.rpartition("/p2p/")[2])
    with suppress(P2PDaemonError, *BROKEN):  # it is away
        async with asyncio.timeout(GREET_S):
            await p2p._client.connect(peer, [dialled(address)])
            await node.protocol.call_ping(peer)


async def stop_dht(node: DHTNode) -> None:
    """Leave the DHT. Its own `shutdown` forgets the task that refreshes its cache, and waits for a daemon that is gone.

    Whoever stops a whole group of processes, as systemd does, has ended the daemon by now.
    """
    with suppress(TimeoutError):
        await asyncio.wait_for(node.shutdown(), LEAVING_S)
    if node.cache_refresh_task is not None:
        node.cache_refresh_task.cancel()


async def stop_p2p(p2p: P2P) -> None:
    """End the daemon and wait until it is gone.

    Not by `p2p.shutdown()` alone: uvloop learns of a child's end through SIGCHLD, and whoever put that signal's handler
    back meanwhile (Lightning does, after each fit) would make it wait for ever.
    """
    shutdown = asyncio.ensure_future(p2p.shutdown())
    await asyncio.sleep(0)  # it sends the signal before it waits
    if p2p._child is not None:
        with suppress(ChildProcessError):  # the loop did notice
            await asyncio.to_thread(os.waitpid, p2p._child.pid, 0)
    shutdown.cancel()

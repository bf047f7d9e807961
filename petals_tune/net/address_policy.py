"""Which of the addresses that other peers announce are dialled: a peer may announce whatever it likes.

An announced address is an IP address and a port that this machine sends bytes to. Without a policy, anybody could make
it send them to a service of its own loopback interface, to a machine of its network that the firewall hides from
others, or, with many peers, all at the same time to a stranger.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

logger = logging.getLogger(__name__)

CIRCUIT = "/p2p-circuit"  # in an address: what is before it relays
MOST_ADDRESSES = 16  # of one peer that are looked at, as many as a record may have
LONGEST_ADDRESS = 256  # characters
RESOLVE_S = 5.0
_WEB_PORTS = (80, 443)  # those below 1024 of a public address that a swarm's server may have
_LOWEST_PORT = 1024
_ID = r"/p2p/[0-9A-Za-z]{1,64}"
_ANNOUNCED = re.compile(
    rf"/ip[46]/(?P<ip>[0-9A-Fa-f.:]+)/(?:tcp/(?P<tcp>[0-9]{{1,5}})|udp/(?P<udp>[0-9]{{1,5}})/quic(?:-v1)?)"
    rf"(?:{_ID}(?:{CIRCUIT}(?:{_ID})?)?)?"
)
_SHARED = ipaddress.IPv4Network("100.64.0.0/10")  # behind a provider's router
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL = ipaddress.IPv6Network("2000::/3")  # the part of IPv6 from which public addresses are

IP = ipaddress.IPv4Address | ipaddress.IPv6Address


class Scope(IntEnum):
    """From where an address is the same machine. Whoever dials one scope dials the wider ones too."""

    PUBLIC = 0
    PRIVATE = 1  # one local network: RFC 1918, unique local, link-local, a provider's shared addresses
    LOOPBACK = 2  # one machine


def scope_of(ip: IP) -> Scope | None:
    """The scope of an IP address; None for one that is no machine's: multicast, reserved, unspecified."""
    if isinstance(ip, ipaddress.IPv6Address):
        if (inside := _ipv4_inside(ip)) is not None:
            return scope_of(inside)
        if ip.is_loopback:
            return Scope.LOOPBACK
        if ip.is_link_local or ip.is_site_local or ip in ipaddress.IPv6Network("fc00::/7"):
            return Scope.PRIVATE
        return Scope.PUBLIC if ip in _GLOBAL and ip.is_global else None
    if ip.is_multicast or ip.is_reserved or ip.packed[0] == 0:
        return None
    if ip.is_loopback:
        return Scope.LOOPBACK
    if ip.is_private or ip.is_link_local or ip in _SHARED:
        return Scope.PRIVATE
    return Scope.PUBLIC


def _ipv4_inside(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address to which packets for `ip` go in the end: mapped, 6to4, Teredo, NAT64."""
    if ip in _NAT64:
        return ipaddress.IPv4Address(ip.packed[-4:])
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a multiaddress such as /ip4/1.2.3.4/tcp/31337/p2p/12D3Koo... leads: of a relayed one, the relay."""

    ip: IP
    port: int


def place_of(address: str) -> Place:
    """Read the place of an address as peers announce them. Raises ValueError, with the reason, for any other text."""
    if len(address) > LONGEST_ADDRESS:
        raise ValueError(f"more than {LONGEST_ADDRESS} characters")
    if address.startswith("/dns"):
        raise ValueError("a DNS name, which may resolve to any address")
    if (found := _ANNOUNCED.fullmatch(address)) is None:
        raise ValueError("not like /ip4/1.2.3.4/tcp/31337/p2p/12D3Koo..., or such a relay's with /p2p-circuit")
    return Place(ip=ipaddress.ip_address(found["ip"]), port=int(found["tcp"] or found["udp"]))


@dataclass(frozen=True, kw_only=True)
class AddressPolicy:
    """Which announced addresses one peer dials. Those that its user gave are dialled, whatever they are."""

    narrowest: Scope = Scope.PUBLIC
    given: frozenset[str] = frozenset()

    @classmethod
    async def make(
        cls, initial_peers: Sequence[str], *, own: Sequence[str], swarm: Literal["open", "private"]
    ) -> AddressPolicy:
        """A policy for one who joins through `initial_peers`; for one who begins a swarm, by its `own` addresses.

        In a private swarm all scopes are dialled: whoever announces there has the owner's token. In an open one, those
        of the initial peers, where none of these is public: a swarm on one machine, or in one network.
        """
        given = frozenset(initial_peers)
        if swarm == "private":
            return cls(narrowest=Scope.LOOPBACK, given=given)
        scopes = [scope for address in initial_peers or own for scope in await _scopes(address)]
        if not scopes or Scope.PUBLIC in scopes:
            return cls(given=given)
        # Whoever listens on all interfaces has a loopback address too: others come from the network.
        return cls(narrowest=max(scopes) if initial_peers else min(scopes), given=given)

    def refusal(self, address: str) -> str | None:
        """Why `address` is not dialled; None: it is."""
        if address in self.given or self._is_relayed_by_given(address):
            return None
        try:
            place = place_of(address)
        except ValueError as error:
            return str(error)
        scope = scope_of(place.ip)
        if scope is None or not 0 < place.port < 2**16:
            return "no machine's address"
        if scope > self.narrowest:
            what = "of a loopback interface" if scope is Scope.LOOPBACK else "of a private network"
            return f"{what}, and swarm.initial_peers are not"
        if scope is Scope.PUBLIC and place.port < _LOWEST_PORT and place.port not in _WEB_PORTS:
            return f"port {place.port} is another service's"
        return None

    def _is_relayed_by_given(self, address: str) -> bool:
        relay, _, behind = address.partition(CIRCUIT)
        return relay in self.given and re.fullmatch(f"(?:{_ID})?", behind) is not None and CIRCUIT in address

    def dialled(self, peer: str, addresses: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """(those of `addresses` that are dialled, why the others are not)."""
        refusals = {address: self.refusal(address) for address in addresses[:MOST_ADDRESSES]}
        refused = {address: why for address, why in refusals.items() if why is not None}
        for address, why in refused.items():
            logger.debug("address %.256r of peer %s is not dialled: %s", address, peer, why)
        return [address for address in refusals if address not in refused], refused


async def _scopes(address: str) -> Iterable[Scope]:
    """The scopes of an address that the user gave, or of this peer; a DNS name has those of what it resolves to now."""
    parts = address.split("/")
    try:
        if len(parts) > 2 and parts[1] in ("dns", "dns4", "dns6"):
            async with asyncio.timeout(RESOLVE_S):
                found = await asyncio.get_running_loop().getaddrinfo(parts[2], None, type=socket.SOCK_STREAM)
            ips = [ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found]
        else:
            ips = [place_of(address).ip]
    except (ValueError, OSError):  # a time-out is one
        return []
    return [scope for ip in ips if (scope := scope_of(ip)) is not None]

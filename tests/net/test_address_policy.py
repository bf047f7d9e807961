"""Which announced addresses are dialled, and which texts are none."""

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from petals_tune.net.address_policy import (
    LONGEST_ADDRESS,
    MOST_ADDRESSES,
    AddressPolicy,
    Place,
    Scope,
    place_of,
    scope_of,
)

ID = "12D3KooWGRUaaqTyQ3mjBWbfu8yVaaWHXtmtzBqbLa9kGDGnkZBi"
RELAY = "QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"
PUBLIC = f"/ip4/8.8.8.8/tcp/31337/p2p/{ID}"


@pytest.mark.parametrize(
    ("ip", "scope"),
    [
        *[
            (ip, Scope.PUBLIC)
            for ip in ("8.8.8.8", "1.2.3.4", "2606:4700::1111", "::ffff:8.8.8.8", "2002:0808:0808::1")
        ],
        *[(ip, Scope.PRIVATE) for ip in ("10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254")],
        *[(ip, Scope.PRIVATE) for ip in ("fc00::1", "fdab::1", "fe80::1", "fec0::1", "::ffff:10.0.0.1", "198.18.0.1")],
        *[(ip, Scope.PRIVATE) for ip in ("2002:c0a8:0101::1", "64:ff9b::a00:1", "::ffff:169.254.169.254")],
        *[(ip, Scope.LOOPBACK) for ip in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1")],
        *[(ip, Scope.LOOPBACK) for ip in ("2002:7f00:0001::1",)],
        *[(ip, None) for ip in ("0.0.0.0", "0.1.2.3", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255")],
        *[(ip, None) for ip in ("::", "ff02::1", "::ffff:0.0.0.0", "::7f00:1", "100::1", "2001:db8::1", "4000::1")],
    ],
)
def test_the_scope_of_an_ip_address(ip, scope):
    assert scope_of(ipaddress.ip_address(ip)) is scope


@pytest.mark.parametrize(
    ("address", "ip", "port"),
    [
        ("/ip4/1.2.3.4/tcp/31337", "1.2.3.4", 31337),
        (f"/ip4/1.2.3.4/tcp/31337/p2p/{ID}", "1.2.3.4", 31337),
        (f"/ip6/2606:4700::1/tcp/80/p2p/{ID}", "2606:4700::1", 80),
        (f"/ip4/1.2.3.4/udp/4001/quic-v1/p2p/{ID}", "1.2.3.4", 4001),
        (f"/ip4/1.2.3.4/udp/4001/quic/p2p/{RELAY}/p2p-circuit/p2p/{ID}", "1.2.3.4", 4001),
        (f"/ip4/1.2.3.4/tcp/4001/p2p/{RELAY}/p2p-circuit", "1.2.3.4", 4001),
    ],
)
def test_where_an_address_leads(address, ip, port):
    assert place_of(address) == Place(ip=ipaddress.ip_address(ip), port=port)


ODD = [
    *("", "/", "abc", "/ip4", "/ip4/", "/ip4/1.2.3.4/tcp", "/tcp/1", "/udp/1", "/unix/tmp/x", "/http", "/p2p/x"),
    *(f"/ip4/{ip}/tcp/1/p2p/{ID}" for ip in ("2130706433", "0x7f.1", "127.1", "010.0.0.1", "1.2.3.4.5", "1.2.3")),
    *(f"/ip4/1.2.3.4/tcp/{port}/p2p/{ID}" for port in ("x", "-1", "", "1e3", "\u0661", "1 ", "123456")),
    *(
        f"/ip4/1.2.3.4/{rest}"
        for rest in ("udp/1", "udp/1/utp", "tcp/1/ws", "tcp/1/tls/ws", "sctp/1", "tcp/1/ip4/127.0.0.1")
    ),
    *(f"/ip6/{ip}/tcp/1/p2p/{ID}" for ip in ("fe80::1%25lo", "fe80::1%lo", "::g", "1::2::3", "[::1]")),
    *(f"/{name}/localhost/tcp/31337/p2p/{ID}" for name in ("dns", "dns4", "dns6", "dnsaddr")),
    *("/dnsaddr/x", "/dns4/" + "a" * 300 + "/tcp/1", "/onion3/x:1", "/ip6zone/x/ip6/::1/tcp/1", "/evil/1.2.3.4/tcp/1"),
    *(f"/p2p-circuit/p2p/{ID}", f"/ip4/1.2.3.4/tcp/1/p2p-circuit/p2p/{ID}", f"/p2p/{RELAY}/p2p-circuit/p2p/{ID}"),
    *(f"{PUBLIC}/p2p-circuit/p2p/{RELAY}/p2p-circuit", f"{PUBLIC}/p2p-circuit/ip4/127.0.0.1/tcp/1/p2p/{ID}"),
    *(
        f"{PUBLIC}\n",
        f"{PUBLIC}/",
        f"/ip4/1.2.3.4/tcp/1/p2p/\u00e9{ID}",
        f"/ip4/1.2.3.4/tcp/1\0/p2p/{ID}",
        "/ip4/\ud800/tcp/1",
    ),
]


@pytest.mark.parametrize("address", ODD, ids=ascii)
def test_what_is_no_announced_address_is_refused_with_a_reason(address):
    with pytest.raises(ValueError, match=r"\S"):
        place_of(address)
    assert AddressPolicy(narrowest=Scope.LOOPBACK).refusal(address)


@given(st.text(max_size=2 * LONGEST_ADDRESS))
@example("/ip6/::ffff:1.2.3.4/tcp/1")
@example("/ip6/1:2:3:4:5:6:7.8.9.10/tcp/1")
@example("/ip4/::1/tcp/1")
def test_any_text_is_dialled_or_refused(text):
    dialled, refused = AddressPolicy(narrowest=Scope.LOOPBACK).dialled("peer", [text, PUBLIC])
    assert PUBLIC in dialled
    assert (text in dialled) != (text in refused)


def addresses(*ips: str, port: int = 31337) -> list[str]:
    return [f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{port}/p2p/{ID}" for ip in ips]


EACH = addresses("8.8.8.8", "192.168.1.5", "127.0.0.1")


@pytest.mark.parametrize(
    ("initial_peers", "own", "dialled"),
    [
        (addresses("8.8.4.4"), addresses("192.168.1.5", "127.0.0.1"), 1),
        (addresses("8.8.4.4", "10.0.0.1"), [], 1),
        (["/dns4/does-not.invalid/tcp/31337/p2p/" + ID], [], 1),
        (addresses("10.0.0.1"), addresses("8.8.8.8"), 2),
        (addresses("127.0.0.1"), [], 3),
        (["/dns4/localhost/tcp/31337/p2p/" + ID], [], 3),
        ([], addresses("127.0.0.1"), 3),
        ([], addresses("127.0.0.1", "192.168.1.5"), 2),
        ([], addresses("127.0.0.1", "192.168.1.5", "8.8.8.8"), 1),
        ([], [], 1),
    ],
)
async def test_what_is_dialled_follows_from_the_initial_peers_or_of_a_swarms_first_server_from_its_own(
    initial_peers, own, dialled
):
    policy = await AddressPolicy.make(initial_peers, own=own, swarm="open")
    assert policy.dialled("peer", EACH)[0] == EACH[:dialled]
    private = await AddressPolicy.make(initial_peers, own=own, swarm="private")
    assert private.dialled("peer", EACH)[0] == EACH, "its members are the owner's"


async def test_what_the_user_gave_is_dialled_and_what_it_relays():
    relay = f"/dns4/localhost/tcp/25/p2p/{RELAY}"
    policy = await AddressPolicy.make([relay, PUBLIC], own=[], swarm="open")
    for address in (relay, f"{relay}/p2p-circuit", f"{relay}/p2p-circuit/p2p/{ID}"):
        assert policy.refusal(address) is None
    for address in (f"{relay}/p2p-circuit/ip4/127.0.0.1/tcp/1", f"{relay}x/p2p-circuit", relay.replace("25", "26")):
        assert policy.refusal(address)


def test_ports_of_other_services_and_more_addresses_than_a_record_has_are_not_dialled():
    policy = AddressPolicy()
    for port, is_dialled in (
        (22, False),
        (25, False),
        (53, False),
        (80, True),
        (443, True),
        (1024, True),
        (65535, True),
    ):
        assert (policy.refusal(addresses("8.8.8.8", port=port)[0]) is None) is is_dialled
    for port in (0, 65536, 99999):
        assert AddressPolicy(narrowest=Scope.LOOPBACK).refusal(addresses("127.0.0.1", port=port)[0])
    many = addresses(*(f"8.8.8.{number}" for number in range(40)))
    assert policy.dialled("peer", many)[0] == many[:MOST_ADDRESSES]


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1", "::ffff:192.168.1.5", "10.0.0.1", "100.64.1.1"])
def test_the_address_of_a_relay_is_checked_alike(ip):
    (address,) = addresses(ip)
    assert "swarm.initial_peers" in (AddressPolicy().refusal(f"{address}/p2p-circuit/p2p/{RELAY}") or "")

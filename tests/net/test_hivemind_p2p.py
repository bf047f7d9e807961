from typing import Any

import pytest

from petals_tune.errors import ClockSkew, ConfigError, ServerUnreachable
from petals_tune.net.dht_auth import MembersOnly
from petals_tune.net.hivemind_p2p import dialled, on_this_machine, start_dht, start_p2p, stop_dht, stop_p2p
from petals_tune.net.members import Members
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import issue

NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWGRUaaqTyQ3mjBWbfu8yVaaWHXtmtzBqbLa9kGDGnkZBi"

ED25519 = NOBODY.rpartition("/")[2]
ED25519_HEX = "0024080112206224b2e7dd2b20e8e69a53736ecc850866c230e627da41cbe398171fb8071b55"
RSA = "QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"
RSA_HEX = "1220d52ebb89d85b02a284948203a62ff28389c57c9f42beec4ec20db76a68911c0b"


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1:31337", "/ip4/127.0.0.1/tcp/31337", "/ip4/127.0.0.1/tcp/1/p2p/", "/ip9/x/p2p/12D3KooW", "x/p2p/y"],
)
async def test_what_is_no_address_is_refused_before_a_daemon_is_started(address):
    with pytest.raises(ConfigError, match=r"swarm\.initial_peers: .* is not like /ip4/127\.0\.0\.1/tcp/31337/p2p/"):
        await start_p2p([address])


@pytest.mark.parametrize("address", ["rubbish", "/ip4/192.0.2.1/tcp/31337"])
async def test_where_it_cannot_listen_is_named(address):
    with pytest.raises(ConfigError, match=rf"swarm\.host_maddrs=\[{address}\].* cannot listen: .*\n  host_maddrs are"):
        await start_p2p(host_maddrs=[address])


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/ip4/10.0.0.5/tcp/31337", "0a000005 06 7a69"),
        (f"/ip4/10.0.0.5/tcp/31337/p2p/{ED25519}", "0a000005 06 7a69"),
        (f"/ip4/10.0.0.5/tcp/31337/p2p/{ED25519}/p2p-circuit", f"0a000005 06 7a69 a503 26 {ED25519_HEX} a202"),
        (
            f"/ip4/10.0.0.5/tcp/31337/p2p/{ED25519}/p2p-circuit/p2p/{RSA}",
            f"0a000005 06 7a69 a503 26 {ED25519_HEX} a202",
        ),
        (f"/ip4/10.0.0.5/tcp/31337/p2p/{RSA}/p2p-circuit/p2p/{ED25519}", f"0a000005 06 7a69 a503 22 {RSA_HEX} a202"),
    ],
)
def test_addresses_as_go_libp2p_encodes_them(address, expected):
    assert dialled(address).to_bytes() == bytes.fromhex("04" + expected)


@pytest.mark.parametrize("address", ["rubbish", "/ip4/10.0.0.5/tcp/1/p2p-circuit", "/p2p-circuit", "/ip4/1/tcp/x"])
def test_what_cannot_be_dialled_is_refused(address):
    with pytest.raises(ValueError, match=r"[Ii]nvalid|parse|empty"):
        dialled(address)


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ([], True),
        (["/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1", "/ip4/127.3.2.1/tcp/1"], True),
        (["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.5/tcp/1"], False),
        (["/dns4/localhost/tcp/1"], False),
    ],
)
def test_a_swarm_on_this_machine_alone(addresses, expected):
    assert on_this_machine(addresses) is expected


async def test_a_swarm_that_does_not_answer_is_named():
    with pytest.raises(ServerUnreachable, match=f"{NOBODY}.*\n  check that the first server runs"):
        await start_p2p([NOBODY], listens=False)


async def test_a_clock_that_is_off_is_an_error_of_its_own(monkeypatch):
    """A swarm whose first server believes that it is a minute later."""
    owner, identity = SigningKey.new(), SigningKey.new()
    token = issue(owner, name="all", peer=identity.peer, hosts=True, expires_s=2**39)
    members = Members(owner.public, identity, lambda _: token)
    sign_response = MembersOnly.sign_response

    async def sign_a_minute_later(self: MembersOnly, response: Any, request: Any) -> None:
        response.dht_time += 60  # only a ping's response has a time
        await sign_response(self, response, request)

    monkeypatch.setattr(MembersOnly, "sign_response", sign_a_minute_later)
    first = await start_p2p(identity=identity)
    node = await start_dht(first, (), client_mode=False, identity=identity, members=members)
    peers = [str(address) for address in await first.get_visible_maddrs()]
    second = await start_p2p(peers, listens=False)
    try:
        with pytest.raises(ClockSkew, match="differ by more than 3 s"):
            await start_dht(second, peers, client_mode=True, members=members)
    finally:
        await stop_p2p(second)
        await stop_dht(node)
        await stop_p2p(first)

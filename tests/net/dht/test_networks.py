"""Networks of peers as real daemons see them."""

import pytest

from petals_tune.errors import ConnectionLost
from petals_tune.net.dht.networks import Networks
from petals_tune.net.hivemind_p2p import HivemindTransport
from tests.net.dht.nodes import key_of


async def test_a_peer_is_of_the_network_that_it_is_connected_from():
    first = await HivemindTransport.start(host_maddrs=["/ip4/127.0.5.1/tcp/0"], identity=key_of("first"))
    try:
        at = await first.addresses()
        second = await HivemindTransport.start(identity=key_of("second"))
        try:
            networks = Networks(second)
            assert await networks.of(first.id) is None
            assert await networks.reach(first.id, at) == "127.0.5.0/24"
            assert await networks.of(first.id) == "127.0.5.0/24"
            assert await networks.reach(key_of("nobody").peer, at) is None, "another peer answers there"
            assert await networks.reach(key_of("nobody").peer, []) is None
        finally:
            await second.stop()
    finally:
        await first.stop()


async def test_a_daemon_that_ended_knows_nobody(monkeypatch: pytest.MonkeyPatch):
    class Gone:
        async def connected(self) -> dict[str, str]:
            raise ConnectionLost("the daemon is gone")

    assert await Networks(Gone()).of("peer") is None  # type: ignore[arg-type]

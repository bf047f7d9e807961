import pytest

from petals_tune.errors import ConfigError, ServerUnreachable
from petals_tune.swarm.p2p import start_p2p

NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWGRUaaqTyQ3mjBWbfu8yVaaWHXtmtzBqbLa9kGDGnkZBi"


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1:31337", "/ip4/127.0.0.1/tcp/31337", "/ip4/127.0.0.1/tcp/1/p2p/", "/ip9/x/p2p/12D3KooW", "x/p2p/y"],
)
async def test_what_is_no_address_is_refused_before_a_daemon_is_started(address):
    with pytest.raises(ConfigError, match=r"swarm\.initial_peers: .* is not like /ip4/127\.0\.0\.1/tcp/31337/p2p/"):
        await start_p2p([address])


async def test_a_swarm_that_does_not_answer_is_named():
    with pytest.raises(ServerUnreachable, match=f"{NOBODY}.*\n  check that the first server runs"):
        await start_p2p([NOBODY], listens=False)

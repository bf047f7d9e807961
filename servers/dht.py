"""Command `python -m servers.dht`: a node of the swarm's DHT that hosts no blocks."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from servers.command import command, stop_on_signals

USAGE = """Run a node of a swarm's directory (its DHT) without blocks: an address that stays when servers come and go.

  python -m servers.dht identity_path=FILE 'swarm.host_maddrs=[/ip4/0.0.0.0/tcp/31337]' [key=value ...]

It prints the address that servers and clients take as swarm.initial_peers.
Options and their defaults; a key below another is typed with a dot:"""


@dataclass(frozen=True, kw_only=True)
class SwarmOptions:
    initial_peers: list[str]
    host_maddrs: list[str]
    announce_maddrs: list[str]
    relay: bool
    key: str | None
    token: str | None


@dataclass(frozen=True, kw_only=True)
class Node:
    """All options; conf/dht.yaml describes each."""

    identity_path: str | None
    swarm: SwarmOptions


def main() -> None:
    """python -m servers.dht [key=value ...]"""
    command(sys.argv[1:], config_name="dht", schema=Node, run=run, usage=USAGE)


def run(options: Node) -> None:
    import uvloop  # this and the imports below are slow; --help should not wait for them

    from petals_tune.net.peer import joined

    async def until_stopped() -> None:
        stop = stop_on_signals()
        swarm = options.swarm
        async with joined(
            swarm.initial_peers,
            host_maddrs=swarm.host_maddrs,
            announce_maddrs=swarm.announce_maddrs,
            identity_path=options.identity_path,
            key=swarm.key,
            token=swarm.token,
            relays=swarm.relay,
            reach="direct",  # a node that others cannot dial is of no use to them
        ) as peer:
            addresses = ",".join(peer.addresses)
            print(f"ready: no blocks; others join with swarm.initial_peers=[{addresses}]", flush=True)
            await peer.while_daemon_lives(stop.wait(), stop)

    uvloop.run(until_stopped())


if __name__ == "__main__":
    main()

"""A peer that only looks on, for tests of real swarms."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from petals_tune.net.members import Members
from petals_tune.net.peer import Peer, joined
from petals_tune.swarm import loop
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan


@contextmanager
def watching(initial_peers: Sequence[str], members: Members | None = None) -> Iterator[Peer]:
    """A client of a swarm, on the background loop."""
    context = joined(initial_peers, members=members, listens=False)
    peer = loop.run(context.__aenter__())
    try:
        yield peer
    finally:
        loop.run(context.__aexit__(None, None, None))


async def servers_of(peer: Peer) -> tuple[ServerRecord, ...]:
    """The servers online of all models in the network."""
    models = {record.model: record.total_blocks for record in await peer.directory.models()}
    found = [
        await peer.directory.snapshot(model, BlockSpan(0, blocks), thorough=True) for model, blocks in models.items()
    ]
    return tuple(record for snapshot in found for record in snapshot.servers)

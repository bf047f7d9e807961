"""A swarm in this process: the code of clients and servers as it is, on a network without p2p daemons."""

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.loading import LoadedBlocks, load_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.net.in_process import InProcessNetwork
from petals_tune.net.peer import Peer
from petals_tune.swarm import client, loop
from petals_tune.wire.records import PROTOCOL, ServerRecord
from petals_tune.wire.span import BlockSpan
from servers.requests.handler import Handler
from servers.scheduling.compute_thread import ComputeThread
from servers.stores.stores import Stores
from tests.servers.peers import LIMITS, stores

_LASTS_S = 1e6
_BUDGET_BYTES = 2**28
_LIMITS = replace(
    LIMITS,
    max_streams=64,
    max_streams_per_client=64,
    max_in_flight=32,
    max_requests_per_s=1e6,
    max_request_s=600.0,
    max_receiving_bytes=2**28,
    max_message_bytes=2**26,
    max_positions=1024,
    max_tokens=4096,
    max_compute_bytes=2**30,
)


@dataclass(frozen=True)
class InProcessSwarm:
    """The servers of a swarm: peers QmServer1, QmServer2, ..."""

    network: InProcessNetwork
    stores: list[Stores]

    def sessions(self, number: int) -> int:
        """How many generation sessions server `number`, from 1 on, keeps."""
        return len(self.stores[number - 1].sessions)

    def kill(self, number: int) -> None:
        """End server `number` as the end of its process would."""

        async def remove() -> None:
            self.network.remove(f"QmServer{number}")

        loop.run(remove())


@contextmanager
def in_process_swarm(
    folder: Path,
    *spans: str,
    quantization: str = "none",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    engine_class: Callable[[LoadedBlocks], Engine] = Engine,
    **limits: Any,
) -> Iterator[InProcessSwarm]:
    """While this lasts, every client of this process joins servers of `spans` that hold the model of `folder`.

    `limits` replace those that the servers have otherwise.
    """
    checkpoint, network = Checkpoint(str(folder)), InProcessNetwork()
    swarm = InProcessSwarm(network, [])
    clients = (f"client {number}" for number in itertools.count())

    @asynccontextmanager
    async def join(*_: object, **__: object) -> AsyncIterator[Peer]:
        yield network.peer(next(clients))

    with ExitStack() as stack:
        for number, span in enumerate(BlockSpan.parse(span) for span in spans):
            loaded = load_blocks(checkpoint, span, quantization=quantization, dtype=dtype, device=device)
            engine, compute = engine_class(loaded), ComputeThread()
            stack.callback(compute.stop)
            record = ServerRecord(
                peer=f"QmServer{number + 1}",
                addresses=(),
                model=checkpoint.digest,
                model_name=str(folder),
                blocks=span,
                total_blocks=loaded.family.total_blocks,
                quantization=quantization,
                dtype=str(dtype).removeprefix("torch."),
            )
            budgets = stores(
                cache_sizes=engine.cache_sizes,
                **dict.fromkeys(("leases", "sessions", "adapters", "sums"), _BUDGET_BYTES),
            )
            swarm.stores.append(budgets)
            handler = Handler(engine, compute, budgets, record, replace(_LIMITS, **limits))
            loop.run(network.peer(record.peer).transport.accept(PROTOCOL, handler.serve))
            loop.run(network.directory.announce(record, lasts_s=_LASTS_S))
        stack.callback(lambda: loop.run(network.close()))
        stack.enter_context(mock.patch.object(client, "joined", join))
        yield swarm

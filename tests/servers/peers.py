"""A handler with a real engine, and clients that may write to it whatever they like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.sizes import CacheSizes
from petals_tune.errors import PetalsTuneError
from petals_tune.net.in_process import InProcessNetwork
from petals_tune.net.members import Members
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Forward, Hello, PutAdapter, Refusal, Welcome
from petals_tune.wire.records import PROTOCOL, ServerRecord
from petals_tune.wire.span import BlockSpan
from servers.requests.admission import RequestLimits
from servers.requests.handler import Handler
from servers.scheduling.compute_thread import ComputeThread
from servers.stores.budgets import Budgets
from servers.stores.stores import Stores
from tests.net.played_peer import LONG_S, PlayedPeer
from tests.servers.parts import load

SPAN = BlockSpan(1, 4)  # of six blocks
HIDDEN = 32
LIMITS = RequestLimits(
    max_streams=8,
    max_streams_per_client=3,
    max_in_flight=4,
    max_requests_per_s=100_000.0,
    max_request_s=60.0,
    max_receiving_bytes=4 * 2**20,
    max_message_bytes=2**20,
    max_positions=64,
    max_tokens=256,
    max_compute_bytes=2**28,
)


@contextmanager
def engine_of(folder: Path) -> Iterator[tuple[Engine, ComputeThread]]:
    compute = ComputeThread(1)
    try:
        yield Engine(load(folder, str(SPAN))), compute
    finally:
        compute.stop()


async def computed(engine: tuple[Engine, ComputeThread]) -> None:
    """Wait until nothing is computed any more: the thread reports to the loop of this test, and outlives it."""
    async with asyncio.timeout(LONG_S):
        while not engine[1].is_idle:
            await asyncio.sleep(0.005)


_MOST_BLOCKS = 64


def even_sizes(token_bytes: int) -> CacheSizes:
    """Caches of `token_bytes` for one position in each block."""
    return CacheSizes(start=0, positions=[token_bytes] * _MOST_BLOCKS, states=[0] * _MOST_BLOCKS)


def stores(*, cache_sizes: CacheSizes | None = None, **max_bytes: int) -> Stores:
    sizes = {"leases": 2**20, "sessions": 2**20, "adapters": 2**20, "sums": 2**20, "stacks": 2**20, **max_bytes}
    return Stores.within(
        Budgets(**sizes), max_lease_age_s=600, max_session_idle_s=600, sizes=cache_sizes or even_sizes(256)
    )


def record_of(peer: str = "server") -> ServerRecord:
    return ServerRecord(
        peer=peer,
        addresses=(),
        model="digest",
        model_name="tiny",
        blocks=SPAN,
        total_blocks=6,
        quantization="none",
        dtype="float32",
    )


def forward(rows: int = 1, positions: int = 2, **fields: Any) -> Forward:
    return Forward(**{"span": SPAN, "hidden": torch.ones(rows, positions, HIDDEN), **fields})


def is_refusal_of(error: PetalsTuneError, refusal: Refusal) -> bool:
    """Whether it has the class of `error` and its fields, be its text what it may."""
    return refusal.error == type(error).__name__ and vars(error).items() <= refusal.fields.items()


class House:
    """One handler, and its clients on a network inside this process."""

    def __init__(
        self,
        engine: tuple[Engine, ComputeThread],
        *,
        limits: RequestLimits = LIMITS,
        kept: Stores | None = None,
        members: Members | None = None,
    ):
        self.stores = kept or stores()
        self.handler = Handler(*engine, self.stores, record_of(), limits, members)
        self._network = InProcessNetwork()

    @asynccontextmanager
    async def stranger(self, client: str = "mallory") -> AsyncIterator[PlayedPeer]:
        """A connection on which nothing was sent yet."""
        server = self._network.find(self._network.peer("server").id)
        await server.accept(PROTOCOL, self.handler.serve)
        before = set(server.serving)
        connection = await self._network.peer(client).transport.dial("server", (), PROTOCOL)
        (serving,) = server.serving.keys() - before
        try:
            yield PlayedPeer(connection)
        finally:
            connection.close()
            async with asyncio.timeout(LONG_S):
                await serving

    @asynccontextmanager
    async def client(self, name: str = "mallory", token: bytes | None = None) -> AsyncIterator[PlayedPeer]:
        """A connection with its greeting behind it."""
        async with self.stranger(name) as peer:
            assert isinstance(await peer.ask(Hello(model="digest", token=token)), Welcome)
            yield peer


def lora(rank: int = 2, **fields: Any) -> AdapterPart:
    a, b = torch.ones(rank, HIDDEN), torch.ones(48, rank)
    return AdapterPart(**{"block": 1, "method": "lora", "module": "mlp.gate_proj", "tensors": [a, b], **fields})


def prompt(positions: int = 2, **fields: Any) -> AdapterPart:
    return AdapterPart(**{"block": 1, "method": "prompt", "tensors": [torch.ones(positions, HIDDEN)], **fields})


def put(*parts: AdapterPart, version: str = "v", span: BlockSpan = SPAN) -> PutAdapter:
    return PutAdapter(version=version, span=span, parts=list(parts))

"""A swarm in this process: the code of clients and servers as it is, joined by socket pairs instead of p2p daemons."""

import asyncio
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.loading import load_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.net.directory import Snapshot
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from servers.requests.admission import RequestLimits
from servers.requests.handler import Handler
from servers.scheduling.compute_thread import ComputeThread
from servers.stores.budgets import Budgets
from servers.stores.stores import Stores

_BUDGET_BYTES = 2**28
_LIMITS = RequestLimits(
    max_streams=64,
    max_streams_per_client=64,
    max_in_flight=32,
    max_requests_per_s=1e6,
    max_request_s=600.0,
    max_receiving_bytes=2**28,
    max_message_bytes=2**26,
    max_positions=1024,
    max_tokens=4096,
)


def _stores(engine: Engine) -> Stores:
    return Stores.within(
        Budgets(leases=_BUDGET_BYTES, sessions=_BUDGET_BYTES, adapters=_BUDGET_BYTES, sums=_BUDGET_BYTES),
        max_lease_age_s=60.0,
        max_session_idle_s=60.0,
        token_bytes=engine.measure_token_bytes(),
    )


class InProcessClient(SwarmClient):
    """Knows its servers from the start, and reaches their handlers over socket pairs."""

    def __init__(self, handlers: Sequence[Handler], model: str):
        self.handlers = {handler.record.peer: handler for handler in handlers}
        self._serving: set[asyncio.Task[None]] = set()
        pipes: Any = SimpleNamespace(
            _client=SimpleNamespace(connect=self._connect), call_binary_stream_handler=self._open
        )
        super().__init__(pipes, mock.Mock(), model, RetryPolicy())

    async def refresh(self) -> None:
        records = tuple(handler.record for handler in self.handlers.values())
        self._snapshot = Snapshot(servers=records, taken_at_s=time.monotonic())

    async def close(self) -> None:
        self._closed = True
        for opening in self._streams.values():
            await (await opening).close()
        await asyncio.gather(*self._serving)

    async def _connect(self, *_: object) -> None: ...

    async def _open(self, peer: Any, protocol: str) -> Any:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=theirs)
        info: Any = SimpleNamespace(peer_id="client")
        serving = asyncio.create_task(self.handlers[peer.to_base58()].serve(info, reader, writer))
        self._serving.add(serving)
        return (None, *await asyncio.open_connection(sock=ours))


@contextmanager
def in_process_swarm(folder: Path, *spans: str) -> Iterator[None]:
    """While this lasts, every client of this process joins servers of `spans` that hold the fp32 model of `folder`."""
    checkpoint = Checkpoint(str(folder))
    with ExitStack() as stack:
        handlers = []
        for number, span in enumerate(BlockSpan.parse(span) for span in spans):
            trimmed = load_blocks(checkpoint, span, quantization="none", dtype=torch.float32)
            engine, compute = Engine(trimmed), ComputeThread()
            stack.callback(compute.stop)
            record = ServerRecord(
                peer=f"QmServer{number + 1}",
                addresses=(),
                model=checkpoint.digest,
                model_name=str(folder),
                blocks=span,
                total_blocks=trimmed.family.total_blocks,
                quantization="none",
                dtype="float32",
            )
            handlers.append(Handler(engine, compute, _stores(engine), record, _LIMITS))

        async def join(*_: object, model: str, **__: object) -> SwarmClient:
            return InProcessClient(handlers, model)

        stack.enter_context(mock.patch.object(SwarmClient, "join", join))
        yield

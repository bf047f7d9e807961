"""Execution of one client's request on the blocks: a request goes in, its reply comes out. No streams."""

from __future__ import annotations

import time
from functools import partial

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.errors import RequestRefused
from petals_tune.wire.codec import INLINE_BYTES
from petals_tune.wire.messages import (
    Backward,
    CollectedSum,
    CollectSum,
    Done,
    Forward,
    Forwarded,
    Gradients,
    Message,
    OpenSession,
    PutAdapter,
    SessionOpened,
    Step,
    Stepped,
)
from petals_tune.wire.tensors import in_format
from servers.requests.admission import Admission
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.fair_queue import Priority
from servers.scheduling.step_batcher import StepBatcher
from servers.scheduling.turns import Turns
from servers.stores.adapters import sum_terms
from servers.stores.stores import Stores


class Executor:
    """Runs requests with one engine, and keeps what their clients may come back for. Used by the event loop alone."""

    def __init__(self, engine: Engine, compute: ComputeThread, stores: Stores, admission: Admission, turns: Turns):
        self._engine, self._compute, self._stores, self._turns = engine, compute, stores, turns
        self._admission, self._limits = admission, admission.limits
        self._steps = StepBatcher(engine, compute)

    async def run(self, client: str, request: Message) -> Message:
        """Return the reply to `request`. Raises PetalsTuneError; RuntimeError is torch's, on input that we let pass."""
        match request:
            case Forward():
                return await self._forward(client, request)
            case Backward():
                return await self._backward(client, request)
            case Step():
                return await self._step(client, request)
            case CollectSum():
                return await self._collect_sum(client, request)
            case OpenSession():
                return self._open_session(client, request)
            case PutAdapter():
                return await self._put_adapter(client, request)
        raise RequestRefused(f"{type(request).__name__} is not a request", reason="kind")

    def check_size(self, hidden: torch.Tensor) -> None:
        """Raises RequestRefused for more than one request may compute; attention's memory grows with S squared."""
        rows, positions, _ = hidden.shape
        if positions > self._limits.max_positions:
            raise RequestRefused(
                f"{positions} positions a row, and this server takes {self._limits.max_positions} at once "
                "(its limits.max_positions)",
                limit="max_positions",
            )
        if rows * positions > self._limits.max_tokens:
            raise RequestRefused(
                f"{rows} rows of {positions} positions, and this server takes {self._limits.max_tokens} positions in "
                "all at once (its limits.max_tokens): send fewer rows, swarm.micro_batch_rows",
                limit="max_tokens",
            )

    async def _forward(self, client: str, request: Forward) -> Forwarded:
        self.check_size(request.hidden)
        forward = partial(self._engine.forward, request, self._adapter(client, request))
        result = await self._compute.run(Priority.FORWARD, forward, client=client)
        lease = None
        if result.graph is not None and client in self._admission:  # it may have left meanwhile
            lease = self._stores.leases.keep(client, result.graph, result.graph_bytes, time.monotonic())
        return Forwarded(
            hidden=await self._in_format(client, result.output, request.reply_format),
            lease=lease,
            compute_s=result.compute_s,
        )

    async def _backward(self, client: str, request: Backward) -> Gradients:
        graph = adapter = None
        if request.lease is not None:
            graph = self._stores.leases.take(client, request.lease, time.monotonic())
        elif request.again is not None:
            self.check_size(request.again.hidden)
            adapter = self._adapter(client, request.again)
        backward = partial(self._engine.backward, request, graph, adapter)
        hidden, gradients = await self._compute.run(Priority.BACKWARD, backward, client=client)
        if request.adapter_sum is None:
            gradients = [gradient.float() for gradient in gradients]
        elif client in self._admission:
            self._stores.sums.add(client, request.adapter_sum, request.term, gradients)
            gradients = []
        return Gradients(
            hidden=None if hidden is None else await self._in_format(client, hidden, request.reply_format),
            adapter=gradients,
        )

    async def _step(self, client: str, request: Step) -> Stepped:
        self.check_size(request.hidden)
        session = self._stores.sessions.get(client, request.session, time.monotonic())
        return Stepped(
            hidden=await self._in_format(client, await self._steps.run(session, request), request.reply_format)
        )

    async def _in_format(self, client: str, tensor: torch.Tensor, wire_format: str) -> torch.Tensor:
        """Prepare a tensor for its reply, in a thread where it is large."""
        if tensor.nbytes <= INLINE_BYTES:
            return in_format(tensor, wire_format)
        return await self._turns.run(client, partial(in_format, tensor, wire_format))

    async def _collect_sum(self, client: str, request: CollectSum) -> CollectedSum:
        terms = self._stores.sums.take(client, request.adapter_sum)
        total = await self._compute.run(Priority.BACKWARD, partial(sum_terms, terms), client=client)
        return CollectedSum(adapter=total, terms=len(terms))

    def _open_session(self, client: str, request: OpenSession) -> SessionOpened:
        self._engine.check_span(request.span)
        adapter = self._adapter(client, request)
        return SessionOpened(session=self._stores.sessions.open(client, request, adapter, time.monotonic()))

    async def _put_adapter(self, client: str, request: PutAdapter) -> Done:
        self._engine.check_span(request.span)
        prepare = partial(self._engine.prepare_adapter, request.parts)
        parts = await self._compute.run(Priority.FORWARD, prepare, client=client)
        self._stores.adapters.put(client, request.version, request.span, parts)
        return Done()

    def _adapter(self, client: str, request: Forward | OpenSession) -> Adapter | None:
        if request.adapter is None:
            return None
        return self._stores.adapters.get(client, request.adapter, request.span)

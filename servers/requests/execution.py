"""Execution of one client's request on the blocks: a request goes in, its reply comes out. No streams."""

from __future__ import annotations

import bisect
import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import msgspec
import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.footprint import Pass
from petals_tune.errors import RequestRefused, SessionLost
from petals_tune.wire.adapter import AdapterPart, add_difference
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
from servers.requests.arriving import ArrivingAdapters
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.fair_queue import Priority
from servers.scheduling.step_batcher import StepBatcher
from servers.scheduling.turns import Turns
from servers.stores.adapters import sum_terms
from servers.stores.stores import Stores

_GB = 2**30

NeededBytes = Callable[[int, int], int]  # of rows and positions


class Executor:
    """Runs requests with one engine, and keeps what their clients may come back for. Used by the event loop alone."""

    def __init__(self, engine: Engine, compute: ComputeThread, stores: Stores, admission: Admission, turns: Turns):
        self._engine, self._compute, self._stores, self._turns = engine, compute, stores, turns
        self._admission, self._limits = admission, admission.limits
        self._arriving = ArrivingAdapters()
        self._steps = StepBatcher(engine, compute, max_compute_bytes=self._limits.max_compute_bytes)

    async def run(self, client: str, request: Message) -> Message:
        """Return the reply to `request`. Raises PetalsTuneError; RuntimeError is torch's, on input that we let pass."""
        await self._arriving.wait(client, request)
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
                return await self._open_session(client, request)
            case PutAdapter():
                return await self._put_adapter(client, request)
        raise RequestRefused(f"{type(request).__name__} is not a request", reason="kind")

    def check_size(self, hidden: torch.Tensor) -> None:
        """Raises RequestRefused for more than its owner lets one request compute, whatever memory it needs."""
        rows, positions, _ = hidden.shape
        most_positions, most_tokens = self._limits.max_positions, self._limits.max_tokens
        if most_positions is not None and positions > most_positions:
            raise RequestRefused(
                f"{positions} positions a row, and this server takes {most_positions} at once "
                "(its limits.max_positions)",
                limit="max_positions",
            )
        if most_tokens is not None and rows * positions > most_tokens:
            raise RequestRefused(
                f"{rows} rows of {positions} positions, and this server takes {most_tokens} positions in "
                "all at once (its limits.max_tokens): send fewer rows, swarm.micro_batch_rows",
                limit="max_tokens",
            )

    def _check_memory(self, needed_bytes: NeededBytes, rows: int, positions: int) -> None:
        """Raises RequestRefused where so many rows of so many positions need more than max_compute_gb."""
        limit_bytes = self._limits.max_compute_bytes
        size_bytes = needed_bytes(rows, positions)
        if size_bytes <= limit_bytes:
            return
        fitting = partial(bisect.bisect_right, x=limit_bytes)
        most_rows = fitting(range(1, rows), key=lambda fewer: needed_bytes(fewer, positions))
        most_positions = fitting(range(1, positions), key=lambda fewer: needed_bytes(1, fewer))
        raise RequestRefused(
            f"{rows} rows of {positions} positions need {size_bytes / _GB:.2f} GB of memory on these blocks, and this "
            f"server has {limit_bytes / _GB:.2f} GB for one request (its limits.max_compute_gb): send at most "
            + (f"{most_rows} of these rows, swarm.micro_batch_rows" if most_rows else f"{most_positions} positions"),
            limit="max_compute_gb",
            fits=most_rows * positions or most_positions,
        )

    async def _forward(self, client: str, request: Forward) -> Forwarded:
        ways, reply_format, lease = self._ways(client, request, with_graph=request.keep), request.reply_format, None
        leases, (rows, positions, _) = self._stores.leases, request.hidden.shape
        with ExitStack() as held:
            way = ways[0]
            if request.keep and client in self._admission:
                for way in ways:
                    kept_bytes = self._engine.footprint.kept_bytes(way, rows, positions)
                    lease = held.enter_context(leases.room(client, kept_bytes, time.monotonic()))
                    if lease is not None:
                        break
            if lease is None:
                request = msgspec.structs.replace(request, keep=False)
            forward = partial(self._engine.forward, request, way.adapter, per_block=way.per_block)
            result = await self._compute.run(Priority.FORWARD, forward, client=client)
            if lease is not None and result.graph is not None:
                kept = leases.fill(client, lease, result.graph, result.graph_bytes, now_s=time.monotonic())
                lease = lease if kept else None  # the client may have left meanwhile
        output, compute_s = result.output, result.compute_s
        del result, forward, request  # what no lease keeps is free while the reply is made
        return Forwarded(hidden=await self._in_format(client, output, reply_format), lease=lease, compute_s=compute_s)

    async def _backward(self, client: str, request: Backward) -> Gradients:
        graph, adapter, per_block = None, None, False
        with ExitStack() as held:
            if request.again is not None:
                way = self._ways(client, request.again, with_graph=True)[0]
                adapter, per_block = way.adapter, way.per_block
                trained = [] if adapter is None else adapter.tensors
            else:
                assert request.lease is not None
                graph = self._stores.leases.take(client, request.lease, time.monotonic())
                held.callback(self._stores.leases.release, client, [request.lease])
                trained = graph.adapter
            if request.adapter_sum is not None and client in self._admission:
                held.enter_context(self._stores.sums.room(client, request.adapter_sum, request.term, trained))
            backward = partial(self._engine.backward, request, graph, adapter, per_block=per_block)
            del graph  # its memory is free as soon as the backward is done
            hidden, gradients = await self._compute.run(Priority.BACKWARD, backward, client=client)
            terms = 0
            if request.adapter_sum is None:
                gradients = [gradient.float() for gradient in gradients]
            elif client in self._admission:
                self._stores.sums.add(client, request.adapter_sum, request.term, gradients)
                gradients = []
                if self._stores.sums.count(client, request.adapter_sum) == request.terms:
                    gradients, terms = await self._sum(client, request.adapter_sum)
        return Gradients(
            hidden=None if hidden is None else await self._in_format(client, hidden, request.reply_format),
            adapter=await self._all_in_format(client, gradients, request.adapter_format),
            terms=terms,
        )

    def _ways(self, client: str, request: Forward, *, with_graph: bool) -> list[Pass]:
        """How a forward can be computed within the memory for one request, the fastest way first.

        With its backward, which may have to repeat it: with a whole graph, or block by block. Raises RequestRefused
        where both need too much.
        """
        self._engine.check_span(request.span)
        self.check_size(request.hidden)
        footprint, (rows, positions, _) = self._engine.footprint, request.hidden.shape
        ways = [
            Pass(
                span=request.span,
                adapter=self._adapter(client, request),
                train=request.train,
                padded=request.padding is not None and not bool(request.padding.all()),
            )
        ]
        if with_graph and footprint.computes_single_blocks(request.span):
            ways.append(dataclasses.replace(ways[0], per_block=True))
        needed_bytes = footprint.training_bytes if with_graph else footprint.forward_bytes

        def least_bytes(rows: int, positions: int) -> int:
            return min(needed_bytes(way, rows, positions) for way in ways)

        self._check_memory(least_bytes, rows, positions)
        return [way for way in ways if needed_bytes(way, rows, positions) <= self._limits.max_compute_bytes]

    async def _step(self, client: str, request: Step) -> Stepped:
        self.check_size(request.hidden)
        session = self._stores.sessions.get(client, request.session, time.monotonic())
        one, (rows, positions, _) = Pass(span=session.span, adapter=session.adapter), request.hidden.shape
        before = min(request.position, session.position)  # the engine refuses a step that leaves some out

        def needed_bytes(rows: int, new: int) -> int:
            return self._engine.footprint.step_bytes(one, rows, new, before + new)

        self._check_memory(needed_bytes, rows, positions)
        self._stores.sessions.make_room(client, request.session, request)
        return Stepped(
            hidden=await self._in_format(client, await self._steps.run(session, request), request.reply_format)
        )

    async def _in_format(self, client: str, tensor: torch.Tensor, wire_format: str) -> torch.Tensor:
        """Prepare a tensor for its reply, in a thread where it is large."""
        if tensor.nbytes <= INLINE_BYTES:
            return in_format(tensor, wire_format)
        return await self._turns.run(client, partial(in_format, tensor, wire_format))

    async def _all_in_format(self, client: str, tensors: list[torch.Tensor], wire_format: str) -> list[torch.Tensor]:
        if wire_format == "float32":
            return tensors
        return [await self._in_format(client, tensor, wire_format) for tensor in tensors]

    async def _collect_sum(self, client: str, request: CollectSum) -> CollectedSum:
        total, terms = await self._sum(client, request.adapter_sum)
        return CollectedSum(adapter=await self._all_in_format(client, total, request.adapter_format), terms=terms)

    async def _sum(self, client: str, number: int) -> tuple[list[torch.Tensor], int]:
        """Take a sum of adapter gradients out of the store: the sum, and of how many terms."""
        with self._stores.sums.taken(client, number) as terms:
            total = await self._compute.run(Priority.BACKWARD, partial(sum_terms, terms), client=client)
        return total, len(terms)

    async def _open_session(self, client: str, request: OpenSession) -> SessionOpened:
        self._engine.check_span(request.span)
        sessions, now_s = self._stores.sessions, time.monotonic()
        if request.fork is None:
            return SessionOpened(session=sessions.open(client, request, self._adapter(client, request), now_s))
        parent = sessions.get(client, request.fork.session, now_s)
        if (request.span, request.adapter) != (parent.span, parent.adapter_version):
            raise RequestRefused("a fork has the blocks and the adapter of the session it comes from", reason="fork")
        sessions.check(request, parent.adapter)
        fork = partial(
            parent.fork,
            request.fork.position,
            request.fork.order,
            rows=request.rows,
            max_length=request.max_length,
        )
        forked = await self._compute.run(Priority.STEP, fork, client=client)  # between two steps of the parent
        if client not in self._admission:
            raise SessionLost(f"client {client} left while its session was forked")
        sessions.recount(client, request.fork.session)
        return SessionOpened(session=sessions.put(client, forked, time.monotonic()))

    async def _put_adapter(self, client: str, request: PutAdapter) -> Done:
        self._engine.check_span(request.span)
        self._engine.hooks.check_places(request.parts)
        adapters, size_bytes = self._stores.adapters, Adapter(tuple(request.parts)).bytes

        def prepare() -> list[AdapterPart]:
            parts = self._engine.prepare_adapter(request.parts)
            try:
                return parts if base is None else add_difference(base.parts, parts)
            except ValueError as error:
                raise RequestRefused(str(error), reason="adapter") from None

        with self._arriving.arrival(client, request):
            base = None if request.base is None else adapters.get(client, request.base, request.span)
            with adapters.room(client, request.version, request.span, size_bytes):
                parts = await self._compute.run(Priority.FORWARD, prepare, client=client)
                adapters.put(client, request.version, request.span, parts, replaces=request.replaces)
        return Done()

    def _adapter(self, client: str, request: Forward | OpenSession) -> Adapter | None:
        if request.adapter is None:
            return None
        return self._stores.adapters.get(client, request.adapter, request.span)

"""The autograd.Function over the network. A batch is cut by rows into micro-batches that travel at once.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.autograd.function import once_differentiable

from petals_tune.copies import finite_flags, to_device, to_host
from petals_tune.errors import RequestRefused, RequestTooLarge
from petals_tune.swarm import loop
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.replies import beyond_dtype
from petals_tune.swarm.sender import fewer
from petals_tune.swarm.sums import AdapterSums
from petals_tune.swarm.trace import CallContext, ChainGradients, Trace
from petals_tune.wire.span import BlockSpan

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RemoteCall:
    """One call through blocks `span`, in micro-batches of at most `rows`."""

    chain: Chain
    span: BlockSpan
    context: CallContext
    rows: int
    has_backward: bool = (
        True  # False under torch.no_grad(), where a Function's inputs may require a gradient all the same
    )

    def for_training(self) -> RemoteCall:
        """The same call with the adapter as servers are given it for a training step."""
        if self.context.adapter is None:
            return self
        adapter = self.chain.calls.adapter_for(self.context.adapter)
        return replace(self, context=replace(self.context, adapter=adapter))

    def forward(self, hidden: torch.Tensor, *, keep: bool, input_grad: bool) -> list[Trace]:
        """Traces in the order of the rows. Where the servers take fewer rows at once, micro-batches are smaller.

        Raises RequestTooLarge where a single row is too large.
        """
        rows, call = min(self.rows, len(hidden)), self.for_training().context if keep else self.context
        traces: dict[int, Trace] = {}  # by first row

        async def go(start: int, stop: int) -> None:
            part, context = hidden[start:stop], call.rows(start, stop)
            traces[start] = await self.chain.forward(part, context, self.span, keep=keep, input_grad=input_grad)

        while True:
            try:
                self._wait_for(all_results([go(start, start + rows) for start in range(0, len(hidden), rows)]))
                return [traces[start] for start in sorted(traces)]
            except BaseException as error:
                KeptTraces(self.chain, list(traces.values()))  # which dies, and gives the leases of the others back
                traces.clear()
                if not isinstance(error, RequestTooLarge):
                    raise
                rows = fewer(rows, error)

    def backward(self, traces: Sequence[Trace], grad: torch.Tensor) -> tuple[torch.Tensor | None, list[ChainGradients]]:
        """(gradient at the input (B, S, H) or None, the adapter's gradients as terms of a sum, in a fixed order)."""
        grads = grad.split([len(trace.hidden) for trace in traces])
        # A single micro-batch has nothing to be summed with: its gradients come back with the backward itself.
        summed = self.context.adapter is not None and len(traces) > 1 and self.chain.calls.sums
        sums: AdapterSums | None = None
        if summed:
            sums = AdapterSums(len(traces))
            for trace in traces:
                sums.forwarded(trace)

        async def back() -> tuple[torch.Tensor | None, list[ChainGradients]]:
            parts = await all_results(
                [
                    self.chain.backward(trace, part, sums=sums, term=number)
                    for number, (trace, part) in enumerate(zip(traces, grads, strict=True))
                ]
            )
            hidden = [part.hidden for part in parts if part.hidden is not None]
            terms = [*parts, *(await self.chain.collect(sums) if sums is not None else [])]
            return torch.cat(hidden) if len(hidden) == len(parts) else None, terms

        return self._wait_for(back())

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        with self.waiting():
            return loop.run(work)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block's time as waiting for the swarm. Raises the error of the first micro-batch that failed."""
        started_s = time.perf_counter()
        try:
            yield
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None  # the others were cancelled
        finally:
            self.chain.client.stats.wait_s += time.perf_counter() - started_s


def loss_is_scaled(device: torch.device) -> bool:
    """Is this forward part of mixed precision in float16, with a client on `device`?

    Its loss is scaled up (torch.amp.GradScaler, Lightning's 16-mixed) until gradients overflow: then the scaler leaves
    the step out and lowers the scale, so gradients that are not finite are no error.
    """
    kind = device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16


def refused_gradient(span: BlockSpan) -> RequestRefused:
    """The error for a gradient at the output of blocks `span` that is not finite."""
    return RequestRefused(
        f"non-finite numbers in the gradient at the output of blocks {span}: the loss or what follows the "
        "blocks made them, no server; lower the learning rate, or clip",
        reason="gradient not finite",
    )


async def all_results(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results, in order. Where one fails, the others are cancelled."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in work]
    return [task.result() for task in tasks]


class KeptTraces:
    """The traces of a call until its backward; leases that no backward will want are given back."""

    def __init__(self, chain: Chain, traces: list[Trace]):
        self.chain, self.traces = chain, traces
        self.leased = any(leg.lease is not None for trace in traces for leg in trace.legs)

    def __del__(self) -> None:
        if self.leased:
            loop.start_task(functools.partial(self.chain.release, self.traces))


class RemoteBlocksFunction(torch.autograd.Function):
    """hidden (B, S, H) -> hidden (B, S, H) through remote blocks; also differentiable in the adapter's tensors.

    What travels is in host memory, also where the model is on a GPU. A gradient that is not finite is sent to no
    server: it is an error, or where the loss is scaled, all gradients from here on are NaN.
    """

    @staticmethod
    def forward(ctx: Any, call: RemoteCall, hidden: torch.Tensor, *adapter: torch.Tensor) -> torch.Tensor:
        keep, scaled = call.has_backward and any(ctx.needs_input_grad), loss_is_scaled(hidden.device)
        (given,) = to_host(hidden)
        # Replies are cast to the dtype of what was sent, and a scaled gradient may be beyond float16.
        input_grad = keep and ctx.needs_input_grad[1]
        traces = call.forward(given.float() if scaled else given, keep=keep, input_grad=input_grad)
        output = _narrowed(call, torch.cat([trace.hidden for trace in traces]), hidden.dtype)
        if keep:
            ctx.call, ctx.kept, ctx.scaled, ctx.dtype = call, KeptTraces(call.chain, traces), scaled, hidden.dtype
            ctx.save_for_backward(*adapter)
        return to_device(output, hidden.device)

    @staticmethod
    @once_differentiable  # a second order would need the frozen weights
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        call: RemoteCall = ctx.call
        # ctx stays as it is, so that retain_graph=True gives the same gradients twice. The leases are spent the first
        # time; the second time the blocks are computed again from the inputs that the traces hold.
        adapter = ctx.saved_tensors  # raises where the adapter was changed in place since the forward, as torch does
        given, *finite = to_host(grad, *finite_flags([grad]))
        if not all(finite):
            if not ctx.scaled:
                raise refused_gradient(call.span)
            nothing = [torch.full_like(tensor, torch.nan) for tensor in adapter]
            return None, torch.full_like(grad, torch.nan) if ctx.needs_input_grad[1] else None, *nothing
        hidden, terms = call.backward(ctx.kept.traces, given)
        ctx.kept.leased = False  # where it failed, some are not spent
        gradients = [to_device(total, own.device) for total, own in zip(summed(call, terms), adapter, strict=True)]
        return None, None if hidden is None else to_device(hidden, grad.device, ctx.dtype), *gradients


def _narrowed(call: RemoteCall, output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`output` in `dtype`. Raises ConfigError for numbers that it cannot hold."""
    narrow = output.to(dtype)
    if output.dtype is not dtype and not narrow.isfinite().all():
        raise beyond_dtype(call.span, output, dtype)
    return narrow


def summed(call: RemoteCall, terms: Sequence[ChainGradients]) -> list[torch.Tensor]:
    """The adapter's gradients in the order of its tensors, summed in the order of `terms`."""
    adapter = call.context.adapter
    if adapter is None:
        return []
    total: list[torch.Tensor] = []
    for block in dict.fromkeys(part.block for part in adapter.parts):
        found = [term.adapter[block] for term in terms if block in term.adapter]
        total += [sum(same[1:], start=same[0]) for same in zip(*found, strict=True)]
    return total

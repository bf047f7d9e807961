"""The autograd.Function over the network: thin on purpose. A batch is cut by rows into micro-batches that travel at once.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from petals_tune.swarm import loop
from petals_tune.swarm.chain import CallContext, Chain, ChainGradients, Trace
from petals_tune.wire.span import BlockSpan


@dataclass(frozen=True, kw_only=True)
class RemoteCall:
    """One call through blocks `span`, in micro-batches of at most `rows`."""

    chain: Chain
    span: BlockSpan
    context: CallContext
    rows: int

    def forward(self, hidden: torch.Tensor, *, keep: bool, input_grad: bool) -> list[Trace]:
        """Traces in the order of the rows."""
        cuts = [(start, min(start + self.rows, len(hidden))) for start in range(0, len(hidden), self.rows)]
        return self._wait_for(
            [
                self.chain.forward(
                    hidden[start:stop],
                    self.context.rows(start, stop),
                    self.span,
                    keep=keep,
                    input_grad=input_grad,
                )
                for start, stop in cuts
            ]
        )

    def backward(self, traces: Sequence[Trace], grad: torch.Tensor) -> list[ChainGradients]:
        """Gradients in the order of the rows."""
        grads = grad.split([len(trace.hidden) for trace in traces])
        return self._wait_for([self.chain.backward(trace, part) for trace, part in zip(traces, grads, strict=True)])

    def _wait_for(self, work: Sequence[Any]) -> list[Any]:
        async def all_of_it() -> list[Any]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(each) for each in work]
            return [task.result() for task in tasks]

        started_s = time.perf_counter()
        try:
            return loop.run(all_of_it())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None  # the first micro-batch that failed; the others were cancelled
        finally:
            self.chain.client.stats.wait_s += time.perf_counter() - started_s


class KeptTraces:
    """The traces of a call until its backward; leases that no backward will want are given back."""

    def __init__(self, chain: Chain, traces: list[Trace]):
        self.chain, self.traces = chain, traces
        self.leased = any(leg.lease is not None for trace in traces for leg in trace.legs)

    def __del__(self) -> None:
        if self.leased:
            loop.soon(_release_all, self.chain, self.traces)


def _release_all(chain: Chain, traces: list[Trace]) -> None:
    for trace in traces:
        task = asyncio.get_running_loop().create_task(chain.release(trace))
        _releasing.add(task)
        task.add_done_callback(_releasing.discard)


_releasing: set[asyncio.Task[None]] = set()  # asyncio keeps no strong reference to a task


class RemoteBlocksFunction(torch.autograd.Function):
    """hidden (B, S, H) -> hidden (B, S, H) through remote blocks; also differentiable in the adapter's tensors."""

    @staticmethod
    def forward(ctx: Any, call: RemoteCall, hidden: torch.Tensor, *adapter: torch.Tensor) -> torch.Tensor:
        keep = any(ctx.needs_input_grad)
        traces = call.forward(hidden.detach(), keep=keep, input_grad=ctx.needs_input_grad[1])
        output = torch.cat([trace.hidden for trace in traces])
        if keep:
            ctx.call, ctx.kept = call, KeptTraces(call.chain, traces)
        return output

    @staticmethod
    @once_differentiable  # a second order would need the frozen weights
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        call: RemoteCall = ctx.call
        # ctx stays as it is, so that retain_graph=True gives the same gradients twice. The leases are spent the first
        # time; the second time the blocks are computed again from the inputs that the traces hold.
        ctx.kept.leased = False
        parts = call.backward(ctx.kept.traces, grad)
        hidden = torch.cat([part.hidden for part in parts]) if ctx.needs_input_grad[1] else None
        return None, hidden, *_summed(call, parts)


def _summed(call: RemoteCall, parts: Sequence[ChainGradients]) -> list[torch.Tensor]:
    """The adapter's gradients in the order of its tensors, summed over micro-batches in the order of the rows."""
    adapter = call.context.adapter
    if adapter is None:
        return []
    total: list[torch.Tensor] = []
    for block in dict.fromkeys(part.block for part in adapter.parts):
        total += [torch.stack(list(same)).sum(0) for same in zip(*(part.adapter[block] for part in parts), strict=True)]
    return total

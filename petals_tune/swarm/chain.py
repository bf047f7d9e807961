"""Forward and backward through a chain of servers.

What a server is asked is in swarm/call.py; what happens when it fails, in swarm/repair.py.
Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import partial

import torch

from petals_tune.errors import LeaseLost
from petals_tune.swarm.call import Calls
from petals_tune.swarm.hand_over import Pass
from petals_tune.swarm.repair import Repair
from petals_tune.swarm.retry import Attempts
from petals_tune.swarm.routes.route import Hop
from petals_tune.swarm.sums import AdapterSums, PartialSum, Term
from petals_tune.swarm.trace import CallContext, ChainGradients, Leg, Trace, stages_of
from petals_tune.wire.span import BlockSpan


class Chain:
    """Calls through the blocks of one model on one swarm. All methods run on the background loop."""

    def __init__(self, calls: Calls, repair: Repair | None = None):
        self.calls, self.client = calls, calls.client
        self.repair = repair or Repair(calls.client)

    async def forward(
        self, hidden: torch.Tensor, context: CallContext, span: BlockSpan, *, keep: bool, input_grad: bool
    ) -> Trace:
        """Run blocks `span` on `hidden` (B, S, H). With `keep`, servers keep their graphs where these fit.

        Raises UncoveredBlocks, SwarmTimeout, RequestTooLarge for more than servers take at once, and what they refuse.
        """
        legs: list[Leg] = []
        current = hidden

        async def go(route: Sequence[Hop]) -> AsyncGenerator[int, None]:
            nonlocal current
            needed = legs[-1].stage.output_grad if legs else input_grad
            await self.calls.choice.made(route)
            stages = stages_of(route, context, keep=keep, input_grad=needed)
            async with self.calls.forwards(stages, current, context) as along:
                for stage in stages:
                    request = partial(self.calls.forward, stage, current, context, along)
                    leg, current = await self.repair.supply_missing(request)
                    legs.append(leg)
                    yield stage.hop.span.stop

        try:
            size = self.calls.size(hidden, context, keep=keep)
            await self.repair.along_route(span, go, work=size.tokens, size=size)
        except BaseException:
            await self.calls.release(legs)
            raise
        return Trace(hidden=current, context=context, legs=tuple(legs))

    async def backward(
        self,
        trace: Trace,
        grad: torch.Tensor,
        *,
        sums: AdapterSums | None = None,
        term: int = 0,
        attempts: Attempts | None = None,
    ) -> ChainGradients:
        """Gradients for `grad` (B, S, H) at the output of `trace`. Raises as `forward` does.

        A leg whose server lost the graph is computed again from its input; one whose server is gone, elsewhere.
        With `sums`, servers keep the adapter's gradients and add them up; see `collect`.
        """
        attempts = attempts or self.repair.attempts()
        total = ChainGradients(hidden=grad)
        async with self.calls.backwards(self._with_leases(trace), trace.context, sums, term) as along:
            for leg in reversed(trace.legs):
                if total.hidden is None or not leg.stage.output_grad:  # nothing in front needs a gradient
                    total.hidden = None
                    break
                found = await self._leg_back(leg, total.hidden, trace.context, along, attempts, sums, term)
                total.adapter.update(found.adapter)
                total.hidden = found.hidden
        return total

    def _with_leases(self, trace: Trace) -> list[Leg]:
        """From the last leg on, as long as each has a server that kept its graph."""
        legs = []
        for leg in reversed(trace.legs):
            if leg.lease is None or not leg.stage.output_grad or self.client.lost(leg.hop.server):
                break
            legs.append(leg)
            if not leg.stage.input_grad:
                break
        return legs

    async def _leg_back(
        self,
        leg: Leg,
        grad: torch.Tensor,
        context: CallContext,
        along: Pass,
        attempts: Attempts,
        sums: AdapterSums | None = None,
        term: int = 0,
    ) -> ChainGradients:
        """The gradients of one leg, from the server that went forward or, where it is lost, from others."""

        async def there() -> ChainGradients:
            nonlocal leg
            try:
                return await self.calls.backward(leg, grad, context, along, sums=sums, term=term)
            except LeaseLost:
                leg = replace(leg, lease=None)  # the next time its input goes along
                raise

        async def elsewhere() -> ChainGradients:
            self.client.stats.recomputations += 1
            # Attempts of its own: a server that goes forward and never back would put the deadline off each time.
            trace = await self.forward(leg.hidden, context, leg.hop.span, keep=True, input_grad=leg.stage.input_grad)
            return await self.backward(trace, grad, sums=sums, term=term, attempts=attempts)

        if self.client.lost(leg.hop.server):
            return await elsewhere()
        return await self.repair.with_fallback(there, elsewhere, attempts, leg.hop.span)

    async def collect(self, sums: AdapterSums) -> list[ChainGradients]:
        """The adapter's gradients that servers added up. What a lost server had is computed again elsewhere."""
        collected = await asyncio.gather(*(self._collect(partial_sum) for partial_sum in sums.in_order()))
        return [gradients for each in collected for gradients in each]

    async def _collect(self, partial_sum: PartialSum) -> list[ChainGradients]:
        if not partial_sum.terms:
            return []
        attempts, span = self.repair.attempts(), partial_sum.hop.span

        async def again() -> list[ChainGradients]:
            terms = sorted(partial_sum.terms, key=lambda term: term.place)
            found = [await self._term_again(term) for term in terms]
            self.repair.made_progress(attempts, span)
            return found

        async def collected() -> list[ChainGradients] | None:
            found = await self.calls.collect(partial_sum)
            return None if found is None else [found]

        found = await self.repair.with_fallback(collected, again, attempts, span)
        return await again() if found is None else found

    async def _term_again(self, term: Term) -> ChainGradients:
        """The adapter's gradients of one term of a lost sum."""
        stage = replace(term.leg.stage, input_grad=False)
        leg = replace(term.leg, stage=stage, lease=None)
        return await self._leg_back(leg, term.grad, term.context, Pass(), self.repair.attempts())

    async def release(self, traces: Sequence[Trace]) -> None:
        """Give the leases of `traces` back."""
        await self.calls.release([leg for trace in traces for leg in trace.legs])

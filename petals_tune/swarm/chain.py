"""Forward and backward along a route, with repair: the only place where work is tried again.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import torch

from petals_tune.errors import BadReply, LeaseLost, NotFinite, Retriable, ServerError
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.hand_over import Ask, AskAnything, HandOverRule, HandOverRules, Relay
from petals_tune.swarm.retry import Attempts, Notices
from petals_tune.swarm.route import Hop
from petals_tune.swarm.sums import AdapterSums, PartialSum, Term
from petals_tune.swarm.trace import CallContext, ChainGradients, Leg, Trace
from petals_tune.swarm.uploads import AdapterUploads
from petals_tune.wire.messages import (
    Backward,
    CollectedSum,
    CollectSum,
    Forward,
    Forwarded,
    Gradients,
    Release,
    carrying,
)
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import WireFormat, in_format

logger = logging.getLogger(__name__)


class Chain:
    """Calls through the blocks of one model on one swarm. All methods run on the background loop."""

    def __init__(
        self,
        client: SwarmClient,
        *,
        wire_format: WireFormat = "float32",
        grad_format: WireFormat = "float32",
        hand_over: HandOverRule = "auto",
    ):
        self.client = client
        self.hand_overs = HandOverRules(client, hand_over)
        self.wire_format, self._grad_format = wire_format, grad_format
        self._notices = Notices()
        self.uploads = AdapterUploads(client)

    async def forward(
        self,
        hidden: torch.Tensor,
        context: CallContext,
        span: BlockSpan,
        *,
        keep: bool,
        input_grad: bool,
        attempts: Attempts | None = None,
    ) -> Trace:
        """Run blocks `span` on `hidden` (B, S, H). With `keep`, servers keep their graphs where these fit.

        Raises UncoveredBlocks, SwarmMismatch, SwarmTimeout, or RequestRefused for what no server would accept.
        """
        attempts = attempts or Attempts(self.client.policy, time.monotonic())
        work = hidden.shape[0] * hidden.shape[1]
        legs: list[Leg] = []
        current, start = hidden, span.start
        while start < span.stop:
            try:
                route = await self.client.route(BlockSpan(start, span.stop), work=work)
                with _reserved(self.client, route, work):
                    for hop in route:
                        self.uploads.begin(hop, context)
                    async with self.relay(context) as relay:
                        requests = self._forwards(route, current, context, keep=keep, input_grad=input_grad)
                        relay.send_ahead(route, requests.__getitem__)
                        for hop, request in zip(route, requests, strict=True):
                            leg, current = await self._go(hop, carrying(request, current), context, relay.ask)
                            legs.append(leg)
                            start, input_grad = hop.span.stop, leg.output_grad
                            self.moved_on(attempts)
            except Retriable as error:
                await self.pause(attempts, error)
        return Trace(hidden=current, context=context, legs=tuple(legs))

    def _forwards(
        self, route: Sequence[Hop], hidden: torch.Tensor, context: CallContext, *, keep: bool, input_grad: bool
    ) -> list[Forward]:
        """What to ask the servers of `route`, each with `hidden` (B, S, H) for now."""
        requests = []
        for hop in route:
            adapted = bool(context.adapter_on(hop.span))
            request = Forward(
                span=hop.span,
                hidden=hidden,
                padding=context.padding,
                positions=context.positions,
                adapter=context.adapter.version if context.adapter and adapted else None,
                keep=keep and (input_grad or adapted),
                input_grad=input_grad,
                train=context.train,
                seed=context.seed,
                reply_format=self.wire_format,
            )
            requests.append(request)
            input_grad = input_grad or adapted
        return requests

    async def _go(self, hop: Hop, request: Forward, context: CallContext, ask: Ask) -> tuple[Leg, torch.Tensor]:
        reply = await ask(hop, self._packed(request))
        if not isinstance(reply, Forwarded):
            raise self.bad_reply(hop, f"a {type(reply).__name__} in answer to Forward")
        output = self.checked(hop, reply.hidden, request.hidden)
        tokens = request.hidden.shape[0] * request.hidden.shape[1]
        self.client.load.measured(hop.server, reply.compute_s, tokens, len(hop.span))
        return Leg(hop=hop, request=request, lease=reply.lease), output

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
        attempts = attempts or Attempts(self.client.policy, time.monotonic())
        total = ChainGradients(hidden=grad)
        async with self.relay(trace.context) as relay:
            legs = self._with_leases(trace)
            relay.send_ahead(
                [leg.hop for leg in legs],
                lambda n: self._backward(legs[n], legs[n].request.hidden, _sum_of(legs[n], sums), term),
            )
            for leg in reversed(trace.legs):
                if total.hidden is None:  # nothing below needs a gradient
                    break
                gradients = await self._back(leg, trace.context, total.hidden, attempts, sums, term, relay.ask)
                self.moved_on(attempts)
                total.adapter.update(gradients.adapter)
                total.hidden = gradients.hidden
        return total

    def _with_leases(self, trace: Trace) -> list[Leg]:
        """From the last leg on, as long as each has a server that kept its graph."""
        legs = []
        for leg in reversed(trace.legs):
            if leg.lease is None or not leg.output_grad or self.client.lost(leg.hop.server):
                break
            legs.append(leg)
            if not leg.request.input_grad:
                break
        return legs

    async def _back(
        self,
        leg: Leg,
        context: CallContext,
        grad: torch.Tensor,
        attempts: Attempts,
        sums: AdapterSums | None,
        term: int,
        ask: Ask,
    ) -> ChainGradients:
        if not leg.output_grad:
            return ChainGradients()
        if not self.client.lost(leg.hop.server):
            try:
                return await self._back_there(leg, context, grad, sums, term, ask)
            except ServerError as error:
                await self.pause(attempts, error)
        self.client.stats.recomputations += 1
        # Attempts of its own: a server that goes forward and never back would put the deadline off each time.
        request = leg.request
        trace = await self.forward(request.hidden, context, leg.hop.span, keep=True, input_grad=request.input_grad)
        return await self.backward(trace, grad, sums=sums, term=term, attempts=attempts)

    async def _back_there(
        self, leg: Leg, context: CallContext, grad: torch.Tensor, sums: AdapterSums | None, term: int, ask: Ask
    ) -> ChainGradients:
        """The gradients of a leg from the server that went forward, which computes it again where it kept no graph."""
        partial = _sum_of(leg, sums)
        if leg.lease is not None:
            try:
                return await self._gradients(leg, context, self._backward(leg, grad, partial, term), partial, grad, ask)
            except LeaseLost:
                pass
        self.client.stats.recomputations += 1
        again = self._backward(leg, grad, partial, term, again=True)
        return await self._gradients(leg, context, again, partial, grad, self.asks(context))

    def _backward(
        self, leg: Leg, grad: torch.Tensor, partial: PartialSum | None, term: int, *, again: bool = False
    ) -> Backward:
        """What to ask of the server of `leg`, which has its graph or, with `again`, has to make it first."""
        return Backward(
            lease=None if again else leg.lease,
            again=self._packed(msgspec.structs.replace(leg.request, keep=False)) if again else None,
            grad=in_format(grad, self._grad_format),
            adapter_sum=None if partial is None else partial.number,
            term=term,
            reply_format=self._grad_format,
        )

    async def _gradients(
        self,
        leg: Leg,
        context: CallContext,
        request: Backward,
        partial: PartialSum | None,
        grad: torch.Tensor,
        ask: Ask,
    ) -> ChainGradients:
        hop = leg.hop
        reply = await ask(hop, request)
        if not isinstance(reply, Gradients):
            raise self.bad_reply(hop, f"a {type(reply).__name__} in answer to Backward")
        result = ChainGradients()
        if leg.request.input_grad:
            if reply.hidden is None:
                raise self.bad_reply(hop, "no gradient at the input")
            result.hidden = self.checked(hop, reply.hidden, leg.request.hidden)
        if partial is None:
            result.adapter = self._by_block(hop, context, reply.adapter)
        else:
            partial.terms.append(Term(leg=leg, context=context, grad=grad, place=request.term))
        return result

    def _by_block(self, hop: Hop, context: CallContext, adapter: list[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
        parts = context.adapter_on(hop.span)
        if len(adapter) != sum(len(part.tensors) for part in parts):
            raise self.bad_reply(hop, f"{len(adapter)} gradients for the adapter")
        by_block: dict[int, list[torch.Tensor]] = {}
        gradients = iter(adapter)
        for part in parts:
            checked = [self.checked(hop, next(gradients), tensor) for tensor in part.tensors]
            by_block.setdefault(part.block, []).extend(checked)
        return by_block

    async def collect(self, sums: AdapterSums) -> list[ChainGradients]:
        """The adapter's gradients that servers added up. What a lost server had is computed again elsewhere."""
        collected = await asyncio.gather(*(self._collect(partial) for partial in sums.in_order()))
        return [gradients for each in collected for gradients in each]

    async def _collect(self, partial: PartialSum) -> list[ChainGradients]:
        if not partial.terms:
            return []
        attempts = Attempts(self.client.policy, time.monotonic())
        try:
            collected = await self._collected(partial)
            if collected is not None:
                return [collected]
        except ServerError as error:
            attempts.failed(error, time.monotonic())  # no pause: its terms go elsewhere
            self.client.stats.retries += 1
        again = []
        for term in sorted(partial.terms, key=lambda term: term.place):
            lost = msgspec.structs.replace(term.leg.request, input_grad=False)
            leg = replace(term.leg, request=lost, lease=None)
            anew = Attempts(self.client.policy, time.monotonic())
            again.append(await self._back(leg, term.context, term.grad, anew, None, 0, self.asks(term.context)))
        self.moved_on(attempts)
        return again

    async def _collected(self, partial: PartialSum) -> ChainGradients | None:
        """The sum that a server has; None where it is not the one of our terms."""
        hop = partial.hop
        reply = await self.client.ask(hop.server, CollectSum(adapter_sum=partial.number))
        if not isinstance(reply, CollectedSum):
            raise self.bad_reply(hop, f"a {type(reply).__name__} in answer to CollectSum")
        # A backward that we gave up and repeated elsewhere may be in the sum all the same: then it is not ours.
        if reply.terms != len(partial.terms):
            return None
        return ChainGradients(adapter=self._by_block(hop, partial.terms[0].context, reply.adapter))

    async def release(self, trace: Trace) -> None:
        """Give the leases of `trace` back."""
        for leg in trace.legs:
            stream = self.client.open_stream(leg.hop.server)
            if leg.lease is not None and stream is not None:
                await stream.notify(Release(leases=[leg.lease]))

    def relay(self, context: CallContext) -> Relay:
        """A way through several servers that may hand their outputs on."""
        return Relay(self.client, self.hand_overs, self.asks(context))

    def asks(self, context: CallContext) -> AskAnything:
        """Asks a server that is given the adapter before."""
        return lambda hop, request: self.uploads.ask(hop, request, context)

    async def pause(self, attempts: Attempts, error: Retriable) -> None:
        """Wait before the work that failed is tried again. Raises what `Attempts.failed` raises."""
        now_s = time.monotonic()
        pause_s = attempts.failed(error, now_s)
        stats, stuck_s = self.client.stats, now_s - attempts.since_s
        stats.retries += 1
        if self._notices.due(attempts.since_s, now_s):
            since = time.strftime("%H:%M:%S", time.localtime(time.time() - stuck_s))
            logger.warning(
                "waiting since %s, and until swarm.timeout_s=%g s are over: %s", since, attempts.policy.timeout_s, error
            )
        self.client.refresh_soon()
        await asyncio.sleep(pause_s)

    def moved_on(self, attempts: Attempts) -> None:
        """A server completed its part."""
        now_s = time.monotonic()
        if attempts.count:
            logger.info("went on after %.2f s; what had failed: %s", now_s - attempts.since_s, attempts.server_error)
        attempts.moved_on(now_s)

    def _packed(self, request: Forward) -> Forward:
        return msgspec.structs.replace(request, hidden=in_format(request.hidden, self.wire_format))

    def checked(self, hop: Hop, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """`tensor` in the dtype of `like`. A server that answers with another shape or non-finite values is banned."""
        if tensor.shape != like.shape or not tensor.is_floating_point():
            raise self.bad_reply(hop, f"{tuple(tensor.shape)} {tensor.dtype} where {tuple(like.shape)} floats were due")
        if not torch.isfinite(tensor).all():
            raise self.bad_reply(hop, "non-finite numbers", NotFinite)
        return tensor.to(like.dtype)

    def bad_reply(self, hop: Hop, what: str, kind: type[BadReply] = BadReply) -> BadReply:
        error = kind(f"server {hop.server.peer} returned {what} from blocks {hop.span}")
        self.client.failed(hop.server, error)
        return error


def _sum_of(leg: Leg, sums: AdapterSums | None) -> PartialSum | None:
    """Where the adapter's gradients of `leg` are added up; None where there are none, or they come back at once."""
    return None if sums is None or leg.request.adapter is None else sums.on(leg.hop)


class _reserved:
    """While a route is gone, its servers count as busy with it, so that the next route may take another way."""

    def __init__(self, client: SwarmClient, route: tuple[Hop, ...], work: int):
        self._load, self._work = client.load, [(hop.server.peer, work * len(hop.span)) for hop in route]

    def __enter__(self) -> None:
        for peer, work in self._work:
            self._load.take(peer, work)

    def __exit__(self, *exc: object) -> None:
        for peer, work in self._work:
            self._load.give_back(peer, work)

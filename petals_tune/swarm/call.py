"""One request to one server: built once, sent (swarm/sender.py), and its reply checked once.

Nothing is tried again here: what fails, raises (swarm/repair.py). Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import replace
from typing import Protocol

import torch

from petals_tune.errors import BadReply
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.formats import Formats
from petals_tune.swarm.hand_over import Pass
from petals_tune.swarm.line import FormatChoice
from petals_tune.swarm.replies import bad_reply, check_tensor, expect, gradients_by_block
from petals_tune.swarm.routes.limits import Size
from petals_tune.swarm.routes.round_trips import HandOverRule
from petals_tune.swarm.routes.route import Hop
from petals_tune.swarm.sender import Sender
from petals_tune.swarm.sums import AdapterSums, PartialSum, Term, WholeSum
from petals_tune.swarm.trace import CallContext, ChainGradients, Leg, Stage
from petals_tune.swarm.versions import AdapterVersions
from petals_tune.wire.adapter import AdapterVersion
from petals_tune.wire.messages import (
    Backward,
    CloseSession,
    CollectedSum,
    CollectSum,
    Fork,
    Forward,
    Forwarded,
    Gradients,
    OpenSession,
    Release,
    SessionOpened,
    Step,
    Stepped,
)
from petals_tune.wire.tensors import format_bytes

EnteredPass = AbstractAsyncContextManager[Pass]


class Observer(Protocol):
    """Sees what servers did, after each request; the next one waits for it."""

    async def on_forward(self, leg: Leg, context: CallContext, output: torch.Tensor) -> object | None:
        """Returns what is to be kept with the leg, as its `shadow`."""
        ...

    async def on_backward(self, leg: Leg, context: CallContext, grad: torch.Tensor, found: ChainGradients) -> None: ...

    async def on_release(self, leg: Leg) -> None: ...


class Calls:
    """Requests to the servers of one swarm. All methods run on the background loop."""

    def __init__(
        self,
        client: SwarmClient,
        *,
        formats: Formats,
        hand_over: HandOverRule = "auto",
        sums: bool = True,
        observer: Observer | None = None,
    ):
        """With `sums`, servers add up an adapter's gradients over the micro-batches of a backward."""
        self.client, self.formats = client, formats
        self.choice = FormatChoice(client, formats)
        self.versions = AdapterVersions()
        self._sender = Sender(client, hand_over)
        self.hand_over, self.sums = hand_over, sums
        self.observer = observer

    def size(self, hidden: torch.Tensor, context: CallContext, *, keep: bool) -> Size:
        """How much a forward of `hidden` (B, S, H) brings to a server at most; with `keep`, its backward counts too."""
        rows, positions, _ = hidden.shape
        option = self.formats.hidden
        widths = self.client.dtypes if option == "auto" else {option}
        hidden_bytes = max(format_bytes(hidden.shape, each) for each in widths)
        masks = [mask for mask in (context.padding, context.positions) if mask is not None]
        return Size(
            tokens=rows * positions,
            positions=positions,
            message_bytes=hidden_bytes * (2 if keep else 1) + sum(mask.nbytes for mask in masks),
        )

    # Training

    def adapter_for(self, adapter: AdapterVersion) -> AdapterVersion:
        """The version that servers are given for a training step: on a slow line, a difference from an earlier one."""
        return self.versions.next(adapter) if self.formats.slow and self.formats.auto else adapter

    def forwards(self, stages: Sequence[Stage], like: torch.Tensor, context: CallContext) -> EnteredPass:
        """A pass of `forward` along `stages`, for hidden states of the shape of `like`; adapters are on their way."""
        self._sender.begin_uploads([stage.hop for stage in stages], context)
        empty = like[:, :, :0]

        def request(number: int) -> Forward:
            return self._forward(stages[number], context, empty)

        return self._sender.in_pass([stage.hop for stage in stages], request, context, width=like.shape[2])

    async def forward(
        self, stage: Stage, hidden: torch.Tensor, context: CallContext, along: Pass
    ) -> tuple[Leg, torch.Tensor]:
        """Run the blocks of `stage` on `hidden` (B, S, H); returns the leg that was gone and the output (B, S, H)."""

        def build(tensor: torch.Tensor) -> Forward:
            return self._forward(stage, context, tensor)

        tensor = self.formats.hidden_for(stage.hop.server, hidden)
        answer = await self._sender.send(stage.hop, tensor, build, context, along)
        with self._checking(stage.hop):
            reply = expect(stage.hop, answer, Forwarded)
            output = check_tensor(stage.hop, reply.hidden, hidden)
        leg = Leg(stage=stage, hidden=hidden, lease=reply.lease)
        if self.observer is not None:
            try:
                leg = replace(leg, shadow=await self.observer.on_forward(leg, context, output))
            except BaseException:
                await self.release([leg])
                raise
        return leg, output

    def _forward(self, stage: Stage, context: CallContext, tensor: torch.Tensor) -> Forward:
        return Forward(
            span=stage.hop.span,
            hidden=tensor,
            padding=context.padding,
            positions=context.positions,
            context_length=context.context_length,
            adapter=stage.adapter,
            keep=stage.keep,
            input_grad=stage.input_grad,
            train=context.train,
            seed=context.seed,
            reply_format=self.formats.of_hidden(stage.hop.server),
        )

    def backwards(self, legs: Sequence[Leg], context: CallContext, sums: AdapterSums | None, term: int) -> EnteredPass:
        """A pass of `backward` along `legs`, the last one of the forward first."""

        def request(number: int) -> Backward:
            leg = legs[number]
            return self._backward(leg, context, _sum_of(leg, sums), term, leg.hidden[:, :, :0])

        width = legs[0].hidden.shape[2] if legs else 0
        return self._sender.in_pass([leg.hop for leg in legs], request, context, width=width)

    async def backward(
        self,
        leg: Leg,
        grad: torch.Tensor,
        context: CallContext,
        along: Pass,
        *,
        sums: AdapterSums | None = None,
        term: int = 0,
    ) -> ChainGradients:
        """Gradients for `grad` (B, S, H) at the output of `leg`, from the server that went forward.

        Without a lease the input goes along, and the server computes the forward again. With `sums` the server keeps
        the adapter's gradients, as number `term` of its sum.
        """
        partial = _sum_of(leg, sums)

        def build(tensor: torch.Tensor) -> Backward:
            return self._backward(leg, context, partial, term, tensor)

        if leg.lease is None:
            self.client.stats.recomputations += 1
        found = ChainGradients()
        tensor = self.formats.grad_for(leg.hop.server, grad)
        answer = await self._sender.send(leg.hop, tensor, build, context, along)
        with self._checking(leg.hop):
            reply = expect(leg.hop, answer, Gradients)
            if leg.stage.input_grad:
                if reply.hidden is None:
                    raise bad_reply(leg.hop, "no gradient at the input")
                found.hidden = check_tensor(leg.hop, reply.hidden, leg.hidden)
            parts = context.adapter_on(leg.hop.span)
            if partial is None:
                found.adapter = gradients_by_block(leg.hop, parts, reply.adapter)
            else:
                partial.terms.append(Term(leg=leg, context=context, grad=grad, place=term))
                if reply.terms:
                    total = ChainGradients(adapter=gradients_by_block(leg.hop, parts, reply.adapter))
                    partial.whole = WholeSum(terms=reply.terms, gradients=total)
        if self.observer is not None:
            await self.observer.on_backward(leg, context, grad, found)
        return found

    def _backward(
        self, leg: Leg, context: CallContext, partial: PartialSum | None, term: int, tensor: torch.Tensor
    ) -> Backward:
        again = None
        if leg.lease is None:
            hidden = self.formats.hidden_for(leg.hop.server, leg.hidden)
            again = self._forward(replace(leg.stage, keep=False), context, hidden)
        return Backward(
            lease=leg.lease,
            again=again,
            grad=tensor,
            adapter_sum=None if partial is None else partial.number,
            term=0 if partial is None else term,
            terms=None if partial is None else partial.expected,
            reply_format=self.formats.of_grad(leg.hop.server),
            adapter_format=self.formats.of_adapter,
        )

    async def collect(self, partial: PartialSum) -> ChainGradients | None:
        """The adapter's gradients that a server added up; None where its sum is not the one of our terms."""
        hop, context = partial.hop, partial.terms[0].context
        # A backward that was given up here and repeated elsewhere may be in the sum all the same.
        if (whole := partial.whole) is not None:
            return whole.gradients if whole.terms == len(partial.terms) else None
        parts = context.adapter_on(hop.span)
        request = CollectSum(adapter_sum=partial.number, adapter_format=self.formats.of_adapter)
        answer = await self._sender.ask(hop, request, parts=parts)
        with self._checking(hop):
            reply = expect(hop, answer, CollectedSum)
            if reply.terms != len(partial.terms):
                return None
            return ChainGradients(adapter=gradients_by_block(hop, parts, reply.adapter))

    async def release(self, legs: Sequence[Leg]) -> None:
        """Give the leases of `legs` back."""
        for leg in legs:
            if leg.lease is not None:
                await self._sender.notify(leg.hop, Release(leases=[leg.lease]))
            if self.observer is not None:
                await self.observer.on_release(leg)

    # Generation

    async def open_session(
        self, hop: Hop, context: CallContext, *, rows: int, max_length: int, fork: Fork | None = None
    ) -> int:
        """Open KV caches for at most `rows` rows of `max_length` positions; the id of the session at its server."""
        adapter = context.adapter.version if context.adapter is not None and context.adapter_on(hop.span) else None
        request = OpenSession(span=hop.span, rows=rows, max_length=max_length, adapter=adapter, fork=fork)
        answer = await self._sender.ask(hop, request, context)
        with self._checking(hop):
            return expect(hop, answer, SessionOpened).session

    def steps(self, hops: Sequence[Hop], request: Callable[[int], Step], width: int) -> EnteredPass:
        """A pass of `step` along `hops`; `request` makes the one of a hop, by its number, without its tensor."""
        return self._sender.in_pass(hops, request, CallContext(), width=width)  # the sessions have the adapter

    async def step(
        self, hop: Hop, hidden: torch.Tensor, build: Callable[[torch.Tensor], Step], along: Pass
    ) -> torch.Tensor:
        """The output (B, S, H) for the next positions of a session; `build` makes the request from its tensor."""
        tensor = self.formats.step_for(hop.server, hidden)
        answer = await self._sender.send(hop, tensor, build, CallContext(), along)
        with self._checking(hop):
            return check_tensor(hop, expect(hop, answer, Stepped).hidden, hidden)

    async def close_session(self, hop: Hop, session: int) -> None:
        await self._sender.notify(hop, CloseSession(session=session))

    @contextmanager
    def _checking(self, hop: Hop) -> Iterator[None]:
        """A server whose reply fails a check in here is left alone for long."""
        try:
            yield
        except BadReply as error:
            self.client.failed(hop.server, error)
            raise


def _sum_of(leg: Leg, sums: AdapterSums | None) -> PartialSum | None:
    """Where the adapter's gradients of `leg` are added up; None where there are none, or they come back at once."""
    return None if sums is None or leg.stage.adapter is None else sums.on(leg.hop)

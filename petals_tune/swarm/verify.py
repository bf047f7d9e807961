"""Spot checks: a share of the work is done by a second server too; one that deviates is outvoted by a third.

The second server is asked after the first has answered, beside the way of the work, so the first cannot know which of
its answers will be checked, and training waits for no check. What is found is therefore found late: the wrong answer
was used, and the server that gave it is not asked again.

The second server is given exactly what the first one received, and answers in float32; the client then rounds that
answer as the wire rounded the first. Honest servers so differ by what they compute with alone, whatever the formats of
the wire and wherever the second one's blocks are cut.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from petals_tune.errors import BadReply, PetalsTuneError, UncoveredBlocks
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.hand_over import Ask
from petals_tune.swarm.route import Hop
from petals_tune.swarm.sums import PartialSum
from petals_tune.swarm.trace import CallContext, ChainGradients, Leg
from petals_tune.wire.messages import Backward, Forward, carrying
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import WireFormat, as_received

logger = logging.getLogger(__name__)

MAX_RUNNING = 4  # checks at a time; the work waits for one to end where it makes more
_TINY = 1e-30

# By how much honest servers that compute in this dtype differ before any rounding, relative to the norm of a position.
# Measured for bfloat16 with two kernels of one CPU, over ten blocks: 0.009 forward, 0.034 back. float16 has three more
# bits; float32 made no difference that was measurable.
COMPUTED = {"float32": 1e-3, "float16": 7e-3, "bfloat16": 6e-2}
# The widest gap between neighbours of a format, relative to the value, or in 8 bits to the largest of a block.
STEP = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7, "blockwise8": 0.9 / 64}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one server, or a chain of several, says: outputs and gradients, in a fixed order."""

    servers: tuple[ServerRecord, ...]
    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Done:
    """The results of some work."""

    output: torch.Tensor | None = None  # (B, S, H)
    gradients: Sequence[ChainGradients] = ()


Pick = Callable[[Done], tuple[torch.Tensor, ...]]  # what of it is compared
Work = tuple[Leg, CallContext, torch.Tensor | None]  # a forward, and the gradient (B, S, H) where it goes back too


def drawn(share: float, *, seed: int, kind: str, span: BlockSpan, hidden: torch.Tensor) -> bool:
    """Whether this piece of work is checked: the same for the same seed and input, whatever runs beside it."""
    # All of them: the first positions are often the same, a soft prompt or a token that begins every text.
    values = zlib.crc32(hidden.contiguous().view(torch.uint8).numpy().tobytes())
    return share > 0 and random.Random(f"{seed} {kind} {span} {values}").random() < share


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far two answers are apart, or may be: relative errors, of the tensor where they are largest."""

    largest: float  # max|a - b| / max|b|
    typical: float  # |a - b| / |b| of the vector at a position, median over the positions

    def within(self, limit: Deviation) -> bool:
        return self.largest <= limit.largest and self.typical <= limit.typical

    def __str__(self) -> str:
        return f"{self.typical:.2%} at half of the positions, and by {self.largest:.2%} of the largest value"


def deviation(left: Answer, right: Answer) -> Deviation:
    pairs = [(a.float(), b.float()) for a, b in zip(left.tensors, right.tensors, strict=True)]
    return Deviation(
        largest=max((_largest(a, b) for a, b in pairs), default=0.0),
        typical=max((_typical(a, b) for a, b in pairs), default=0.0),
    )


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=_TINY))


def _typical(a: torch.Tensor, b: torch.Tensor) -> float:
    """A lie about most positions shows, however small; a value that falls on another side of a rounding does not."""
    norms, errors = b.norm(dim=-1), (a - b).norm(dim=-1)
    there = (norms > 0) | (errors > 0)  # gradients are often zero at whole positions
    return float((errors[there] / norms[there].clamp(min=_TINY)).median()) if there.any() else 0.0


def tolerance(dtype: str, formats: Iterable[str]) -> Deviation:
    """The most that honest servers which compute in `dtype` differ by, where both answers went through `formats`.

    Numbers that differ by e fall on different sides of a rounding with gaps of q in e/q of the cases, and are then q
    apart: sqrt(e q) in the mean square.
    """
    error, step = COMPUTED[dtype], max(STEP[each] for each in formats)
    return Deviation(largest=error + step, typical=error + math.sqrt(error * step))


def outvoted(first: Answer, second: Answer, third: Answer, limit: Deviation) -> Answer | None:
    """Which of the first two a third one denies, where it agrees with the other; None where that is not clear."""
    first_agrees, second_agrees = (deviation(each, third).within(limit) for each in (first, second))
    if first_agrees == second_agrees:
        return None
    return second if first_agrees else first


class CheckedChain(Chain):
    """A chain that has `share` of its forwards, backwards and sums checked; which ones follows from `seed`."""

    def __init__(
        self, client: SwarmClient, *, share: float, seed: int, wire_format: WireFormat, grad_format: WireFormat
    ):
        # A server could hand on something else than it answers, and the one after it would be blamed.
        super().__init__(client, wire_format=wire_format, grad_format=grad_format, hand_over="never")
        self._exact = Chain(client, hand_over="never")  # in float32 both ways
        self._share, self._seed = share, seed
        self._checks: set[asyncio.Task[None]] = set()

    async def _go(self, hop: Hop, request: Forward, context: CallContext, ask: Ask) -> tuple[Leg, torch.Tensor]:
        leg, output = await super()._go(hop, request, context, ask)
        if self._drawn("forward", leg):
            await self._begin([(leg, context, None)], _output, Done(output=output))
        return leg, output

    async def _gradients(
        self,
        leg: Leg,
        context: CallContext,
        request: Backward,
        partial: PartialSum | None,
        grad: torch.Tensor,
        ask: Ask,
    ) -> ChainGradients:
        found = await super()._gradients(leg, context, request, partial, grad, ask)
        if self._drawn("backward", leg):
            # With `partial`, the adapter's gradients stay in the server's sum.
            pick = _all_gradients if partial is None else _input_gradients
            await self._begin([(leg, context, grad)], pick, Done(gradients=[found]))
        return found

    async def _collected(self, partial: PartialSum) -> ChainGradients | None:
        found = await super()._collected(partial)
        if found is not None and self._drawn("sum", partial.terms[0].leg):
            terms = sorted(partial.terms, key=lambda term: term.place)
            work: list[Work] = [(term.leg, term.context, term.grad) for term in terms]
            await self._begin(work, _adapter_gradients, Done(gradients=[found]))
        return found

    def _drawn(self, kind: str, leg: Leg) -> bool:
        return drawn(self._share, seed=self._seed, kind=kind, span=leg.hop.span, hidden=leg.request.hidden)

    async def _begin(self, work: list[Work], pick: Pick, done: Done) -> None:
        """Start the check of `work`, which one server has `done`."""
        while len(self._checks) >= MAX_RUNNING:
            await asyncio.wait(self._checks, return_when=asyncio.FIRST_COMPLETED)
        first = Answer(servers=(work[0][0].hop.server,), tensors=pick(done))
        task = asyncio.create_task(self._check(work, pick, first))
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    async def _check(self, work: list[Work], pick: Pick, first: Answer) -> None:
        span, (server,) = work[0][0].hop.span, first.servers
        try:
            second = await self._answer(work, pick, without={server.peer})
            self.client.stats.checks += 1
            apart, limit = deviation(first, second), self._limit(work, server)
            if apart.within(limit):
                return
            others = {each.peer for each in second.servers}
            text = f"servers {server.peer} and {', '.join(sorted(others))} differ on blocks {span} by {apart}"
            try:
                third = await self._answer(work, pick, without={server.peer, *others})
            except UncoveredBlocks:
                logger.warning("%s, and there is no third one to ask who is wrong", text)
                return
        except PetalsTuneError as error:  # nobody to ask, or a fault on the way, or the model has left the swarm
            logger.debug("blocks %s of server %s were not checked: %s", span, server.peer, error)
            return
        liar = outvoted(first, second, third, limit)
        if liar is None or len(liar.servers) > 1:
            logger.warning("%s, and a third answer does not tell who is wrong", text)
            return
        self.client.stats.outvoted += 1
        what = f"server {liar.servers[0].peer} computes blocks {span} otherwise than two others, by {apart}"
        self.client.failed(liar.servers[0], BadReply(what))

    async def _answer(self, work: list[Work], pick: Pick, *, without: set[str]) -> Answer:
        """What others make of `work`. Raises ServerError, and UncoveredBlocks where there is nobody."""
        request, hop = work[0][0].request, work[0][0].hop
        banned = self.client.banned() | without | self._unlike(hop.server)
        route = self.client.plan(hop.span, work=request.hidden.shape[0] * request.hidden.shape[1], banned=banned)
        gradients, output = [], request.hidden
        for leg, context, grad in work:
            like, input_grad = leg.request.hidden, leg.request.input_grad
            legs, output = [], as_received(like, self.wire_format).float()
            requests = self._exact._forwards(route, output, context, keep=grad is not None, input_grad=input_grad)
            for part, request in zip(route, requests, strict=True):
                ask = self._exact.asks(context)
                going, output = await self._exact._go(part, carrying(request, output), context, ask)
                legs.append(going)
            output = as_received(output, self.wire_format).to(like.dtype)
            if grad is not None:
                found = await self._back_again(legs, context, as_received(grad, self._grad_format).float())
                if found.hidden is not None:
                    found.hidden = as_received(found.hidden, self._grad_format).to(like.dtype)
                gradients.append(found)
        servers = tuple(part.server for part in route)
        return Answer(servers=servers, tensors=pick(Done(output=output, gradients=gradients)))

    async def _back_again(self, legs: Sequence[Leg], context: CallContext, grad: torch.Tensor) -> ChainGradients:
        """As `backward`, without repair: a check that meets a fault is given up."""
        total = ChainGradients(hidden=grad)
        for leg in reversed(legs):
            if total.hidden is None or not leg.output_grad:
                total.hidden = None
                break
            request = self._exact._backward(leg, total.hidden, None, 0, again=leg.lease is None)
            ask = self._exact.asks(context)
            found = await self._exact._gradients(leg, context, request, None, total.hidden, ask)
            total.adapter.update(found.adapter)
            total.hidden = found.hidden
        return total

    def _unlike(self, server: ServerRecord) -> set[str]:
        """Servers whose numbers are no measure for those of `server`."""
        kind = (server.quantization, server.dtype)
        return {each.peer for each in self.client.servers if (each.quantization, each.dtype) != kind}

    def _limit(self, work: list[Work], server: ServerRecord) -> Deviation:
        dtype = str(work[0][0].request.hidden.dtype).removeprefix("torch.")  # of the client's part
        return tolerance(server.dtype, (dtype, self.wire_format, self._grad_format))


def _output(done: Done) -> tuple[torch.Tensor, ...]:
    assert done.output is not None
    return (done.output,)


def _input_gradients(done: Done) -> tuple[torch.Tensor, ...]:
    return tuple(each.hidden for each in done.gradients if each.hidden is not None)


def _adapter_gradients(done: Done) -> tuple[torch.Tensor, ...]:
    """By block, each summed over all gradients."""
    return tuple(
        sum(same[1:], start=same[0])
        for block in sorted(done.gradients[0].adapter)
        for same in zip(*(each.adapter[block] for each in done.gradients), strict=True)
    )


def _all_gradients(done: Done) -> tuple[torch.Tensor, ...]:
    return (*_input_gradients(done), *_adapter_gradients(done))

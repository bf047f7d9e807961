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
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from petals_tune.errors import BadReply, PetalsTuneError, Refused, ServerError, UncoveredBlocks
from petals_tune.swarm.call import Calls
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.repair import Repair
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.swarm.routes.limits import LEAST, Size
from petals_tune.swarm.routes.round_trips import HandOverRule
from petals_tune.swarm.routes.route import Hop
from petals_tune.swarm.sums import PartialSum
from petals_tune.swarm.trace import CallContext, ChainGradients, Leg
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
# The widest gap between neighbours of a format, relative to the value, or in 8 bits to the largest of a position.
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


def is_selected(share: float, *, seed: int, kind: str, span: BlockSpan, hidden: torch.Tensor) -> bool:
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


def choose_outvoted(first: Answer, second: Answer, third: Answer, limit: Deviation) -> Answer | None:
    """Which of the first two a third one denies, where it agrees with the other; None where that is not clear."""
    first_agrees, second_agrees = (deviation(each, third).within(limit) for each in (first, second))
    if first_agrees == second_agrees:
        return None
    return second if first_agrees else first


class SpotChecks:
    """Checks a `share` of what servers did, as an observer of calls; which part of it follows from `seed`.

    Where work is checked nothing is handed on: a server could hand on something else than it answers, and the one after
    it would be blamed.
    """

    def __init__(
        self, client: SwarmClient, *, share: float, seed: int, wire_format: WireFormat, grad_format: WireFormat
    ):
        self._client = client
        self._wire_format, self._grad_format = wire_format, grad_format
        self._exact = Calls(client, hand_over="never")  # in float32 both ways
        self._share, self._seed = share, seed
        self.running: set[asyncio.Task[None]] = set()

    async def on_forward(self, leg: Leg, context: CallContext, output: torch.Tensor) -> None:
        if self._is_selected("forward", leg):
            await self._begin([(leg, context, None)], _output, Done(output=output))

    async def on_backward(
        self, leg: Leg, context: CallContext, grad: torch.Tensor, found: ChainGradients, *, summed: bool
    ) -> None:
        if self._is_selected("backward", leg):
            pick = _input_gradients if summed else _all_gradients  # the adapter's are in the server's sum
            await self._begin([(leg, context, grad)], pick, Done(gradients=[found]))

    async def on_sum(self, partial_sum: PartialSum, found: ChainGradients) -> None:
        if self._is_selected("sum", partial_sum.terms[0].leg):
            terms = sorted(partial_sum.terms, key=lambda term: term.place)
            work: list[Work] = [(term.leg, term.context, term.grad) for term in terms]
            await self._begin(work, _adapter_gradients, Done(gradients=[found]))

    def _is_selected(self, kind: str, leg: Leg) -> bool:
        return is_selected(self._share, seed=self._seed, kind=kind, span=leg.hop.span, hidden=leg.hidden)

    async def _begin(self, work: list[Work], pick: Pick, done: Done) -> None:
        """Start the check of `work`, which one server has `done`."""
        while len(self.running) >= MAX_RUNNING:
            await asyncio.wait(self.running, return_when=asyncio.FIRST_COMPLETED)
        first = Answer(servers=(work[0][0].hop.server,), tensors=pick(done))
        task = asyncio.create_task(self._check(work, pick, first))
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _check(self, work: list[Work], pick: Pick, first: Answer) -> None:
        span, (server,) = work[0][0].hop.span, first.servers
        try:
            second = await self._answer(work, pick, without={server.peer})
            self._client.stats.checks += 1
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
        liar = choose_outvoted(first, second, third, limit)
        if liar is None or len(liar.servers) > 1:
            logger.warning("%s, and a third answer does not tell who is wrong", text)
            return
        self._client.stats.outvoted += 1
        what = f"server {liar.servers[0].peer} computes blocks {span} otherwise than two others, by {apart}"
        self._client.failed(liar.servers[0], BadReply(what, peer=liar.servers[0].peer))

    async def _answer(self, work: list[Work], pick: Pick, *, without: set[str]) -> Answer:
        """What others make of `work`. Raises SwarmTimeout for a server that fails, UncoveredBlocks without any."""
        hop = work[0][0].hop
        others = _Others(self._client, self._client.banned() | without | self._unlike(hop.server))
        chain = Chain(self._exact, Repair(others, RetryPolicy(timeout_s=0.0)))
        output, gradients = work[0][0].hidden, []
        for leg, context, grad in work:
            hidden, input_grad = as_received(leg.hidden, self._wire_format).float(), leg.stage.input_grad
            trace = await chain.forward(hidden, context, hop.span, keep=grad is not None, input_grad=input_grad)
            output = as_received(trace.hidden, self._wire_format).to(leg.hidden.dtype)
            if grad is not None:
                found = await chain.backward(trace, as_received(grad, self._grad_format).float())
                if found.hidden is not None:
                    found.hidden = as_received(found.hidden, self._grad_format).to(leg.hidden.dtype)
                gradients.append(found)
        return Answer(servers=others.asked, tensors=pick(Done(output=output, gradients=gradients)))

    def _unlike(self, server: ServerRecord) -> set[str]:
        """Servers whose numbers are no measure for those of `server`."""
        kind = (server.quantization, server.dtype)
        return {each.peer for each in self._client.servers if (each.quantization, each.dtype) != kind}

    def _limit(self, work: list[Work], server: ServerRecord) -> Deviation:
        dtype = str(work[0][0].hidden.dtype).removeprefix("torch.")  # of the client's part
        return tolerance(server.dtype, (dtype, self._wire_format, self._grad_format))


class _Others:
    """The swarm without some of its servers, for one check."""

    def __init__(self, client: SwarmClient, banned: frozenset[str]):
        self.policy, self.stats, self.load = client.policy, client.stats, client.load
        self._client, self._banned = client, banned
        self._routes: dict[BlockSpan, tuple[Hop, ...]] = {}

    @property
    def asked(self) -> tuple[ServerRecord, ...]:
        return tuple(hop.server for route in self._routes.values() for hop in route)

    async def route(
        self,
        span: BlockSpan,
        *,
        work: int,
        latency: HandOverRule | None = None,
        size: Size = LEAST,
        without: Collection[str] = (),
    ) -> tuple[Hop, ...]:
        """One route for a span, so that all of a check is done by the same servers."""
        if span not in self._routes:
            self._routes[span] = self._client.plan(span, work=work, banned=self._banned)
        return self._routes[span]

    def refresh_soon(self) -> None:
        """A check does not wait for servers."""

    async def others(self, span: BlockSpan, *, without: Collection[str]) -> bool:
        return True  # a check that a server refuses ends; nobody is asked whether it is right

    def give_up(self, error: ServerError) -> None:
        self._client.give_up(error)

    def contradicted(self, refused: Refused) -> None:
        self._client.contradicted(refused)


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

"""Spot checks: a share of the work is done by a second server too; one that deviates is outvoted by a third.

Which work is checked is drawn from the system's randomness once the first server has answered, and nobody is told: no
server can know which of its answers will be checked. The second server is asked as servers are always asked: for the
same requests, in the same formats, its backward when the backward of the work is due. Training waits for no check; what
is found is therefore found late: the wrong answer was used, and the server that gave it is not asked again.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Collection, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from petals_tune.errors import BadReply, PetalsTuneError, Refused, ServerError, UncoveredBlocks
from petals_tune.swarm.call import Calls
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.deviation import Answer, Deviation, choose_outvoted, comparable, deviation, tolerance
from petals_tune.swarm.formats import Formats
from petals_tune.swarm.repair import Repair
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.swarm.routes.limits import LEAST, UNLIMITED, Size
from petals_tune.swarm.routes.round_trips import HandOverRule
from petals_tune.swarm.routes.route import Hop
from petals_tune.swarm.trace import CallContext, ChainGradients, Leg, Trace
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_RUNNING = 4  # checks at a time; the work waits for one to end where it makes more
CHOICE = 3  # servers that were reached, of which any one may check another; where fewer were, more are dialled


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is checked: the forward of a leg, and its backward where there is a gradient (B, S, H)."""

    leg: Leg
    context: CallContext
    grad: torch.Tensor | None = None


class Shadow:
    """The work of one leg at a second server: kept with the leg, for its backward."""

    def __init__(self, chain: Chain, others: _Others, forward: asyncio.Task[Trace | None]):
        self.chain, self.others, self.forward = chain, others, forward


class SpotChecks:
    """Checks a `share` of what servers did, as an observer of calls.

    Where work is checked nothing is handed on (a server could hand on something else than it answers, and the one after
    it would be blamed), and each gradient of an adapter comes back with its micro-batch (a sum over some of them could
    be checked only by somebody who did all of them): that is so for all work, so that no request tells a check apart.
    """

    def __init__(self, client: SwarmClient, *, share: float, formats: Formats):
        self._client, self._share = client, share
        self._calls = Calls(client, formats=formats, hand_over="never", sums=False)
        self._chance = secrets.SystemRandom()  # has no seed that anybody could know
        self.running: set[asyncio.Task[Any]] = set()

    async def on_forward(self, leg: Leg, context: CallContext, output: torch.Tensor) -> Shadow | None:
        """Maybe check what the server of `leg` answered; what is returned is kept with the leg."""
        if self._chance.random() >= self._share:
            return None
        await self._wait_for_room()
        others = _Others(self._client, leg.hop.server, without={leg.hop.server.peer}, chance=self._chance)
        chain = self._chain(others)
        return Shadow(chain, others, self._start(self._check_forward(chain, others, leg, context, output)))

    async def on_backward(self, leg: Leg, context: CallContext, grad: torch.Tensor, found: ChainGradients) -> None:
        """Check the gradients that were `found` where the forward of `leg` was checked."""
        if isinstance(leg.shadow, Shadow):
            await self._wait_for_room()
            self._start(self._check_backward(leg.shadow, Work(leg=leg, context=context, grad=grad), found))

    async def on_release(self, leg: Leg) -> None:
        """There will be no backward of `leg`: its second server need not wait for one."""
        if isinstance(leg.shadow, Shadow):
            self._start(self._release(leg.shadow))

    async def _check_forward(
        self, chain: Chain, others: _Others, leg: Leg, context: CallContext, output: torch.Tensor
    ) -> Trace | None:
        """Compare the `output` of `leg` with that of others; returns their trace where both are the same."""
        try:
            trace = await _forward(chain, leg, context)
        except PetalsTuneError as error:
            _not_checked(leg, error)
            return None
        first = Answer(servers=(leg.hop.server,), tensors=(output,))
        second = Answer(servers=others.asked, tensors=(trace.hidden,))
        if await self._compare(Work(leg=leg, context=context), first, second):
            return trace
        await chain.release([trace])
        return None

    async def _check_backward(self, shadow: Shadow, work: Work, found: ChainGradients) -> None:
        """Compare the gradients that were `found` with those of the server that was asked for the forward too."""
        assert work.grad is not None
        if (trace := await shadow.forward) is None:
            return
        try:
            second = await shadow.chain.backward(trace, work.grad)
        except PetalsTuneError as error:
            _not_checked(work.leg, error)
            await shadow.chain.release([trace])
            return
        first = Answer(servers=(work.leg.hop.server,), tensors=_gradients(found))
        await self._compare(work, first, Answer(servers=shadow.others.asked, tensors=_gradients(second)))

    async def _release(self, shadow: Shadow) -> None:
        if (trace := await shadow.forward) is not None:
            await shadow.chain.release([trace])

    async def _compare(self, work: Work, first: Answer, second: Answer) -> bool:
        """Whether two servers say the same; where not, a third one is asked, and who is outvoted is banned."""
        self._client.stats.checks += 1
        apart, agrees = self._apart(work.leg, first, second)
        if agrees:
            return True
        span, asked = work.leg.hop.span, {each.peer for each in (*first.servers, *second.servers)}
        text = f"servers {', '.join(sorted(asked))} differ on blocks {span} by {apart}"
        try:
            third = await self._ask_third(work, without=asked)
        except UncoveredBlocks:
            logger.warning("%s, and there is no third one to ask who is wrong", text)
            return False
        except PetalsTuneError as error:
            logger.warning("%s, and the third one that was asked who is wrong failed: %s", text, error)
            return False
        agree = [self._apart(work.leg, each, third)[1] for each in (first, second)]
        liar = choose_outvoted(first, second, third, agree)
        if liar is None or len(liar.servers) > 1:
            logger.warning("%s, and a third answer does not tell who is wrong", text)
            return False
        self._client.stats.outvoted += 1
        what = f"server {liar.servers[0].peer} computes blocks {span} otherwise than two others, by {apart}"
        self._client.failed(liar.servers[0], BadReply(what, peer=liar.servers[0].peer))
        return False

    async def _ask_third(self, work: Work, *, without: set[str]) -> Answer:
        """What others make of `work`. Raises SwarmTimeout for a server that fails, UncoveredBlocks without any."""
        others = _Others(self._client, work.leg.hop.server, without=without, chance=self._chance)
        chain = self._chain(others)
        trace = await _forward(chain, work.leg, work.context)
        tensors: tuple[torch.Tensor, ...] = (trace.hidden,)
        try:
            if work.grad is not None:
                tensors = _gradients(await chain.backward(trace, work.grad))
        finally:
            await chain.release([trace])
        return Answer(servers=others.asked, tensors=tensors)

    def _chain(self, others: _Others) -> Chain:
        return Chain(self._calls, Repair(others, RetryPolicy(timeout_s=0.0)))

    def _apart(self, leg: Leg, left: Answer, right: Answer) -> tuple[Deviation, bool]:
        """How far two answers are apart, and whether honest servers may be."""
        servers = (*left.servers, *right.servers)
        formats = {str(leg.hidden.dtype).removeprefix("torch.")}  # of the client's part
        formats.update(*(self._calls.formats.rounding(server) for server in servers))
        limit = tolerance((server.arithmetic for server in servers), formats, cuts=left.cuts + right.cuts)
        apart = deviation(left, right, {server.dtype for server in servers})
        return apart, apart.within(limit)

    async def _wait_for_room(self) -> None:
        while len(self.running) >= MAX_RUNNING:
            await asyncio.wait(self.running, return_when=asyncio.FIRST_COMPLETED)

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task


class _Others:
    """The servers that may check a server's work, for one piece of it: always the same ones for a span."""

    def __init__(self, client: SwarmClient, server: ServerRecord, *, without: set[str], chance: secrets.SystemRandom):
        """Those whose numbers are a measure for those of `server`."""
        self.policy, self.stats, self.load = client.policy, client.stats, client.load
        unlike = {each.peer for each in client.servers if not comparable(each.arithmetic, server.arithmetic)}
        self._client, self._chance, self._kind = client, chance, server.arithmetic
        self._banned = client.banned() | without | unlike
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
            self._routes[span] = self._choose(span, work, size)
        return self._routes[span]

    def _choose(self, span: BlockSpan, work: int, size: Size) -> tuple[Hop, ...]:
        """A server that was reached and holds all of `span`, by chance: two that agreed to lie rarely check each other.

        Half of the time one with the same arithmetic, which finds the smallest lies; otherwise any: those that agreed
        to lie could announce one that nobody else has. Where there are few, the best of those that were not reached
        yet, or of those that hold a part.
        """
        reached = [
            each
            for each in self._client.servers
            if each.blocks.start <= span.start
            and span.stop <= each.blocks.stop
            and each.peer not in self._banned
            and self._client.open_stream(each) is not None
            and self._client.limits.of.get(each.peer, UNLIMITED).share(size) >= 1
        ]
        if len(reached) < CHOICE and (not reached or self._chance.random() < 0.5):
            try:
                return self._client.plan(span, work=work, banned=self._banned.union(each.peer for each in reached))
            except UncoveredBlocks:
                if not reached:
                    raise
        alike = [each for each in reached if each.arithmetic == self._kind]
        some = alike if alike and self._chance.random() < 0.5 else reached
        return (Hop(self._chance.choice(some), span),)

    def refresh_soon(self) -> None:
        """A check does not wait for servers."""

    async def others(self, span: BlockSpan, *, without: Collection[str]) -> bool:
        return True  # a check that a server refuses ends; nobody is asked whether it is right

    def give_up(self, error: ServerError) -> None:
        self._client.give_up(error)

    def contradicted(self, refused: Refused) -> None:
        self._client.contradicted(refused)


async def _forward(chain: Chain, leg: Leg, context: CallContext) -> Trace:
    stage = leg.stage
    return await chain.forward(leg.hidden, context, leg.hop.span, keep=stage.keep, input_grad=stage.input_grad)


def _gradients(found: ChainGradients) -> tuple[torch.Tensor, ...]:
    at_input = () if found.hidden is None else (found.hidden,)
    return (*at_input, *(each for block in sorted(found.adapter) for each in found.adapter[block]))


def _not_checked(leg: Leg, error: PetalsTuneError) -> None:
    """Nobody to ask, or a fault on the way, or the model has left the swarm."""
    logger.debug("blocks %s of server %s were not checked: %s", leg.hop.span, leg.hop.server.peer, error)

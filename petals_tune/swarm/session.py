"""Generation along a route: KV caches on the servers, and the inputs kept here, so that a lost span can be replayed.

A session has as many rows as its last step. Rows that are equal so far are the caller's business
(remote/shared_rows.py): they are one row here, and an order multiplies them.

Shapes: B rows, S new positions, H hidden size.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from petals_tune.errors import OverLimit, RequestRefused, RequestTooLarge
from petals_tune.swarm.call import Calls
from petals_tune.swarm.hand_over import Pass
from petals_tune.swarm.history import History, Inputs, Replay, compose
from petals_tune.swarm.repair import Repair
from petals_tune.swarm.retry import Attempts
from petals_tune.swarm.routes.limits import Size
from petals_tune.swarm.routes.route import Hop
from petals_tune.swarm.trace import CallContext
from petals_tune.wire.adapter import AdapterVersion
from petals_tune.wire.messages import Fork, Step
from petals_tune.wire.span import BlockSpan

MOST_POSITIONS = 512  # positions that go through the blocks at once when a prompt is read or replayed, or fewer


def check_length(reached: int, max_length: int) -> None:
    """Raises RequestRefused for a step to position `reached` of a session for `max_length`."""
    if reached > max_length:
        raise RequestRefused(
            f"the session was opened for max_length={max_length} positions and this step would reach {reached}; open "
            "it with a larger max_length",
            reason="too long",
            max_length=reached,
        )


@dataclass
class HopSession:
    """One server of the route, with the session that it keeps for us."""

    hop: Hop
    id: int
    history: History = field(default_factory=History)
    order: torch.Tensor | None = None  # rows to reorder with the next step

    def reorder(self, order: torch.Tensor | None) -> None:
        """Make row i what row order[i] has been, with the next step."""
        self.history.reorder(order)
        self.order = compose(self.order, order)

    def cut(self, position: int) -> None:
        """Go back to `position` with the next step."""
        self.history.cut(position)
        if not position:
            self.order = None


class ChainSession:
    """KV caches for at most `rows` rows of `max_length` positions on all blocks of `span`. On the background loop."""

    def __init__(
        self,
        calls: Calls,
        repair: Repair,
        span: BlockSpan,
        *,
        rows: int,
        max_length: int,
        adapter: AdapterVersion | None,
    ):
        self.rows, self.max_length = rows, max_length
        self._calls, self._repair = calls, repair
        self._span, self._context = span, CallContext(adapter=adapter)
        self._sessions: list[HopSession] = []

    async def step(self, inputs: Inputs, *, position: int, order: torch.Tensor | None) -> torch.Tensor:
        """The output (B, S, H) of the blocks for the positions from `position` on; what lay behind is forgotten.

        With `order`, the caches of row i become those of row order[i] first, of as many rows as `inputs` has; a step at
        position 0 has none. When a server is lost, another route is found for its blocks alone, and their inputs so far
        are replayed there.
        Raises RequestRefused where `max_length` is exceeded or nobody has room, and what `Chain.forward` raises. A text
        is cut where a server takes fewer positions at once.
        """
        check_length(position + len(inputs), self.max_length)
        for session in self._sessions:
            session.cut(position)
            session.reorder(order)
        attempts = self._repair.attempts()
        if not self._sessions:
            self._sessions = await self._open(self._span, Replay())
        outputs, start = [], 0
        while start < len(inputs):
            part = inputs.cut(start, start + self._most_positions(inputs, self._sessions))
            try:
                outputs.append(await self._step(part, position + start, attempts))
            except RequestTooLarge:
                if self._most_positions(inputs, self._sessions) >= len(part):
                    raise
            else:
                start += len(part)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _most_positions(self, inputs: Inputs, sessions: Sequence[HopSession]) -> int:
        """How many positions of `inputs` all servers of `sessions` take at once."""
        context = CallContext(padding=inputs.padding, positions=inputs.positions)
        size = self._calls.size(inputs.hidden, context, keep=False)
        most = MOST_POSITIONS
        for session in sessions:
            if (limits := self._calls.client.limits.of.get(session.hop.server.peer)) is not None:
                share = limits.share(replace(size, positions=1))
                most = min(most, limits.positions, int(share * len(inputs)))
        return max(most, 1)

    async def fork(self, position: int, *, rows: int, max_length: int, order: torch.Tensor | None) -> ChainSession:
        """Another session, whose rows begin with the first `position` positions of these, in this `order`.

        Servers share what both hold. Where one cannot, its blocks are replayed there or elsewhere.
        """
        calls, repair, adapter = self._calls, self._repair, self._context.adapter
        forked = ChainSession(calls, repair, self._span, rows=rows, max_length=max_length, adapter=adapter)
        if not position or not self._sessions:
            return forked
        opened: list[list[HopSession]] = [[] for _ in self._sessions]

        async def take_over(number: int) -> None:
            opened[number] = await forked._begin_with(self._sessions[number], position, order)

        try:
            async with asyncio.TaskGroup() as group:
                for number in range(len(opened)):
                    group.create_task(take_over(number))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            forked._sessions = list(itertools.chain(*opened))
            if not all(opened):
                await forked.close()
        return forked

    async def _begin_with(self, parent: HopSession, position: int, order: torch.Tensor | None) -> list[HopSession]:
        """Sessions on the blocks of `parent`, of another chain, that begin with its first positions."""
        order, hop = compose(parent.order, order), parent.hop
        history = parent.history.fork(position, order)
        request = partial(
            self._calls.open_session,
            hop,
            self._context,
            rows=self.rows,
            max_length=self.max_length,
            fork=Fork(session=parent.id, position=position, order=order),
        )

        async def here() -> list[HopSession]:
            return [HopSession(hop=hop, id=await request(), history=history)]

        otherwise = partial(self._open, hop.span, history.replayed())
        return await self._repair.with_fallback(here, otherwise, self._repair.attempts(), hop.span)

    async def close(self) -> None:
        """Give the caches back."""
        for session in self._sessions:
            await self._calls.close_session(session.hop, session.id)
        self._sessions = []

    async def _step(self, inputs: Inputs, position: int, attempts: Attempts) -> torch.Tensor:
        """The output for some positions, from session to session."""
        for session in self._sessions:
            session.cut(position)
        sessions = list(self._sessions)  # those that are lost give their places to others
        empty = inputs.with_hidden(inputs.hidden[:, :, :0])

        def ahead(number: int) -> Step:
            return self._request(sessions[number], empty, position, empty.hidden)

        number = 0
        width = inputs.hidden.shape[2]
        async with self._calls.steps([session.hop for session in sessions], ahead, width) as along:
            while number < len(self._sessions):
                session = self._sessions[number]
                output = await self._repair.with_fallback(
                    partial(self._through, session, inputs, position, along),
                    partial(self._replace, number),
                    attempts,
                    session.hop.span,
                )
                if output is not None:
                    inputs = inputs.with_hidden(output)
                    number += 1
        return inputs.hidden

    async def _through(self, session: HopSession, inputs: Inputs, position: int, along: Pass) -> torch.Tensor:
        """The output (B, S, H) of one session for `inputs`. Raises RequestTooLarge where it takes fewer positions."""
        build = partial(self._request, session, inputs, position)
        try:
            output = await self._calls.step(session.hop, inputs.hidden, build, along)
        except OverLimit as error:
            tokens = inputs.hidden.shape[0] * len(inputs)
            if error.fits is None or len(inputs) == 1 or error.fits < inputs.row_count:
                raise
            raise RequestTooLarge(str(error), limit="max_tokens", size=tokens, fits=error.fits) from error
        session.order = None
        session.history.add(inputs)
        return output

    def _request(self, session: HopSession, inputs: Inputs, position: int, hidden: torch.Tensor) -> Step:
        return Step(
            session=session.id,
            hidden=hidden,
            position=position,
            padding=inputs.padding,
            positions=inputs.positions,
            context_length=inputs.context_length,
            order=session.order,
            reply_format=self._calls.formats.of_step(session.hop.server),
        )

    async def _replace(self, number: int) -> None:
        """Put other servers in the place of session `number`, and bring them to where it was."""
        lost = self._sessions[number]
        await self._calls.close_session(lost.hop, lost.id)
        others = await self._open(lost.hop.span, lost.history.replayed())
        self._sessions[number : number + 1] = others

    async def _open(self, span: BlockSpan, replay: Replay) -> list[HopSession]:
        """Sessions for `span` that have seen `replay`.

        With attempts of its own: servers that open sessions and fail each step would put the step's deadline off.
        """
        sessions: list[HopSession] = []

        async def go(route: Sequence[Hop]) -> AsyncGenerator[int, None]:
            nonlocal replay
            for hop in route:
                opened = partial(
                    self._calls.open_session, hop, self._context, rows=self.rows, max_length=self.max_length
                )
                session = HopSession(hop=hop, id=await self._repair.supply_missing(opened))
                try:
                    outputs = await self._replay(session, replay)
                except BaseException:
                    await self._calls.close_session(hop, session.id)
                    raise
                sessions.append(session)
                replay = outputs
                yield hop.span.stop

        try:
            least = Size(tokens=self.rows)
            await self._repair.along_route(span, go, work=self.rows, latency=self._calls.hand_over, size=least)
        except BaseException:
            for session in sessions:
                await self._calls.close_session(session.hop, session.id)
            raise
        return sessions

    async def _replay(self, session: HopSession, replay: Replay) -> Replay:
        """Bring a new session to where another one was; returns the replay of the next one."""
        steps: list[tuple[Inputs, torch.Tensor | None]] = []
        position = 0
        for whole, order in replay.steps:
            session.reorder(order)
            start = 0
            while start < len(whole):
                most = self._most_positions(whole, [session])
                inputs = whole.cut(start, start + most)
                try:
                    output = await self._through(session, inputs, position + start, Pass())
                except RequestTooLarge:
                    if self._most_positions(whole, [session]) >= len(inputs):
                        raise
                    continue
                steps.append((inputs.with_hidden(output), None if start else order))
                start += len(inputs)
            position += len(whole)
        session.reorder(replay.order)
        return Replay(steps=steps, order=replay.order)

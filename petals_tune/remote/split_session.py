"""Generation through blocks of which servers run some and the client the others: the caches are where the blocks are.

Shapes: B rows, S new positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.generation.session import Session
from petals_tune.errors import SessionLost
from petals_tune.remote.local import LocalBlocks
from petals_tune.swarm import loop
from petals_tune.swarm.session import MOST_POSITIONS, ChainSession, History, Inputs, check_length
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Step
from petals_tune.wire.span import BlockSpan


class LocalSession:
    """KV caches for `rows` rows of at most `max_length` positions on the local blocks `span`."""

    def __init__(
        self, blocks: LocalBlocks, span: BlockSpan, *, rows: int, max_length: int, parts: Sequence[AdapterPart]
    ):
        """`parts`: the adapter on these blocks."""
        self._blocks, self._parts = blocks, parts
        self._session = Session(
            client="", span=span, rows=rows, max_length=max_length, adapter=None, adapter_version=None
        )
        self._order: torch.Tensor | None = None  # rows to reorder with the next step
        self._keeps_states = False
        self._history = History()  # kept where blocks have states, which cannot always go back

    def step(self, inputs: Inputs, *, position: int, order: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """As `ChainSession.step`, in this thread and on `device`. Raises Diverged in the place of NotFinite."""
        check_length(position + len(inputs), self._session.max_length)
        self._history.cut(position)
        if order is not None:
            self._order = order if self._order is None else self._order[order]
            self._history.reorder(order)
        try:
            output = self._run(inputs, position, device)
        except SessionLost:
            if self._history.length < position:
                raise
            self._order, at = None, 0
            for before in self._history.replayed():
                self._run(before, at, device)
                at += len(before)
            output = self._run(inputs, position, device)
        if self._keeps_states:
            self._history.add(inputs)
        return output

    def _run(self, inputs: Inputs, position: int, device: torch.device) -> torch.Tensor:
        outputs = []
        for start in range(0, len(inputs), MOST_POSITIONS):
            part = inputs.cut(start, start + MOST_POSITIONS)
            step = Step(
                session=0,
                hidden=part.hidden,
                position=position + start,
                padding=part.padding,
                positions=part.positions,
                context_length=part.context_length,
                order=self._order,
            )
            with self._blocks.running(self._session.span, part.hidden, device) as engine:
                if self._parts and self._session.adapter is None:
                    self._session.adapter = Adapter(tuple(engine.prepare_adapter(self._parts)))
                self._keeps_states = engine.state_blocks.keep_some(self._session.span)
                (output,) = engine.step([(self._session, step)])
                if isinstance(output, Exception):
                    raise output
            self._order = None
            outputs.append(output)
        return torch.cat(outputs, dim=1).to(inputs.hidden.dtype)  # a copy: autograd refuses tensors of inference mode


class SplitSession:
    """One generation session on spans of blocks, one after the other, some of them local."""

    def __init__(self, sessions: Sequence[LocalSession | ChainSession], *, rows: int):
        self.rows = rows
        self._sessions = list(sessions)
        self._orders: list[torch.Tensor | None] = [None] * len(self._sessions)  # not given to a span yet

    def step(self, inputs: Inputs, *, position: int, order: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """As `ChainSession.step`, from span to span; local ones compute on `device`.

        After a step that failed, the next one may begin at the same position or an earlier one.
        """
        if order is not None:
            self._orders = [order if before is None else before[order] for before in self._orders]
        for number, session in enumerate(self._sessions):
            # From now on the span's session keeps it, also where the step fails.
            order, self._orders[number] = self._orders[number], None
            if isinstance(session, LocalSession):
                output = session.step(inputs, position=position, order=order, device=device)
            else:
                output = loop.run(session.step(inputs, position=position, order=order))
            inputs = inputs.with_hidden(output)
        return inputs.hidden

    async def close(self) -> None:
        """Give the caches back: those on servers now, those here with this object."""
        for session in self._sessions:
            if isinstance(session, ChainSession):
                await session.close()

"""Generation through blocks of which servers run some and the client the others: the caches are where the blocks are.

Shapes: B rows, S new positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.generation.session import Session
from petals_tune.errors import SessionLost
from petals_tune.remote.local import LocalBlocks
from petals_tune.remote.shared_rows import share_rows
from petals_tune.swarm import loop
from petals_tune.swarm.history import History, Inputs, compose, is_identity
from petals_tune.swarm.session import MOST_POSITIONS, ChainSession, check_length
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Step
from petals_tune.wire.span import BlockSpan


class LocalSession:
    """KV caches for at most `rows` rows of `max_length` positions on the local blocks `span`."""

    def __init__(
        self, blocks: LocalBlocks, span: BlockSpan, *, rows: int, max_length: int, parts: Sequence[AdapterPart]
    ):
        """`parts`: the adapter on these blocks."""
        self._blocks, self._parts = blocks, parts
        self._session = Session(
            client="", span=span, rows=rows, max_length=max_length, adapter=None, adapter_version=None
        )
        self._order: torch.Tensor | None = None  # rows to reorder with the next step
        self._history = History()  # states, and the keys and values of a window, cannot always go back

    def step(self, inputs: Inputs, *, position: int, order: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """As `ChainSession.step`, in this thread and on `device`. Raises Diverged in the place of NotFinite."""
        check_length(position + len(inputs), self._session.max_length)
        self._history.cut(position)
        self._history.reorder(order)
        self._order = compose(self._order, order) if position else None
        try:
            output = self._run(inputs, position, device)
        except SessionLost:
            replay, at = self._history.replayed(), 0
            for before, self._order in replay.steps:
                self._run(before, at, device)
                at += len(before)
            self._order = replay.order
            output = self._run(inputs, position, device)
        self._history.add(inputs)
        return output

    def fork(self, position: int, *, rows: int, max_length: int, order: torch.Tensor | None) -> LocalSession:
        """As `ChainSession.fork`."""
        forked = LocalSession(self._blocks, self._session.span, rows=rows, max_length=max_length, parts=self._parts)
        order = compose(self._order, order)
        forked._history = self._history.fork(position, order)
        with suppress(SessionLost):  # then the next step replays the history
            forked._session = self._session.fork(position, order, rows=rows, max_length=max_length)
        return forked

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
                (output,) = engine.step([(self._session, step)])
                if isinstance(output, Exception):
                    raise output
            self._order = None
            outputs.append(output)
        return torch.cat(outputs, dim=1).to(inputs.hidden.dtype)  # a copy: autograd refuses tensors of inference mode


class SplitSession:
    """One generation session on spans of blocks, one after the other, some of them local.

    Its rows are the caller's; spans compute one of those that are equal so far (remote/shared_rows.py).
    """

    def __init__(self, sessions: Sequence[LocalSession | ChainSession], *, rows: int, max_length: int):
        """`rows`: how many there may be."""
        self.rows, self.max_length = rows, max_length
        self._sessions = list(sessions)
        self._orders: list[torch.Tensor | None] = [None] * len(self._sessions)  # not given to a span yet
        self._count = 0  # rows of the spans
        self._row_of: torch.Tensor | None = None  # (B,) the spans' row of each of ours; None: the same

    def step(self, inputs: Inputs, *, position: int, order: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """As `ChainSession.step`, from span to span; local ones compute on `device`.

        After a step that failed, the next one may begin at the same position or an earlier one.
        """
        came = compose(self._row_of, order)
        if position == 0:
            came = torch.zeros(inputs.row_count, dtype=torch.long)
            self._orders = [None] * len(self._sessions)
        if came is not None:  # else row i goes on from row i: all of them are distinct
            inputs, came, self._row_of = share_rows(inputs, came)
            if position and not is_identity(came, self._count):
                self._orders = [compose(before, came) for before in self._orders]
            self._count = len(came)
        for number, session in enumerate(self._sessions):
            # From now on the span's session keeps it, also where the step fails.
            order, self._orders[number] = self._orders[number], None
            if isinstance(session, LocalSession):
                output = session.step(inputs, position=position, order=order, device=device)
            else:
                output = loop.run(session.step(inputs, position=position, order=order))
            inputs = inputs.with_hidden(output)
        return inputs.hidden if self._row_of is None else inputs.hidden[self._row_of]

    def fork(self, position: int, *, rows: int, max_length: int, order: torch.Tensor | None) -> SplitSession:
        """Another session for at most `rows` rows, which begin with the first `position` positions of these.

        Row i of it begins as row order[i] here; None: with the same rows.
        """
        row_of = compose(self._row_of, order)
        used, now = None, None
        if row_of is not None:
            used, now = row_of.unique(return_inverse=True)
        sessions: list[LocalSession | ChainSession] = []
        try:
            for session, before in zip(self._sessions, self._orders, strict=True):
                options: dict[str, Any] = {"rows": rows, "max_length": max_length, "order": compose(before, used)}
                if isinstance(session, LocalSession):
                    sessions.append(session.fork(position, **options))
                else:
                    sessions.append(loop.run(session.fork(position, **options)))
        finally:
            forked = SplitSession(sessions, rows=rows, max_length=max_length)
            if len(sessions) < len(self._sessions):
                loop.run(forked.close())
        forked._count = self._count if used is None else len(used)
        forked._row_of = None if now is None or is_identity(now, forked._count) else now
        return forked

    async def close(self) -> None:
        """Give the caches back: those on servers now, those here with this object."""
        for session in self._sessions:
            if isinstance(session, ChainSession):
                await session.close()

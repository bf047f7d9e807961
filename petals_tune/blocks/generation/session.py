"""Sessions of generation: the keys, values and states of one client's rows on some blocks.

Shapes: B rows, S new positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.generation.memory import Memory, capacity
from petals_tune.blocks.generation.sizes import CacheSizes
from petals_tune.blocks.generation.states import Key, States
from petals_tune.errors import RequestRefused, SessionLost
from petals_tune.wire.messages import Step
from petals_tune.wire.span import BlockSpan


@dataclass
class Session:
    """The caches of one client's rows on blocks `span`; `position` of `max_length` positions are filled."""

    client: str
    span: BlockSpan
    rows: int  # now; the most that there may be until the first step
    max_length: int
    adapter: Adapter | None
    adapter_version: str | None
    position: int = 0
    padding: torch.Tensor | None = None  # (B, max_length) bool; None: no position was ever padded
    states: States = field(default_factory=States)
    most_rows: int = field(init=False)
    memory: Memory = field(init=False)

    def __post_init__(self) -> None:
        self.most_rows = self.rows
        self.memory = Memory(max_length=self.max_length)

    @classmethod
    def probe(cls, span: BlockSpan, max_length: int = 1) -> Session:
        """A session of one row, to measure with."""
        return cls(client="", span=span, rows=1, max_length=max_length, adapter=None, adapter_version=None)

    @property
    def adapter_now(self) -> Adapter | None:
        """What its adapter has for the next step: some parts act in the first one alone."""
        return self.adapter if self.adapter is None or self.position == 0 else self.adapter.after_first_step

    def check(self, step: Step) -> None:
        """Raises RequestRefused or SessionLost for a step that cannot be."""
        rows, length = step.hidden.shape[:2]
        begins = step.position == 0
        if rows > self.most_rows:
            raise RequestRefused(f"{rows} rows in a session that was opened for {self.most_rows}", reason="rows")
        if not begins and step.order is None and rows != self.rows:
            raise RequestRefused(f"a step of {rows} rows in a session of {self.rows}", reason="rows")
        if step.position > self.position:
            raise SessionLost(f"the session is at position {self.position}, the step at {step.position}")
        if step.position + length > self.max_length:
            raise RequestRefused(
                f"the session was opened for {self.max_length} positions and this step would reach "
                f"{step.position + length}; open it with max_length={step.position + length} or more",
                reason="too long",
                max_length=step.position + length,
            )
        if step.order is not None and (begins or int(step.order.min()) < 0 or int(step.order.max()) >= self.rows):
            raise RequestRefused(f"order names rows beyond 0:{0 if begins else self.rows}", reason="order")

    def go_back(self, position: int) -> list[Step]:
        """Go back to `position`, or to an earlier one with the steps to repeat from there. Raises SessionLost."""
        steps: list[Step] = []
        try:
            if position < self.position and self.states.current:
                self.position, steps = self.states.go_back(position)
            else:
                self.position = position
            if not self.memory.go_back(self.position):
                raise SessionLost(f"what the windows of these blocks see at position {position} is not kept any more")
        except SessionLost:
            self.position = 0
            self.states.forget()
            raise
        return steps

    def prepare(self, step: Step) -> None:
        """Reorder the rows of a session at the step's position, and store its padding."""
        rows, length = step.hidden.shape[:2]
        if step.position == 0:
            self.padding = None
        elif step.order is not None:
            self.states.reorder(step.order)
            self.memory.reorder(step.order, self.rows, step.position)
            if self.padding is not None:
                self.padding = self.padding[step.order]
        self.rows = rows
        if step.padding is not None and self.padding is None:
            self.padding = torch.ones(rows, self.max_length, dtype=torch.bool)
        if self.padding is not None:
            new = slice(step.position, step.position + length)
            self.padding[:, new] = True if step.padding is None else step.padding

    def undo(self, step: Step) -> None:
        """Stay at the position of a step that failed. Rows that it reordered stay so: then the caches are forgotten."""
        if step.order is not None:
            self.position = 0
            self.states.forget()

    def advance(self, step: Step, states: Mapping[Key, torch.Tensor]) -> None:
        """Count the positions of a step that was computed, and take over the states behind it."""
        self.states.advance(step, states)
        self.position = step.position + step.hidden.shape[1]

    @torch.inference_mode()
    def fork(self, position: int, order: torch.Tensor | None, *, rows: int, max_length: int) -> Session:
        """A session of at most `rows` rows that begins with the first `position` positions of this one's.

        Row i begins as row order[i] here. Raises SessionLost where these positions are not here, RequestRefused for
        rows that are not.
        """
        own = self.rows if order is None else len(order)
        if own > rows or (order is not None and (int(order.min()) < 0 or int(order.max()) >= self.rows)):
            raise RequestRefused(f"a fork of rows beyond 0:{self.rows}, or of more than {rows}", reason="order")
        if position >= max_length:
            raise RequestRefused(
                f"a fork at position {position} in a session of {max_length} positions",
                reason="too long",
                max_length=position + 1,
            )
        if position > self.position or (self.states.current and position != self.position):
            raise SessionLost(f"position {position} is not kept; the session is at position {self.position}")
        memory = self.memory.fork(self.position, position, order, max_length)
        if memory is None:
            raise SessionLost(f"what the windows of these blocks see at position {position} is not kept any more")
        child = Session(
            client=self.client,
            span=self.span,
            rows=rows,
            max_length=max_length,
            adapter=self.adapter,
            adapter_version=self.adapter_version,
            position=position,
        )
        child.rows, child.memory = own, memory
        rows_of = torch.arange(self.rows) if order is None else order
        child.states.current = {key: tensor[rows_of.to(tensor.device)] for key, tensor in self.states.current.items()}
        if self.padding is not None:
            child.padding = torch.ones(own, max_length, dtype=torch.bool)
            child.padding[:, :position] = self.padding[rows_of, :position]
        return child

    def bytes_at(self, step: Step, sizes: CacheSizes) -> int:
        """What the caches will take behind `step`, but for the beginnings that are shared already."""
        rows, length = step.hidden.shape[:2]
        start, kept = min(self.memory.start, step.position), 0
        if self.memory.shares(step.order, self.rows):
            start, kept = step.position, self.memory.tail_bytes
        return kept + sizes.bytes(self.span, rows, capacity(step.position + length - start, self.max_length - start))

"""Sessions of generation: the keys, values and states of one client's rows on some blocks.

Shapes: B rows, S new positions, M most positions, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.generation.states import Key, States
from petals_tune.errors import RequestRefused, SessionLost
from petals_tune.wire.messages import Step
from petals_tune.wire.span import BlockSpan


@dataclass
class Session:
    """The caches of one client's rows on blocks `span`; `position` of `max_length` positions are filled."""

    client: str
    span: BlockSpan
    rows: int
    max_length: int
    adapter: Adapter | None
    adapter_version: str | None
    position: int = 0
    padding: torch.Tensor | None = None  # (B, max_length) bool; None: no position was ever padded
    storage: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # layer -> keys, values: (B, heads, M, D)
    states: States = field(default_factory=States)

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
        if rows != self.rows:
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
        if step.order is not None and (int(step.order.min()) < 0 or int(step.order.max()) >= rows):
            raise RequestRefused(f"order names rows beyond 0:{rows}", reason="order")

    def go_back(self, position: int) -> list[Step]:
        """Go back to `position`, or to an earlier one with the steps to repeat from there. Raises SessionLost."""
        steps: list[Step] = []
        if position < self.position and self.states.current:
            try:
                self.position, steps = self.states.go_back(position)
            except SessionLost:
                self.position = 0
                raise
        else:
            self.position = position
        return steps

    def prepare(self, step: Step) -> None:
        """Reorder the rows of a session at the step's position, and store its padding."""
        rows, length = step.hidden.shape[:2]
        if step.order is not None:
            self.states.reorder(step.order)
            for tensors in self.storage.values():
                for tensor in tensors:
                    tensor[:, :, : step.position] = tensor[step.order, :, : step.position]
            if self.padding is not None:
                self.padding = self.padding[step.order]
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

    def append(self, layer: int, new: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Store keys and values (B, heads, S, D) from `position` on; all of them until there, as views."""
        if layer not in self.storage:
            # Untouched pages of an empty tensor take no memory, so the whole length is reserved at once.
            self.storage[layer] = [t.new_empty(t.shape[0], t.shape[1], self.max_length, t.shape[3]) for t in new]
        stop = self.position + new[0].shape[2]
        views = []
        for kept, tensor in zip(self.storage[layer], new, strict=True):
            kept[:, :, self.position : stop] = tensor
            views.append(kept[:, :, :stop])
        return views

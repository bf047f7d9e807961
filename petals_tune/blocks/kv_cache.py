"""Key-value caches of generation sessions, as transformers' attention layers use them.

Shapes: B rows, S new positions, M most positions, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from petals_tune.blocks.adapters import Adapter
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

    @classmethod
    def probe(cls, span: BlockSpan) -> Session:
        """A session of one position of one row, to measure with."""
        return cls(client="", span=span, rows=1, max_length=1, adapter=None, adapter_version=None)

    def prepare(self, step: Step) -> None:
        """Go back to the step's position, reorder rows, store its padding. Raises RequestRefused, SessionLost."""
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
        if step.order is not None:
            if int(step.order.min()) < 0 or int(step.order.max()) >= rows:
                raise RequestRefused(f"order names rows beyond 0:{rows}", reason="order")
            for tensors in self.storage.values():
                for tensor in tensors:
                    tensor[:, :, : step.position] = tensor[step.order, :, : step.position]
            if self.padding is not None:
                self.padding = self.padding[step.order]
        self.position = step.position
        if step.padding is not None and self.padding is None:
            self.padding = torch.ones(rows, self.max_length, dtype=torch.bool)
        if self.padding is not None:
            new = slice(step.position, step.position + length)
            self.padding[:, new] = True if step.padding is None else step.padding

    def undo(self, step: Step) -> None:
        """Stay at the position of a step that failed. Rows that it reordered stay so: then the caches are forgotten."""
        self.position = step.position if step.order is None else 0

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


class StepCache(Cache):
    """The cache that transformers' layers use during one step of one or more sessions.

    The rows of all sessions are concatenated, each filled from the left; the mask hides what is beyond a row's own
    length, so that rows of different lengths share a step of one token.
    """

    def __init__(self, sessions: Sequence[Session], new_positions: int):
        super().__init__(layers=[])
        self._sessions, self._new = sessions, new_positions
        self.total = max(session.position for session in sessions) + new_positions

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self._sessions) == 1:
            keys, values = self._sessions[0].append(layer_idx, (key_states, value_states))
            return keys, values
        joined = [t.new_zeros(t.shape[0], t.shape[1], self.total, t.shape[3]) for t in (key_states, value_states)]
        first = 0
        for session in self._sessions:
            rows = slice(first, first + session.rows)
            for whole, part in zip(
                joined, session.append(layer_idx, (key_states[rows], value_states[rows])), strict=True
            ):
                whole[rows, :, : part.shape[2]] = part
            first += session.rows
        return joined[0], joined[1]

    @property
    def is_compileable(self) -> bool:
        """Whether transformers makes a mask always, here where several sessions share a step.

        Otherwise it makes none where no row has padding, and then another kernel may compute all rows.
        """
        return len(self._sessions) > 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.total - self._new

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.total, 0

    def mask(self) -> torch.Tensor | None:
        """(B, total) bool, True = attend; None for a lone session without padding."""
        if len(self._sessions) == 1 and self._sessions[0].padding is None:
            return None
        mask = torch.zeros(sum(session.rows for session in self._sessions), self.total, dtype=torch.bool)
        first = 0
        for session in self._sessions:
            stop = session.position + self._new
            mask[first : first + session.rows, :stop] = True if session.padding is None else session.padding[:, :stop]
            first += session.rows
        return mask

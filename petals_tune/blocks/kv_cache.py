"""Caches of generation sessions, as transformers' layers use them: keys and values, and states (blocks/states.py).

Shapes: B rows, S new positions, M most positions, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.states import MOST_INPUTS, MOST_SNAPSHOTS, Key, States
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


@dataclass(frozen=True, kw_only=True)
class CacheSizes:
    """Bytes of a session's caches for each row, by block."""

    start: int  # number of the first block
    positions: Sequence[int]  # keys and values of one position
    states: Sequence[int]  # states, however long the session
    inputs: int = 0  # the input of one position, which sessions keep where some block has states

    @property
    def of_position(self) -> int:
        """Most bytes of one position in one block."""
        return max(self.positions)

    def bytes(self, span: BlockSpan, rows: int, max_length: int) -> int:
        """Most bytes of a session of `rows` rows of `max_length` positions on the blocks `span`."""
        each, once, kept = self._of(span)
        return rows * (each * max_length + once + kept * min(max_length, MOST_INPUTS))

    def longest(self, span: BlockSpan, rows: int, available_bytes: int) -> int:
        """The largest `max_length` of a session that takes no more than `available_bytes`."""
        each, once, kept = self._of(span)
        left = available_bytes // rows - once
        length = left // (each + kept)
        return max(length if length < MOST_INPUTS else (left - kept * MOST_INPUTS) // each, 0)

    def _of(self, span: BlockSpan) -> tuple[int, int, int]:
        """Bytes of a row: (for each position, whatever the length, for each position whose input is kept)."""
        blocks = slice(span.start - self.start, span.stop - self.start)
        states = sum(self.states[blocks])
        each = max(sum(self.positions[blocks]), 1)  # a session without attention keeps whether a position is padding
        return each, states * (1 + MOST_SNAPSHOTS), self.inputs if states else 0


class StepCache(Cache):
    """The cache that transformers' layers use during one step of one or more sessions.

    The rows of all sessions are concatenated, each filled from the left; the mask hides what is beyond a row's own
    length, so that rows of different lengths share a step of one token.
    """

    def __init__(self, sessions: Sequence[Session], new_positions: int):
        super().__init__(layers=[])
        self._sessions, self._new = sessions, new_positions
        self.total = max(session.position for session in sessions) + new_positions
        # Of all sessions, copied where a layer asked for them: layers write into what they get.
        self._states: dict[Key, torch.Tensor] = {}

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

    # States. What they hold for a lone session without any is what the library's own cache holds.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._state((layer_idx, "conv", state_idx))

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Append inputs (B, C, S) of a convolution and keep the last ones; returns them with those kept before."""
        before = self.get_conv_state(layer_idx, state_idx)
        kept = conv_kernel_size or (conv_states if before is None else before).shape[-1]
        if before is None:
            whole = nn.functional.pad(conv_states, (max(kept - conv_states.shape[-1], 0), 0))
        else:
            whole = torch.cat([before, conv_states], dim=-1)
        self._states[layer_idx, "conv", state_idx] = whole[..., -kept:].clone()
        return whole

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._state((layer_idx, "recurrent", state_idx))

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        return self._put_state((layer_idx, "recurrent", state_idx), recurrent_states)

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        """As in `MiniMaxCache`."""
        return self._state((layer_idx, "linear", 0))

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        """As in `MiniMaxCache`."""
        self._put_state((layer_idx, "linear", 0), linear_cache)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return any(session.states.current for session in self._sessions)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def _state(self, key: Key) -> torch.Tensor | None:
        if key not in self._states:
            parts = [session.states.current.get(key) for session in self._sessions]
            shaped = next((part for part in parts if part is not None), None)
            if shaped is None:
                return None
            zeros = [shaped.new_zeros(session.rows, *shaped.shape[1:]) for session in self._sessions]
            self._states[key] = torch.cat([z if part is None else part for part, z in zip(parts, zeros, strict=True)])
        return self._states[key]

    def _put_state(self, key: Key, state: torch.Tensor) -> torch.Tensor:
        before = self._state(key)
        self._states[key] = state.to(state.dtype if before is None else before.dtype, copy=True)
        return self._states[key]

    def states_of(self, number: int) -> dict[Key, torch.Tensor]:
        """The states of session `number` behind the step."""
        first = sum(session.rows for session in self._sessions[:number])
        rows = slice(first, first + self._sessions[number].rows)
        alone = len(self._sessions) == 1
        return {key: state if alone else state[rows].clone() for key, state in self._states.items()}

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

"""The cache that transformers' layers use during a step of sessions: keys and values, and states.

Shapes: B rows, S new positions, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.generation.states import Key


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

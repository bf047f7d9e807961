"""The cache that transformers' layers use during a step of sessions: keys and values, and states.

Shapes: B rows, S new positions, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from petals_tune.blocks.generation.attention import NotApart, joined
from petals_tune.blocks.generation.memory import Part
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.generation.states import Key


@dataclass(frozen=True, kw_only=True)
class Attention:
    """How the layers of loaded blocks attend, as the probe found it."""

    apart: bool  # each session by itself (blocks/generation/attention.py); otherwise in tensors of all, filled up
    windows: Mapping[int, int] = field(default_factory=dict)  # layer -> positions that it attends to


JOINT = Attention(apart=False)


class StepCache(Cache):
    """The cache that transformers' layers use during one step of one or more sessions.

    Where layers do not attend to each session apart, the rows of all sessions are concatenated, each filled from the
    left; the mask hides what is beyond a row's own length, so that rows of different lengths share a step of one token.
    """

    def __init__(self, sessions: Sequence[Session], new_positions: int, attention: Attention = JOINT):
        super().__init__(layers=[])
        self._sessions, self._new, self._windows = sessions, new_positions, attention.windows
        self.apart = attention.apart and new_positions == 1
        self.rows = [session.rows for session in sessions]
        self.positions = [session.position for session in sessions]
        self.padded = [session.padding is not None for session in sessions]
        self.total = max(self.positions) + new_positions
        self.mask_window: int | None = None
        self.layers_seen: set[int] = set()
        self._stored: tuple[torch.Tensor, list[list[Part]]] | None = None  # by the latest layer
        # Of all sessions, copied where a layer asked for them: layers write into what they get.
        self._states: dict[Key, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.layers_seen.add(layer_idx)
        window, rows = self._windows.get(layer_idx), self.rows
        alone = len(rows) == 1
        each = (
            [(key_states, value_states)]
            if alone
            else zip(key_states.split(rows), value_states.split(rows), strict=True)
        )
        kept = [
            session.memory.append(layer_idx, pair, session.position, window)
            for session, pair in zip(self._sessions, each, strict=True)
        ]
        if self.apart:
            if self._stored is not None:
                raise NotApart("a layer that stores keys and does not attend to them")
            self._stored = key_states, kept
            return key_states, value_states
        if alone:
            return joined(kept[0])
        whole = [t.new_zeros(t.shape[0], t.shape[1], self.total, t.shape[3]) for t in (key_states, value_states)]
        first = 0
        for number, parts in enumerate(kept):
            for to, part in zip(whole, joined(parts), strict=True):
                to[first : first + rows[number], :, : part.shape[2]] = part
            first += rows[number]
        return whole[0], whole[1]

    def take(self, keys: torch.Tensor) -> list[list[Part]]:
        """What each session sees, in the layer that has just stored `keys`. Raises NotApart where they are others."""
        stored, self._stored = self._stored, None
        if stored is None or stored[0] is not keys:
            raise NotApart("attention to other keys than those that were stored")
        return stored[1]

    # What masks are made for: transformers asks for that of a layer without a window, here 0, or with one, 1.

    @property
    def is_sliding(self) -> list[bool]:
        return [False, True] if self._windows else [False]

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self.is_sliding)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self.is_sliding)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self.mask_window = next(iter(self._windows.values())) if self._windows and layer_idx == 1 else None
        if self.apart:
            return 1, 0  # the mask of blocks/generation/attention.py is of each session's own positions
        first = 0
        if self.mask_window is not None and len(self._sessions) == 1:
            first = max(self.positions[0] - self.mask_window + 1, 0)
        return self.total - first, first

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.total - self._new

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

    def mask(self) -> torch.Tensor | None:
        """(B, total) bool, True = attend; None where no session has padding and none is filled up."""
        filled = len(self._sessions) > 1 and (
            not self.apart or any(session.states.current for session in self._sessions)
        )
        if not any(self.padded) and not filled:
            return None
        mask = torch.zeros(sum(session.rows for session in self._sessions), self.total, dtype=torch.bool)
        first = 0
        for session in self._sessions:
            stop = session.position + self._new
            mask[first : first + session.rows, :stop] = True if session.padding is None else session.padding[:, :stop]
            first += session.rows
        return mask

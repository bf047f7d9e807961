"""Memory of sessions of generation."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from petals_tune.blocks.generation.memory import window_capacity
from petals_tune.blocks.generation.states import MOST_INPUTS, MOST_SNAPSHOTS
from petals_tune.wire.span import BlockSpan

_MOST_POSITIONS = 2**31  # of any session: where all layers have windows, no length takes more memory


@dataclass(frozen=True, kw_only=True)
class CacheSizes:
    """Bytes of a session's caches for each row, by block."""

    start: int  # number of the first block
    positions: Sequence[int]  # keys and values of one position
    states: Sequence[int]  # states, however long the session
    inputs: int = 0  # the input of one position, which sessions keep where some block has states
    windows: Sequence[int | None] = ()  # positions that a block attends to; None: all

    @property
    def of_position(self) -> int:
        """Most bytes of one position in one block."""
        return max(self.positions)

    def bytes(self, span: BlockSpan, rows: int, length: int) -> int:
        """Bytes of a session of `rows` rows with room for `length` positions on the blocks `span`."""
        blocks = slice(span.start - self.start, span.stop - self.start)
        states = sum(self.states[blocks])
        windows = self.windows[blocks] if self.windows else [None] * len(span)
        kept = sum(
            size * (length if window is None else min(length, window_capacity(window)))
            for size, window in zip(self.positions[blocks], windows, strict=True)
        )
        if not any(self.positions[blocks]):
            kept = length  # whether a position is padding
        inputs = self.inputs * min(length, MOST_INPUTS) if states else 0
        return rows * (kept + states * (1 + MOST_SNAPSHOTS) + inputs)

    def longest(self, span: BlockSpan, rows: int, available_bytes: int) -> int:
        """The largest length of a session that takes no more than `available_bytes`."""

        def needed(length: int) -> int:
            return self.bytes(span, rows, length)

        return bisect.bisect_right(range(1, _MOST_POSITIONS), available_bytes, key=needed)

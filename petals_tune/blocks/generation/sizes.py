"""Memory of sessions of generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from petals_tune.blocks.generation.states import MOST_INPUTS, MOST_SNAPSHOTS
from petals_tune.wire.span import BlockSpan


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

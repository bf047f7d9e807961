"""The inputs of a generation session, kept by the client so that they can be replayed on another server.

Shapes: B rows, S new positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a span was given for some positions."""

    hidden: torch.Tensor  # (B, S, H)
    padding: torch.Tensor | None  # (B, S) bool
    positions: torch.Tensor | None  # (B or 1, S) int64
    context_length: int | None = None  # of the step that they are a part of, as in a Step; kept for replays

    def __len__(self) -> int:
        return self.hidden.shape[1]

    @property
    def row_count(self) -> int:
        return self.hidden.shape[0]

    def cut(self, start: int, stop: int) -> Inputs:
        return replace(
            self,
            hidden=self.hidden[:, start:stop],
            padding=None if self.padding is None else self.padding[:, start:stop],
            positions=None if self.positions is None else self.positions[:, start:stop],
        )

    def with_hidden(self, hidden: torch.Tensor) -> Inputs:
        return replace(self, hidden=hidden)

    def rows(self, order: torch.Tensor) -> Inputs:
        if is_identity(order, self.row_count):
            return self
        positions = self.positions
        return replace(
            self,
            hidden=self.hidden[order],
            padding=None if self.padding is None else self.padding[order],
            positions=positions[order] if positions is not None and positions.shape[0] > 1 else positions,
        )


def is_identity(order: torch.Tensor, rows: int) -> bool:
    """Whether row i of `rows` rows stays row i."""
    return len(order) == rows and torch.equal(order, torch.arange(rows))


def compose(before: torch.Tensor | None, order: torch.Tensor | None) -> torch.Tensor | None:
    """The order of rows that `before` and then `order` make; None: rows stay as they are."""
    if before is None or order is None:
        return order if before is None else before
    return before[order]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The steps that bring a new session to where another one is, and the order of its rows behind them."""

    steps: Sequence[tuple[Inputs, torch.Tensor | None]] = ()  # with the order of rows before each
    order: torch.Tensor | None = None


@dataclass
class History:
    """The inputs of a span so far. Reordering rows composes indices; tensors are gathered when they are replayed."""

    parts: list[tuple[Inputs, torch.Tensor | None]] = field(default_factory=list)  # None: rows as they came
    length: int = 0  # positions

    def add(self, inputs: Inputs) -> None:
        self.parts.append((inputs, None))
        self.length += len(inputs)

    def reorder(self, order: torch.Tensor | None) -> None:
        """Make row i what row order[i] has been; rows may become more or fewer."""
        if order is not None:
            self.parts = [(inputs, compose(rows, order)) for inputs, rows in self.parts]

    def cut(self, length: int) -> None:
        """Forget what lies behind the first `length` positions. From the end: a token forgets nothing, and is quick."""
        while self.length > length:
            inputs, rows = self.parts.pop()
            self.length -= len(inputs)
            if self.length < length:
                self.parts.append((inputs.cut(0, length - self.length), rows))
                self.length = length

    def fork(self, length: int, order: torch.Tensor | None) -> History:
        """A history of its own that begins with the first `length` positions, rows in this order."""
        forked = History(list(self.parts), self.length)
        forked.cut(length)
        forked.reorder(order)
        return forked

    def replayed(self) -> Replay:
        """The steps of all inputs so far. Rows that come from the same rows up to a step are one row in it."""
        steps: list[tuple[Inputs, torch.Tensor | None]] = []
        came: torch.Tensor | None = None  # (rows of now,) the row of the last step that each of them was
        count = 0  # rows of the last step
        for inputs, rows in self.parts:
            own = torch.arange(inputs.row_count) if rows is None else rows
            if came is None:
                distinct, now = own.unique(return_inverse=True)
                steps.append((inputs.rows(distinct), None))
            else:
                pairs, now = torch.stack([came, own], dim=1).unique(dim=0, return_inverse=True)
                order = None if is_identity(pairs[:, 0], count) else pairs[:, 0]
                distinct = pairs[:, 1]
                steps.append((inputs.rows(distinct), order))
            came, count = now, len(distinct)
        return Replay(steps=steps, order=None if came is None or is_identity(came, count) else came)

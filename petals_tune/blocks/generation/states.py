"""States of a generation session's blocks: recurrent states and short convolutions, and the way back to earlier ones.

Keys and values of earlier positions stay where they are, so a session goes back by forgetting the later ones. A state
has taken in every position and cannot be cut. So a session keeps the states before some of its latest steps
(snapshots), and the inputs since the oldest of them: it goes back to a snapshot, and computes from there again, step by
step as the first time, which gives the same numbers.

Tensors in here are never written to: a snapshot is a reference. Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from msgspec.structs import replace

from petals_tune.blocks.separate_rows import context_length
from petals_tune.errors import SessionLost
from petals_tune.wire.messages import Step

# A block's number, the kind of state ("conv", "recurrent" or "linear"), and its number among those of the block.
Key = tuple[int, str, int]
Tensors = Mapping[Key, torch.Tensor]  # each (B, ...)

MOST_SNAPSHOTS = 2
SPACING = 32  # positions between snapshots where a session takes one position a step
MOST_INPUTS = 1024  # positions whose inputs are kept, at the most


@dataclass
class States:
    """The states of one session at its position; empty at position 0, and in blocks that have none."""

    current: Tensors = field(default_factory=dict)
    _snapshots: list[tuple[int, Tensors]] = field(default_factory=list)  # (position, states there), oldest first
    _inputs: list[Step] = field(default_factory=list)  # of the positions since the oldest snapshot

    def advance(self, step: Step, states: Tensors) -> None:
        """Take over the states behind `step`. Those before it become a snapshot, if it is time for one."""
        if not states:
            return
        length = step.hidden.shape[1]
        if not self._snapshots or length > 1 or step.position >= self._snapshots[-1][0] + SPACING:
            self._snapshots.append((step.position, self.current))
        self._inputs.append(replace(step, order=None))
        self.current = states
        while len(self._snapshots) > MOST_SNAPSHOTS or self._kept_positions() > MOST_INPUTS:
            del self._snapshots[0]
            oldest = self._snapshots[0][0] if self._snapshots else step.position + length
            self._inputs = [each for each in self._inputs if each.position >= oldest]

    def go_back(self, position: int) -> tuple[int, list[Step]]:
        """Go back to the latest snapshot at or before `position`; returns its own position and the steps to repeat.

        Raises SessionLost where all snapshots are behind `position`.
        """
        if position == 0:
            self.forget()
            return 0, []
        while self._snapshots and self._snapshots[-1][0] > position:
            self._snapshots.pop()
        if not self._snapshots:
            self.forget()
            raise SessionLost(f"the states of these blocks at position {position} are not kept any more")
        start, self.current = self._snapshots[-1]
        steps = [step for step in self._inputs if start <= step.position < position]
        self._inputs = [step for step in self._inputs if step.position < start]
        return start, [_until(position, step) for step in steps]

    def reorder(self, order: torch.Tensor) -> None:
        """Make row i what row order[i] is. There is no way back behind this."""
        current = {key: tensor[order.to(tensor.device)] for key, tensor in self.current.items()}
        self.forget()
        self.current = current

    def forget(self) -> None:
        self.current, self._snapshots, self._inputs = {}, [], []

    def _kept_positions(self) -> int:
        return sum(step.hidden.shape[1] for step in self._inputs)


def positions_of(step: Step) -> list[Step]:
    """Cut a step into steps of one position."""
    first, *others = [_cut(step, at, at + 1) for at in range(step.hidden.shape[1])]
    return [first, *(replace(each, order=None) for each in others)]


def split_step(step: Step, length: int) -> tuple[Step, Step]:
    """Cut a step behind its first `length` positions. Both choose rotary frequencies as the whole step does."""
    last = context_length(step) if step.positions is None else int(step.positions.max()) + 1
    whole = replace(step, context_length=max(last, step.context_length or 1))
    return _cut(whole, 0, length), replace(_cut(whole, length, step.hidden.shape[1]), order=None)


def _until(position: int, step: Step) -> Step:
    """The part of a step that lies before `position`."""
    return step if step.position + step.hidden.shape[1] <= position else _cut(step, 0, position - step.position)


def _cut(step: Step, start: int, stop: int) -> Step:
    """Positions start:stop of a step, counted from its own."""
    positions = step.positions
    return replace(
        step,
        position=step.position + start,
        hidden=step.hidden[:, start:stop],
        padding=None if step.padding is None else step.padding[:, start:stop],
        positions=None if positions is None else positions[:, start:stop],
    )

"""Keys and values of one session: a tail of its own, which grows, behind beginnings that other sessions may share.

A tail is contiguous, so attention reads it where it is, as a view. A beginning is never written to again: sessions that
fork share it, and a session that multiplies its rows (beams) keeps what they have in common once. A layer that attends
to a window of positions keeps these, and SLACK positions before them, so that a session can go back a little.

Shapes: B rows, G grouped heads of keys, S new positions, T positions, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

LEAST = 16  # positions that a tail has room for
MOST_MORE = 1024  # positions by which it grows at the most; it doubles up to there
MOST_SHARED = 8  # beginnings of one session: attention goes through each by itself
SLACK = 64  # positions before a window that are kept, for sessions that go back

Pair = tuple[torch.Tensor, torch.Tensor]  # keys, values: (B, G, T, D)


def capacity(length: int, most: int) -> int:
    """How many positions a tail of `length` positions has room for, in a session that has `most` left for it."""
    if length <= 0:
        return 0
    roomy = max(LEAST, 1 << (length - 1).bit_length()) if length <= MOST_MORE else -(-length // MOST_MORE) * MOST_MORE
    return max(min(roomy, most), length)


def window_capacity(window: int) -> int:
    """The most positions that a layer with a window of so many has room for."""
    kept = window - 1 + SLACK
    return kept + max(SLACK, kept // 4)  # it moves its positions to the front when it is full: 4 copies a token


@dataclass(eq=False)
class Beginning:
    """The keys and values of positions `start:stop` of some rows. Never written to."""

    start: int
    stop: int
    layers: dict[int, tuple[int, torch.Tensor, torch.Tensor]]  # layer -> position of index 0, keys, values

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for _, keys, values in self.layers.values())


@dataclass(frozen=True)
class Shared:
    """A beginning as one session sees it: its positions before `stop`, row i being what row order[i] is there."""

    beginning: Beginning
    stop: int
    order: torch.Tensor | None  # (B,); None: with the same rows

    def reordered(self, order: torch.Tensor) -> Shared:
        return Shared(self.beginning, self.stop, order if self.order is None else self.order[order])

    @cached_property
    def groups(self) -> list[tuple[int | None, torch.Tensor | None]]:
        """Pairs of a row of the beginning and the session's rows that share it; None: all, each its own."""
        if self.order is None:
            return [(None, None)]
        found = self.order.unique().tolist()
        return [(row, None if len(found) == 1 else (self.order == row).nonzero().flatten()) for row in found]


@dataclass(slots=True)
class Part:
    """Keys and values of some positions in one layer. Where `shared` says so, of other rows than the session's."""

    start: int
    keys: torch.Tensor
    values: torch.Tensor
    shared: Shared | None = None

    @property
    def stop(self) -> int:
        return self.start + self.keys.shape[2]

    def since(self, first: int) -> Part:
        """The positions from `first` on."""
        hidden = max(first - self.start, 0)
        keys, values = (each.narrow(2, hidden, each.shape[2] - hidden) for each in (self.keys, self.values))
        return Part(self.start + hidden, keys, values, self.shared)

    def for_rows(self) -> Pair:
        """Keys and values with the session's rows; a copy where they are others."""
        if self.shared is None or self.shared.order is None:
            return self.keys, self.values
        order = self.shared.order.to(self.keys.device)
        return self.keys.index_select(0, order), self.values.index_select(0, order)


class _Tail:
    """The keys and values of one layer behind the shared beginnings: positions from `base` on."""

    __slots__ = ("base", "keys", "values", "window")

    def __init__(self, base: int, window: int | None):
        self.base, self.window = base, window
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def view(self, first: int, stop: int) -> Pair:
        assert self.keys is not None
        assert self.values is not None
        start, length = first - self.base, stop - first
        return self.keys.narrow(2, start, length), self.values.narrow(2, start, length)


@dataclass
class Memory:
    """The keys and values of a session of at most `max_length` positions."""

    max_length: int
    shared: list[Shared] = field(default_factory=list)
    start: int = 0  # of the tails
    earliest: int = 0  # position that the session can go back to at the most, but for 0
    tails: dict[int, _Tail] = field(default_factory=dict)  # by layer

    def append(self, layer: int, new: Pair, position: int, window: int | None) -> list[Part]:
        """Store keys and values from `position` on; returns what these positions see, oldest first.

        That is all there is, or of a layer with a window the positions before `position` that are in it.
        """
        tail = self.tails.get(layer)
        if tail is None:
            tail = self.tails[layer] = _Tail(self.start, window)
        length = new[0].shape[2]
        stop = position + length
        first = 0 if window is None else max(position - window + 1, 0)
        index = position - tail.base
        if window is not None and index + length > window_capacity(window):
            own = self._move(tail, new, first, position)
        else:
            if tail.keys is None or index + length > tail.keys.shape[2]:
                self._grow(tail, new, index)
            for kept, each in zip(tail.view(position, stop), new, strict=True):
                kept.copy_(each)
            begin = max(first, tail.base)
            own = Part(begin, *tail.view(begin, stop))
        if not self.shared:
            return [own]
        return [*self._shared_parts(layer, first), own]

    def _grow(self, tail: _Tail, new: Pair, index: int) -> None:
        """Give a tail room for more positions, or its first ones."""
        most = self.max_length - self.start if tail.window is None else window_capacity(tail.window)
        room = capacity(index + new[0].shape[2], most)
        old = tail.keys, tail.values
        tail.keys, tail.values = (each.new_empty(*each.shape[:2], room, each.shape[3]) for each in new)
        for kept, before in zip((tail.keys, tail.values), old, strict=True):
            if before is not None and index:
                kept.narrow(2, 0, index).copy_(before.narrow(2, 0, index))

    def _move(self, tail: _Tail, new: Pair, first: int, position: int) -> Part:
        """Keep the last positions of a window alone; returns those from `first` on, with the new ones."""
        assert tail.window is not None
        first = max(first, tail.base)
        stop = position + new[0].shape[2]
        kept_from = max(stop - (tail.window - 1 + SLACK), tail.base)
        whole = list(new)
        if tail.keys is not None and (oldest := min(first, kept_from)) < position:
            before = tail.view(oldest, position)
            whole = [torch.cat(pair, dim=2) for pair in zip(before, new, strict=True)]
        else:
            oldest = position
        room = window_capacity(tail.window)
        kept_from = max(kept_from, oldest)
        buffers = [each.new_empty(*each.shape[:2], room, each.shape[3]) for each in new]
        for buffer, each in zip(buffers, whole, strict=True):
            buffer.narrow(2, 0, stop - kept_from).copy_(each.narrow(2, kept_from - oldest, stop - kept_from))
        (tail.keys, tail.values), tail.base = buffers, kept_from
        self.earliest = max(self.earliest, kept_from + tail.window - 1)
        keys, values = (each.narrow(2, first - oldest, stop - first) for each in whole)
        return Part(first, keys, values)

    def _shared_parts(self, layer: int, first: int) -> list[Part]:
        parts = []
        for each in self.shared:
            held = each.beginning.layers.get(layer)
            if held is None or first >= each.stop:
                continue
            base, keys, values = held
            start = max(first, base)
            length = each.stop - start
            parts.append(
                Part(start, keys.narrow(2, start - base, length), values.narrow(2, start - base, length), each)
            )
        return parts

    def go_back(self, position: int) -> bool:
        """Forget what is at `position` and behind; whether all that is needed before it is there."""
        if position == 0:
            self.forget()
            return True
        if position < self.earliest:
            self.forget()
            return False
        if position < self.start:
            self.shared = [
                each if each.stop <= position else Shared(each.beginning, position, each.order)
                for each in self.shared
                if each.beginning.start < position
            ]
            self.start, self.tails = position, {}
        return True

    def forget(self) -> None:
        self.shared, self.start, self.earliest, self.tails = [], 0, 0, {}

    def shares(self, order: torch.Tensor | None, rows: int) -> bool:
        """Whether what `rows` rows have becomes a beginning where they are reordered so."""
        return order is not None and len(order) > rows and len(self.shared) < MOST_SHARED

    def reorder(self, order: torch.Tensor, rows: int, position: int) -> None:
        """Make row i what row order[i] of `rows` is. What rows have in common is kept once where they become more."""
        if self.shares(order, rows):
            self.share(position)
        self.shared = [each.reordered(order) for each in self.shared]
        for tail in self.tails.values():
            if tail.keys is None or tail.values is None:
                continue
            here = order.to(tail.keys.device)
            for name, whole in (("keys", tail.keys), ("values", tail.values)):
                kept = whole.new_empty(len(order), *whole.shape[1:])
                length = position - tail.base
                torch.index_select(whole.narrow(2, 0, length), 0, here, out=kept.narrow(2, 0, length))
                setattr(tail, name, kept)

    def share(self, position: int) -> None:
        """Make the tails up to `position` a beginning, which others may share."""
        layers = {
            layer: (tail.base, tail.keys, tail.values)
            for layer, tail in self.tails.items()
            if tail.keys is not None and tail.values is not None and tail.base < position
        }
        if layers:
            made = Beginning(start=self.start, stop=position, layers=layers)
            self.shared = [*self.shared, Shared(made, position, None)]
            self.start, self.tails = position, {}

    def fork(self, at: int, position: int, order: torch.Tensor | None, max_length: int) -> Memory | None:
        """A memory that begins with the first `position` positions of this one, which is at position `at`.

        Both share them from now on. None where they are not all here any more, or in too many pieces.
        """
        if len(self.shared) >= MOST_SHARED and position > self.start:
            return None
        if position > self.start:
            self.share(at)
        child = Memory(max_length=max_length, shared=list(self.shared), start=self.start, earliest=self.earliest)
        if not child.go_back(position):
            return None
        if order is not None:
            child.shared = [each.reordered(order) for each in child.shared]
        return child

    @property
    def tail_bytes(self) -> int:
        """What the tails take."""
        pairs = [(tail.keys, tail.values) for tail in self.tails.values()]
        return sum(each.nbytes for pair in pairs for each in pair if each is not None)

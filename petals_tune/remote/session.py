"""Generation sessions as transformers sees them: a `Cache` whose keys and values are on servers."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers.cache_utils import Cache

from petals_tune.remote.span_session import SpanSession, counted, real, version_name
from petals_tune.remote.speculative.speculation import Speculation
from petals_tune.swarm.history import is_identity
from petals_tune.wire.adapter import AdapterVersion


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A text to go on with."""

    text: torch.Tensor  # (B, T), with tokens that the caches do not hold yet
    ended: torch.Tensor  # (B,) bool: rows that go on with padding alone
    pad: int | None = None  # that padding


class RemoteCache(SpanSession, Cache):
    """A generation session on all blocks of a model: pass it as `past_key_values`, to `generate()` or to the model.

    `position` counts what the caches hold: `virtual` positions of a soft prompt, then those of `ids` (B, T), the text
    tokens; so a longer text can go on where the session stands, and another text from where the two part. `ids` is None
    where the caches hold positions whose tokens are not known, such as `inputs_embeds`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """As `SpanSession`; `max_length` counts text positions."""
        Cache.__init__(self, layers=[])
        SpanSession.__init__(self, *args, **kwargs)
        self.virtual = 0
        self.ids: torch.Tensor | None = None
        self.speculation: Speculation | None = None  # drafts, where generate() was asked for them
        self._drafted: torch.Tensor | None = None  # position ids behind `position` that servers hold, if not counted
        self._standing: Standing | None = None  # where generate() left the text; None: the caches changed since
        # Of the last call of generate(): tokens that end a row, and the one behind them.
        self.ends: torch.Tensor | None = None
        self.pad: int | None = None
        self._next_ids: torch.Tensor | None = None
        self._by_hand = True  # the next step is not one of generate(), which has compared the adapter
        self.generating = threading.Lock()  # held by the call of generate() that it is used by

    # The rows and positions that the caches hold.

    def rollback(self, position: int) -> None:
        super().rollback(position)
        if self.ids is not None:
            text = position - self.virtual
            self.ids = self.ids[:, :text] if text > 0 else None
        self.virtual = min(self.virtual, position)
        self._standing = None

    def reorder(self, order: torch.Tensor) -> None:
        super().reorder(order)
        if self.ids is not None:
            self.ids = self.ids[order.to(self.ids.device)]
        self._standing = None

    def close(self) -> None:
        super().close()
        self.virtual, self.ids, self._standing = 0, None, None

    def _like_this(self, max_length: int) -> Self:
        other = super()._like_this(max_length)
        other.virtual, other.ids = self.virtual, self.ids
        return other

    def _room(self) -> int:
        return self.max_length + self.virtual

    def advance(
        self,
        hidden: torch.Tensor,
        *,
        padding: torch.Tensor | None,
        positions: torch.Tensor | None,
        adapter: Callable[[], AdapterVersion | None],
        choice: object = None,
        same_adapter: bool = False,
        order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ids, self._next_ids = self._next_ids, None
        by_hand, self._by_hand = self._by_hand, True
        before = self.position
        if before == 0:
            self.virtual = 0 if ids is None else hidden.shape[1] - ids.shape[1]
        started_s = time.perf_counter()
        output = super().advance(
            hidden,
            padding=padding,
            positions=positions,
            adapter=adapter,
            choice=choice,
            same_adapter=same_adapter or not by_hand,
            order=order,
        )
        if self.speculation is not None:
            drafted = self.speculation.stepped(hidden.shape[1], time.perf_counter() - started_s)
            self._drafted = None if self._positions is None else self._positions[:, self.position - drafted :]
            super().rollback(self.position - drafted)
        self._take_in_text(ids, before)
        return output

    def accept(self, ids: torch.Tensor) -> None:
        """Count the next drafted position, which servers hold already, as one of the text; `ids` (1, 1): its token."""
        before, positions = self.position, self._drafted
        if positions is not None:
            positions, self._drafted = positions[:, :1], positions[:, 1:]
        padding = None if self._padding is None else torch.nn.functional.pad(self._padding, (0, 1), value=True)
        self._take_in(1, positions, padding)
        self._take_in_text(ids, before)
        self._next_ids, self._by_hand = None, True

    def _take_in_text(self, ids: torch.Tensor | None, before: int) -> None:
        """Keep the tokens of what was taken in from position `before` on; None: they are not known."""
        if ids is None or (self.ids is None and before > self.virtual):
            self.ids = None
        else:
            self.ids = ids if self.ids is None else torch.cat([self.ids, ids.to(self.ids.device)], dim=1)
        self._standing = None

    # What generate() and the models' mask functions ask.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.position + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        self.rollback(self.position - abs(tokens_to_remove))  # transformers passes -n to remove n

    def reset(self) -> None:
        self.close()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder(torch.arange(self._rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder(torch.arange(self._rows)[indices.cpu()])

    # What the model with remote blocks does with it.

    def begin_turn(
        self,
        adapter: AdapterVersion | None,
        choice: object = None,
        *,
        ends: torch.Tensor | None = None,
        pad: torch.Tensor | None = None,
    ) -> None:
        """Begin a call of generate(); anew where the caches were computed with another adapter than this one.

        choice:    what the call named, whose soft prompt is no part of `adapter`; None: nothing
        ends, pad: the tokens that end a row, and the one behind them
        """
        if self._session is not None and (self._adapter, self._choice) != (version_name(adapter), choice):
            self.close()
        self._next_ids, self._by_hand = None, False
        self.ends, self.pad = ends, None if pad is None else int(pad)

    def expect(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The part of the whole text `ids` (B, T) that the caches do not hold yet: at least its last token.

        Each row goes on from the row that it shares most with, and all of them from where the first one parts from
        that, in a token, in its `mask` or in its `positions`. What the session has seen is forgotten where it is not
        known as tokens.
        """
        if self.ids is None and self.position > self.virtual:
            self.close()
        known, order = 0, torch.zeros(len(ids), dtype=torch.long)
        if self.ids is not None:
            known, order = common_beginning(*self._seen_and(ids, mask, positions))
        self.rollback(self.virtual + known)
        if self.position and not is_identity(order, self._rows):
            self.reorder(order)
        self._next_ids, self._by_hand = ids[:, known:], False
        return self._next_ids

    def _seen_and(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the caches were computed with, and what of the text would be there, in the same order.

        Each (rows or 1, T): tokens, which of them are real, and their positions.
        """
        assert self.ids is not None
        length = min(self.ids.shape[1], ids.shape[1] - 1)
        seen = [self.ids[:, :length], real(self._padding, self.virtual, length)]
        now = [ids[:, :length], real(mask, 0, length)]
        if positions is not None and positions.shape[1] == ids.shape[1] and not self.virtual:
            seen.append(counted(self._positions, self.position)[:, :length])
            now.append(positions[:, :length])
        device = self.ids.device
        return [each.to(device) for each in seen], [each.to(device) for each in now]

    def end_turn(self, made: Standing | None = None) -> None:
        """End a call of generate(), after which the text stands as it `made` it; None: it failed."""
        self._next_ids, self._by_hand = None, True
        if made is not None and self.ids is not None:
            self._standing = made

    @property
    def standing(self) -> Standing | None:
        """The text where the session stands; None where it holds nothing, or what is not known as tokens."""
        if self._standing is None and self.ids is not None and self.position == self.virtual + self.ids.shape[1]:
            return Standing(text=self.ids, ended=torch.zeros(len(self.ids), dtype=torch.bool))
        return self._standing

    def mask_of(self, text: torch.Tensor) -> torch.Tensor:
        """(B, T) int64: which tokens of a text that goes on from this session's are no padding.

        Rows of `text` may be some of those that beams had.
        """
        mask = torch.ones(text.shape, dtype=torch.long, device=text.device)
        if self._padding is not None:
            rows = torch.arange(len(text)) * self._rows // len(text)
            seen = self._padding[rows, self.virtual :][:, : text.shape[1]]
            mask[:, : seen.shape[1]] = seen.to(mask)
        return mask

    def expect_embeddings(self) -> None:
        """Start anew for a text that is given as embeddings: whether the caches hold its beginning is not known."""
        self.close()
        self._next_ids, self._by_hand = None, False

    def whole_input(self, ids: torch.Tensor) -> torch.Tensor:
        """The ids that `expect` gave, where a wrapper kept only their end (PEFT does, in a chat's second turn)."""
        expected = self._next_ids
        if self._by_hand or expected is None or expected.shape[1] <= ids.shape[1]:
            expected = self._next_ids = ids
        return expected


def common_beginning(seen: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> tuple[int, torch.Tensor]:
    """(columns that all rows of `now` have in common with a row of `seen`, (B,) which row that is).

    Tensors (R or 1, T) and (B or 1, T), compared in pairs; where every row has as much in common with the row of its
    own number, it is that one.
    """
    rows, wanted = (max(len(each) for each in tensors) for tensors in (seen, now))
    if rows == wanted and all(before.equal(after) for before, after in zip(seen, now, strict=True)):
        return seen[0].shape[1], torch.arange(
            rows
        )  # as at each token of generate(): this is the quickest way to see it
    own = 0
    if rows == wanted:
        own = int(_first([before != after for before, after in zip(seen, now, strict=True)]).min())
    if rows == wanted and (own == seen[0].shape[1] or rows == 1):
        return own, torch.arange(rows)
    pairs = [before[None] != after[:, None] for before, after in zip(seen, now, strict=True)]
    most, order = _first(pairs).expand(wanted, rows).max(dim=1)
    known = int(most.min())
    return (own, torch.arange(rows)) if rows == wanted and own >= known else (known, order.cpu())


def _first(differing: Sequence[torch.Tensor]) -> torch.Tensor:
    """(..., T) -> (...): the first column where one of the tensors is true; T where there is none."""
    either = functools.reduce(torch.logical_or, (each.cpu() for each in differing))
    length = either.shape[-1]
    if not length:
        return torch.zeros(either.shape[:-1], dtype=torch.long)
    return torch.where(either.any(dim=-1), either.to(torch.uint8).argmax(dim=-1), length)

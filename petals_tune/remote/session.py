"""Generation sessions as transformers sees them: a `Cache` whose keys and values are on servers."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache

from petals_tune.copies import to_device, to_host
from petals_tune.errors import ConfigError
from petals_tune.remote.speculative.speculation import Speculation
from petals_tune.remote.split_session import SplitSession
from petals_tune.swarm import loop
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.session import Inputs
from petals_tune.wire.adapter import AdapterVersion
from petals_tune.wire.span import BlockSpan

DEFAULT_MAX_LENGTH = 2048

OpenSession = Callable[[int, int, AdapterVersion | None], SplitSession]  # of rows, positions, and an adapter


class RemoteCache(Cache):
    """A generation session: pass it as `past_key_values`, to `generate()` or to the model.

    `position` counts what the caches hold: `virtual` positions of a soft prompt, then those of `ids` (B, T), the text
    tokens; so a longer text can go on where the session stands, and another text from where the two part. `ids` is None
    where the caches hold positions whose tokens are not known, such as `inputs_embeds`.
    """

    def __init__(
        self,
        chain: Chain,
        span: BlockSpan,
        max_length: int = DEFAULT_MAX_LENGTH,
        *,
        open_session: OpenSession,
    ):
        super().__init__(layers=[])
        self.position = 0
        self.virtual = 0
        self.max_length = max_length  # text positions
        self.ids: torch.Tensor | None = None
        self.speculation: Speculation | None = None  # drafts, where generate() was asked for them
        self.span = span
        self.chain = chain
        self._open_session = open_session
        self._session: SplitSession | None = None
        self._adapter: str | None = None  # version of the adapter that the caches were computed with
        self._choice: object = None  # how the call named it
        self._padding: torch.Tensor | None = None  # (B, position) bool; None: every position is real
        self._positions: torch.Tensor | None = None  # (B or 1, position) int64; None: they count from 0
        self._order: torch.Tensor | None = None
        self._next_ids: torch.Tensor | None = None
        self._by_hand = True  # the next step is not one of generate(), which has compared the adapter

    def rollback(self, position: int) -> None:
        """Forget what lies behind the first `position` positions."""
        if not 0 <= position <= self.position:
            where = f"the session is at position {self.position}"
            raise ConfigError(f"rollback({position}): {where}", key="rollback", seen=position)
        if self.ids is not None:
            text = position - self.virtual
            self.ids = self.ids[:, :text] if text > 0 else None
        if self._padding is not None:
            self._padding = self._padding[:, :position]
        if self._positions is not None:
            self._positions = self._positions[:, :position]
        self.position, self.virtual = position, min(self.virtual, position)

    def close(self) -> None:
        """Give the caches on the servers back; a later call starts at position 0."""
        session, self._session = self._session, None
        self.position, self.virtual, self.ids = 0, 0, None
        self._padding, self._positions, self._order = None, None, None
        if session is not None:
            loop.run(session.close())

    def __enter__(self) -> RemoteCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is not None:
            loop.start_task(session.close)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            "a generation session cannot be copied or saved: its caches are on servers; open another one, "
            "model.remote_blocks.new_session(max_length)",
            key="past_key_values",
        )

    # What generate() and the models' mask functions ask.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.position + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        order = beam_idx.cpu().long()
        self._order = order if self._order is None else self._order[order]
        self.ids = None if self.ids is None else self.ids[order.to(self.ids.device)]
        self._padding = None if self._padding is None else self._padding[order]
        if self._positions is not None and len(self._positions) > 1:
            self._positions = self._positions[order]

    def crop(self, tokens_to_remove: int) -> None:
        self.rollback(self.position - abs(tokens_to_remove))  # transformers passes -n to remove n

    def reset(self) -> None:
        self.close()

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ConfigError("repeating the rows of a running session is not supported; repeat the inputs instead")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise ConfigError("dropping rows of a running session is not supported; open another session")

    # What the model with remote blocks does with it.

    def begin_turn(self, adapter: AdapterVersion | None, choice: object = None) -> None:
        """Begin a call of generate(); anew where the caches were computed with another adapter than this one.

        choice: what the call named, whose soft prompt is no part of `adapter`; None: nothing
        """
        if self._session is not None and (self._adapter, self._choice) != (_version(adapter), choice):
            self.close()
        self._next_ids, self._by_hand = None, False

    def expect(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The part of the whole text `ids` (B, T) that the caches do not hold yet: at least its last token.

        Where `ids`, their `mask` or their `positions` part from what the session has seen, it is rolled back to there;
        to the beginning where the number of rows is another one, or what it has seen is not known as tokens.
        """
        if self.ids is None and self.position > self.virtual:
            self.close()
        if self._session is not None and self._session.rows != len(ids):
            self.close()
        known = 0
        if self.ids is not None:
            length = min(self.ids.shape[1], ids.shape[1] - 1)
            differing = (self.ids[:, :length] != ids[:, :length].to(self.ids.device)).any(dim=0)
            differing |= self._is_masked_otherwise(mask, length).to(differing.device)
            if positions is not None and positions.shape[1] == ids.shape[1] and not self.virtual:
                seen = _counted(self._positions, self.position)[:, :length]
                differing |= (seen.to(differing.device) != positions[:, :length].to(differing.device)).any(dim=0)
            known = int(differing.nonzero()[0]) if differing.any() else length
        self.rollback(self.virtual + known)
        self._next_ids, self._by_hand = ids[:, known:], False
        return self._next_ids

    def end_turn(self) -> None:
        """Forget what a call of generate() expected, where it failed."""
        self._next_ids, self._by_hand = None, True

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

    def step(
        self,
        hidden: torch.Tensor,
        *,
        padding: torch.Tensor | None,
        positions: torch.Tensor | None,
        adapter: Callable[[], AdapterVersion | None],
        choice: object = None,
    ) -> torch.Tensor:
        """The output (B, S, H) of all blocks for the next positions; `padding` (B, position + S) is of all of them."""
        ids, self._next_ids = self._next_ids, None
        by_hand, self._by_hand = self._by_hand, True
        if hidden.requires_grad and torch.is_grad_enabled():
            text = "a generation session has no gradients: call the model with use_cache=False to train"
            raise ConfigError(text, key="use_cache")
        rows, new = hidden.shape[:2]
        self._check(rows, padding)
        if by_hand and self._session is not None and (self._adapter, self._choice) != (_version(adapter()), choice):
            text = "the adapter was changed since this generation session began: open another session"
            raise ConfigError(text, key="past_key_values")
        started_s = time.perf_counter()
        if self.position == 0:
            self.virtual = 0 if ids is None else new - ids.shape[1]
        if self._session is None:
            version = adapter()
            self._adapter, self._choice = _version(version), choice
            self._session = self._open_session(rows, self.max_length + self.virtual, version)
        inputs = Inputs(  # in host memory, also where the model is on a GPU
            hidden=to_host(hidden)[0],
            padding=None if padding is None or padding[:, -new:].all() else padding[:, -new:].cpu(),
            positions=None if positions is None else positions.cpu(),
            context_length=self.position + new if positions is None else int(positions.max()) + 1,
        )
        order, self._order = self._order, None
        run = partial(self._session.step, position=self.position, order=order, device=hidden.device)
        output = run(inputs) if self.speculation is None else self.speculation.step(run, inputs)
        new = output.shape[1]  # without drafts, of which `output` has nothing
        inputs, padding = inputs.cut(0, new), None if padding is None else padding[:, : self.position + new]
        self.chain.client.stats.wait_s += time.perf_counter() - started_s
        if ids is None or (self.ids is None and self.position > self.virtual):
            self.ids = None
        else:
            self.ids = ids if self.ids is None else torch.cat([self.ids, ids.to(self.ids.device)], dim=1)
        positions = inputs.positions
        if positions is not None or self._positions is not None:
            before, now = _counted(self._positions, self.position), _counted(positions, new, start=self.position)
            count = max(len(before), len(now))
            self._positions = torch.cat([before.expand(count, -1), now.expand(count, -1)], dim=1)
        self.position += new
        self._padding = padding
        # With drafts in `hidden`, its length all the same, for models that go by it: the last position is what counts.
        return to_device(output, hidden.device).expand(-1, hidden.shape[1], -1)

    def _check(self, rows: int, padding: torch.Tensor | None) -> None:
        """Raises ConfigError for another number of rows, or another mask, than what the caches were computed with."""
        if self._session is not None and self._session.rows != rows:
            raise ConfigError(
                f"{rows} rows in a generation session of {self._session.rows}: open another session",
                key="past_key_values",
                seen=rows,
            )
        if self.position and self._is_masked_otherwise(padding, self.position, start=0).any():
            raise ConfigError(
                "attention_mask hides other positions than it did when the generation session computed them: give the "
                "same mask for these, or open another session",
                key="attention_mask",
            )

    def _is_masked_otherwise(self, mask: torch.Tensor | None, length: int, start: int | None = None) -> torch.Tensor:
        """(length,) bool: columns of `mask` (None: all real) that differ from the cached ones.

        The first column of `mask` is position `start`; None: that of the first text token.
        """
        start = self.virtual if start is None else start
        if mask is None and self._padding is None:
            return torch.zeros(length, dtype=torch.bool)
        seen = (
            torch.ones(1, length, dtype=torch.bool) if self._padding is None else self._padding[:, start:][:, :length]
        )
        now = torch.ones(1, length, dtype=torch.bool) if mask is None else mask[:, :length].bool()
        return (seen.to(now.device) != now).any(dim=0)


def _version(adapter: AdapterVersion | None) -> str | None:
    return None if adapter is None else adapter.version


def _counted(positions: torch.Tensor | None, length: int, *, start: int = 0) -> torch.Tensor:
    """(B or 1, length) int64: `positions`, or where there are none, `start`, `start` + 1, ..."""
    return torch.arange(start, start + length)[None] if positions is None else positions

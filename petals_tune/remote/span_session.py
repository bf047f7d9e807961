"""Generation sessions on a span of blocks: hidden states in, hidden states out, caches where the blocks are.

Shapes: B rows, S new positions, P prompt positions, H hidden size, L blocks of the span.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch

from petals_tune.adapters import METHODS
from petals_tune.copies import to_device, to_host
from petals_tune.errors import ConfigError
from petals_tune.remote import arguments
from petals_tune.remote.call_prompts import check_prompts
from petals_tune.remote.split_session import SplitSession
from petals_tune.swarm import loop
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.history import Inputs, compose
from petals_tune.wire.adapter import AdapterVersion
from petals_tune.wire.span import BlockSpan

DEFAULT_MAX_LENGTH = 2048

OpenSession = Callable[[int, int, AdapterVersion | None], SplitSession]  # of rows, positions, and an adapter
FindAdapter = Callable[[torch.Tensor | None], AdapterVersion | None]  # what is active, with prompts (L, P, H)


class SpanSession:
    """A generation session on blocks `span`: `step` runs the next positions of its rows.

    `position` counts what the caches hold; set it to go back to an earlier one, which sends nothing by itself. Rows
    that were given the same so far are computed once.
    """

    def __init__(
        self,
        chain: Chain,
        span: BlockSpan,
        max_length: int = DEFAULT_MAX_LENGTH,
        *,
        open_session: OpenSession,
        find_adapter: FindAdapter,
    ):
        self.span, self.chain = span, chain
        self.max_length = max_length
        self._open_session, self._find_adapter = open_session, find_adapter
        self._position = 0
        self._rows = 0  # of the step before, in the order that was asked for since
        self._session: SplitSession | None = None
        self._adapter: str | None = None  # version of the adapter that the caches were computed with
        self._choice: object = None  # how a call named it
        self._prompts: torch.Tensor | None = None  # of the first step
        self._prompted = 0  # positions to which that step added prompts, deep ones of an adapter too
        self._padding: torch.Tensor | None = None  # (B, position) bool; None: every position is real
        self._positions: torch.Tensor | None = None  # (B or 1, position) int64; None: they count from 0
        self._order: torch.Tensor | None = None  # of rows, for the next step

    @property
    def position(self) -> int:
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        self.rollback(position)

    def step(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None = None,
        hypo_ids: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output (B, S, H) of the blocks for the next S positions.

        hidden:         (B, S, H), without a gradient
        prompts:        (L, P, H), added to the first P positions at the input of each block; in the first step alone
        hypo_ids:       (B,), the row that each row goes on from, as in beam search; None: the same
        attention_mask: (B, position + S), 0 where a position is padding
        position_ids:   (B or 1, S); None: they count on from `position`

        Raises ConfigError for arguments that do not fit the session, which stays as it was, and as a forward through
        these blocks does. Where the servers failed, rows are in the new order nevertheless: repeat the step without it.
        """
        if prompts is not None and self.position:
            text = f"prompts belong to the first step of a session, and this one is at position {self.position}"
            raise ConfigError(text, key="prompts", seen=self.position)
        padding = arguments.padding(attention_mask, hidden.shape, past=self.position, packs=False)
        positions = arguments.position_ids(position_ids)
        if not self.position:
            self._prompts = None if prompts is None else check_prompts(prompts.detach(), self.span, hidden)
            if self._prompts is not None and self._prompts.dim() == 4:
                text = "prompts: all rows of a session have the same ones; open a session for each"
                raise ConfigError(text, key="prompts", seen=tuple(self._prompts.shape))
        return self.advance(
            hidden,
            padding=padding,
            positions=positions,
            adapter=lambda: self._find_adapter(self._prompts),
            order=None if hypo_ids is None else self._checked(hypo_ids),
        )

    def rollback(self, position: int) -> None:
        """Forget what lies behind the first `position` positions."""
        if not 0 <= position <= self.position:
            where = f"the session is at position {self.position}"
            raise ConfigError(f"rollback({position}): {where}", key="rollback", seen=position)
        if 0 < position < self._prompted:
            raise ConfigError(
                f"rollback({position}): the first step added prompts to {self._prompted} positions, and the next one "
                "would not: go back to 0, or not as far",
                key="rollback",
                seen=position,
            )
        if self._padding is not None:
            self._padding = self._padding[:, :position]
        if self._positions is not None:
            self._positions = self._positions[:, :position]
        self._position = position

    def reorder(self, order: torch.Tensor) -> None:
        """Make row i what row order[i] has been; rows may become more or fewer. Sent with the next step."""
        order = self._checked(order)
        self._order, self._rows = compose(self._order, order), len(order)
        if self._padding is not None:
            self._padding = self._padding[order]
        if self._positions is not None and len(self._positions) > 1:
            self._positions = self._positions[order]

    def _checked(self, order: torch.Tensor) -> torch.Tensor:
        order = order.cpu().long()
        if not (order.dim() == 1 and len(order) and order.min() >= 0 and order.max() < self._rows):
            text = f"an order of rows names some of the session's {self._rows}, not {order.tolist()}"
            raise ConfigError(text, key="order", seen=order.tolist())
        return order

    def fork(self, position: int | None = None, *, max_length: int | None = None) -> Self:
        """Another session, which begins with the first `position` positions of this one; None: all of them.

        Servers keep once what both hold. Each goes on by itself, and is closed by itself.
        """
        position = self.position if position is None else position
        forked = self._like_this(self.max_length if max_length is None else max_length)
        forked.rollback(position)
        if position and self._session is not None:
            forked._session = self._session.fork(
                position, rows=max(self._rows, 1), max_length=forked._room(), order=self._order
            )
        return forked

    def _like_this(self, max_length: int) -> Self:
        """An unopened session with what this one knows of its rows."""
        other = type(self)(
            self.chain, self.span, max_length, open_session=self._open_session, find_adapter=self._find_adapter
        )
        other._position, other._rows, other._adapter = self._position, self._rows, self._adapter
        other._prompted, other._choice = self._prompted, self._choice
        other._padding, other._positions, other._prompts = self._padding, self._positions, self._prompts
        return other

    def close(self) -> None:
        """Give the caches on the servers back; a later call starts at position 0."""
        session, self._session = self._session, None
        self._position, self._rows = 0, 0
        self._padding, self._positions, self._order = None, None, None
        if session is not None:
            loop.run(session.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is not None:
            loop.start_task(session.close)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            "a generation session cannot be saved, and copy.copy of one would share its caches, which are on servers: "
            "session.fork() is another one that begins with what this one holds",
            key="past_key_values",
        )

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
        """The output (B, S, H) of all blocks for the next positions; `padding` (B, position + S) is of all of them.

        adapter:      finds the one to run with
        choice:       what the call named, whose soft prompt is no part of `adapter`; None: nothing
        same_adapter: they are known to be those that the caches were computed with
        order:        as of `reorder`, before the step
        """
        if hidden.requires_grad and torch.is_grad_enabled():
            text = "a generation session has no gradients: call the model with use_cache=False to train"
            raise ConfigError(text, key="use_cache")
        rows, new = hidden.shape[:2]
        self._check(rows, padding, order)
        if not same_adapter:
            self._check_adapter(adapter, choice)
        if order is not None:
            self.reorder(order)
        started_s = time.perf_counter()
        session = self._opened(rows, adapter, choice)
        inputs = Inputs(  # in host memory, also where the model is on a GPU
            hidden=to_host(hidden)[0],
            padding=None if padding is None or padding[:, -new:].all() else padding[:, -new:].cpu(),
            positions=None if positions is None else positions.cpu(),
            context_length=self.position + new if positions is None else int(positions.max()) + 1,
        )
        order, self._order = self._order, None
        output = session.step(inputs, position=self.position, order=order, device=hidden.device)
        self.chain.client.stats.wait_s += time.perf_counter() - started_s
        self._rows = rows
        self._take_in(new, inputs.positions, padding)
        return to_device(output, hidden.device)

    def _take_in(self, new: int, positions: torch.Tensor | None, padding: torch.Tensor | None) -> None:
        """Count `new` positions as held; `positions` (B or 1, new) are theirs, `padding` (B, position + new) of all."""
        if positions is not None or self._positions is not None:
            before, now = counted(self._positions, self.position), counted(positions, new, start=self.position)
            count = max(len(before), len(now))
            self._positions = torch.cat([before.expand(count, -1), now.expand(count, -1)], dim=1)
        self._position += new
        self._padding = padding

    def _check_adapter(self, adapter: Callable[[], AdapterVersion | None], choice: object) -> None:
        """Raises ConfigError for another adapter than the caches were computed with; where they are empty, drops them.

        So the next step opens a session with that adapter.
        """
        if self._session is None or (self._adapter, self._choice) == (version_name(adapter()), choice):
            return
        if self.position:
            text = "the adapter was changed since this generation session began: open another session"
            raise ConfigError(text, key="past_key_values")
        self._drop(self._session)

    def _opened(self, rows: int, adapter: Callable[[], AdapterVersion | None], choice: object) -> SplitSession:
        """The session on the servers, with room for so many rows."""
        session = self._session
        if session is not None and (rows > session.rows or session.max_length < self._room()):
            grown = session.fork(self.position, rows=rows, max_length=self._room(), order=self._order)
            self._drop(session)
            session, self._order = grown, None
        if session is None:
            version = adapter()
            session = self._open_session(rows, self._room(), version)
            self._adapter, self._choice = version_name(version), choice
            parts = () if version is None else version.parts
            self._prompted = max((METHODS[part.method].least_positions(part) for part in parts), default=0)
        self._session = session
        return session

    def _drop(self, session: SplitSession) -> None:
        self._session = None
        loop.run(session.close())

    def _room(self) -> int:
        """Positions that the caches have room for."""
        return self.max_length

    def _check(self, rows: int, padding: torch.Tensor | None, order: torch.Tensor | None) -> None:
        """Raises ConfigError for another number of rows, or another mask, than what the caches were computed with."""
        if not self.position:
            return
        expected = self._rows if order is None else len(order)
        if expected != rows:
            raise ConfigError(
                f"{rows} rows in a generation session of {expected}: open another session, or choose rows with "
                "session.reorder(order)",
                key="past_key_values",
                seen=rows,
            )
        if padding is None and self._padding is None:
            return
        seen, now = real(self._padding, 0, self.position), real(padding, 0, self.position)
        seen = seen if order is None or self._padding is None else seen[order]
        if (seen.to(now.device) != now).any():
            raise ConfigError(
                "attention_mask hides other positions than it did when the generation session computed them: give the "
                "same mask for these, or open another session",
                key="attention_mask",
            )


def version_name(adapter: AdapterVersion | None) -> str | None:
    return None if adapter is None else adapter.version


def counted(positions: torch.Tensor | None, length: int, *, start: int = 0) -> torch.Tensor:
    """(B or 1, length) int64: `positions`, or where there are none, `start`, `start` + 1, ..."""
    return torch.arange(start, start + length)[None] if positions is None else positions


def real(mask: torch.Tensor | None, start: int, length: int) -> torch.Tensor:
    """(B or 1, length) bool: positions `start` to `start + length` of `mask`, where there is one; without, all are."""
    return torch.ones(1, length, dtype=torch.bool) if mask is None else mask[:, start : start + length].bool()

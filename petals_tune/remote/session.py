"""Generation sessions as transformers sees them: a `Cache` whose keys and values are on servers."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers.cache_utils import Cache

from petals_tune.errors import ConfigError
from petals_tune.swarm import loop
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.session import ChainSession, Inputs
from petals_tune.wire.adapter import AdapterVersion
from petals_tune.wire.span import BlockSpan

DEFAULT_MAX_LENGTH = 2048


class RemoteCache(Cache):
    """A generation session: pass it as `past_key_values`, to `generate()` or to the model.

    `position` counts what the caches hold, soft prompts included; `ids` (B, T) are the text tokens among it, so that
    a longer text can go on where the session stands, and another text from where the two part.
    """

    def __init__(self, chain: Chain, span: BlockSpan, max_length: int = DEFAULT_MAX_LENGTH):
        super().__init__(layers=[])
        self.position = 0
        self.max_length = max_length  # text positions
        self.ids: torch.Tensor | None = None
        self.span = span
        self._chain = chain
        self._session: ChainSession | None = None
        self._order: torch.Tensor | None = None
        self._next_ids: torch.Tensor | None = None

    def rollback(self, position: int) -> None:
        """Forget what lies behind the first `position` positions."""
        if not 0 <= position <= self.position:
            where = f"the session is at position {self.position}"
            raise ConfigError(f"rollback({position}): {where}", key="rollback", seen=position)
        if self.ids is not None:
            text = self.ids.shape[1] - (self.position - position)
            self.ids = self.ids[:, :text] if text > 0 else None
        self.position = position

    def close(self) -> None:
        """Give the caches on the servers back; a later call starts at position 0."""
        session, self._session = self._session, None
        self.position, self.ids, self._order = 0, None, None
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
        self.ids = None if self.ids is None else self.ids[order]

    def crop(self, tokens_to_remove: int) -> None:
        self.rollback(self.position - abs(tokens_to_remove))  # transformers passes -n to remove n

    def reset(self) -> None:
        self.close()

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ConfigError("repeating the rows of a running session is not supported; repeat the inputs instead")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise ConfigError("dropping rows of a running session is not supported; open another session")

    # What the model with remote blocks does with it.

    def expect(self, ids: torch.Tensor) -> torch.Tensor:
        """The part of the whole text `ids` (B, T) that the caches do not hold yet: at least its last token.

        Where `ids` parts from what the session has seen, it is rolled back to there.
        """
        known = 0
        if self.ids is not None and self.ids.shape[0] == ids.shape[0]:
            length = min(self.ids.shape[1], ids.shape[1] - 1)
            differing = (self.ids[:, :length] != ids[:, :length].to(self.ids.device)).any(dim=0).nonzero()
            known = int(differing[0]) if len(differing) else length
        if self.ids is not None:
            self.rollback(self.position - (self.ids.shape[1] - known))
        self._next_ids = ids[:, known:]
        return self._next_ids

    def whole_input(self, ids: torch.Tensor) -> torch.Tensor:
        """The ids that `expect` gave, where a wrapper kept only their end (PEFT does, in a chat's second turn)."""
        expected = self._next_ids
        return ids if expected is None or expected.shape[1] <= ids.shape[1] else expected

    def step(
        self,
        hidden: torch.Tensor,
        *,
        padding: torch.Tensor | None,
        positions: torch.Tensor | None,
        adapter: Callable[[], AdapterVersion | None],
    ) -> torch.Tensor:
        """The output (B, S, H) of all blocks for the next positions; `padding` (B, position + S) is of all of them."""
        if hidden.requires_grad and torch.is_grad_enabled():
            text = "a generation session has no gradients: call the model with use_cache=False to train"
            raise ConfigError(text, key="use_cache")
        new, ids = hidden.shape[1], self._next_ids
        started_s = time.perf_counter()
        if self._session is None:
            virtual = 0 if ids is None else new - ids.shape[1]
            self._session = ChainSession(
                self._chain.calls,
                self._chain.repair,
                self.span,
                rows=len(hidden),
                max_length=self.max_length + virtual,
                adapter=adapter(),
            )
        inputs = Inputs(  # in host memory, also where the model is on a GPU
            hidden=hidden.detach().cpu(),
            padding=None if padding is None or padding[:, -new:].all() else padding[:, -new:].cpu(),
            positions=None if positions is None else positions.cpu(),
        )
        order, self._order = self._order, None
        output = loop.run(self._session.step(inputs, position=self.position, order=order))
        self._chain.client.stats.wait_s += time.perf_counter() - started_s
        self.position += new
        if ids is not None:
            self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        self._next_ids = None
        return output.to(hidden.device)

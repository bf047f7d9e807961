"""Runs spans of blocks: on servers through the swarm's chain, or here where they are local.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

import torch

from petals_tune.errors import ConfigError
from petals_tune.remote.call_prompts import with_own_prompts, with_prompts
from petals_tune.remote.function import RemoteBlocksFunction, RemoteCall
from petals_tune.remote.interleaved import Interleaved
from petals_tune.remote.local import LocalBlocks
from petals_tune.remote.model_call import ModelCall, running_call
from petals_tune.remote.speculative.length import LatestDraft
from petals_tune.remote.split_session import LocalSession, SplitSession
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.session import ChainSession
from petals_tune.swarm.trace import CallContext
from petals_tune.wire.adapter import AdapterPart, AdapterVersion
from petals_tune.wire.span import BlockSpan

# Small micro-batches keep all servers of a chain busy; below this size a linear runs noticeably slower per position.
MICRO_BATCH_POSITIONS = 128


class Span(Protocol):
    """Blocks of a model, as `RemoteSpan` (remote/blocks.py) describes them."""

    span: BlockSpan
    training: bool

    @property
    def local(self) -> LocalBlocks | None: ...

    def parts(self) -> Sequence[Span]: ...

    def adapter(self) -> tuple[AdapterVersion | None, list[torch.Tensor]]: ...

    def own_adapter(self) -> list[AdapterPart]: ...


@dataclass(kw_only=True)
class Backbone:
    """What all spans of one model share: who runs them, and the call of the model that they are part of."""

    chain: Chain
    tuple_length: int  # a layer of this family returns (hidden, ...), a tuple of so many; 0: hidden itself
    micro_batch_rows: int | None = None
    local: LocalBlocks | None = None  # blocks that this process runs; None: servers run all of them
    latest_draft: LatestDraft = field(default_factory=LatestDraft)

    def __deepcopy__(self, memo: dict[int, Any]) -> Backbone:
        return replace(self)  # of a copied model: on the same connection to the swarm

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            "a model with remote blocks cannot be pickled: its blocks are a connection to servers; save what is "
            "trained, with save_pretrained() or state_dict(), and load the model again with from_pretrained()",
            key="remote_blocks",
        )

    @property
    def call(self) -> ModelCall | None:
        """The call of this model that runs in this thread; None: the blocks are called by hand."""
        call = running_call()
        return call if call is not None and call.backbone is self else None

    def run(
        self,
        span: Span,
        hidden: torch.Tensor,
        padding: torch.Tensor | None,
        positions: torch.Tensor | None,
        prompts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, S, H) -> (B, S, H), differentiable in `hidden`, in the adapter on the blocks of `span`, and in `prompts`.

        prompts: (L, P, H), added to the first P positions at the input of each block
        """
        context = self._context(span, padding, positions)
        rows = self.micro_batch(hidden.shape[1])
        for part in span.parts():
            first = part.span.start - span.span.start
            own = None if prompts is None else prompts[first : first + part.span.stop - part.span.start]
            if part.local is not None:
                parts = part.own_adapter()
                parts = parts if own is None else with_own_prompts(parts, own, part.span)
                hidden = part.local.forward(part.span, hidden, context, parts=parts, rows=rows)
            else:
                call, tensors = self._remote_call(part, context, rows, prompts=own)
                hidden = RemoteBlocksFunction.apply(call, hidden, *tensors)
        return hidden

    def run_in_step(self, step: Interleaved, span: Span, hidden: torch.Tensor, call: ModelCall) -> torch.Tensor:
        """As `run`, with the loss of each micro-batch and its way back; no block is local."""

        def remote_call() -> tuple[RemoteCall, list[torch.Tensor]]:
            context = self._context(span, call.padding, call.positions)
            return self._remote_call(span, context, self.micro_batch(hidden.shape[1]))

        return step.through_blocks(remote_call, hidden, train=span.training)

    def _context(self, span: Span, padding: torch.Tensor | None, positions: torch.Tensor | None) -> CallContext:
        return CallContext(
            padding=None if padding is None else padding.cpu(),
            positions=None if positions is None else positions.cpu(),
            context_length=None if positions is None else int(positions.max()) + 1,
            train=span.training,
            seed=int(torch.randint(2**62, ())) if span.training else 0,
        )

    def _remote_call(
        self, part: Span, context: CallContext, rows: int, *, prompts: torch.Tensor | None = None
    ) -> tuple[RemoteCall, list[torch.Tensor]]:
        """The call of blocks that are on servers, and the tensors of the adapter on them."""
        adapter, tensors = part.adapter()
        if prompts is not None:
            adapter, tensors = with_prompts(adapter, tensors, prompts, part.span)
        own, has_backward = replace(context, adapter=adapter), torch.is_grad_enabled()
        call = RemoteCall(chain=self.chain, span=part.span, context=own, rows=rows, has_backward=has_backward)
        return call, tensors

    def micro_batch(self, positions: int) -> int:
        """Return the rows of a micro-batch of texts of so many positions."""
        return self.micro_batch_rows or -(-MICRO_BATCH_POSITIONS // positions)

    def open_session(self, span: Span, rows: int, max_length: int, adapter: AdapterVersion | None) -> SplitSession:
        """A generation session on the blocks of `span`, which has taken in nothing yet."""
        sessions: list[LocalSession | ChainSession] = []
        for part in span.parts():
            parts = () if adapter is None else tuple(adapter.on(part.span))
            if part.local is not None:
                sessions.append(LocalSession(part.local, part.span, rows=rows, max_length=max_length, parts=parts))
            else:
                own = None if adapter is None or not parts else replace(adapter, parts=parts)
                calls, repair = self.chain.calls, self.chain.repair
                sessions.append(ChainSession(calls, repair, part.span, rows=rows, max_length=max_length, adapter=own))
        return SplitSession(sessions, rows=rows, max_length=max_length)

"""The remote blocks as a module: what a Hugging Face model finds in the place of its layer list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from petals_tune.errors import ConfigError
from petals_tune.families import Family
from petals_tune.remote.function import RemoteBlocksFunction, RemoteCall
from petals_tune.remote.session import DEFAULT_MAX_LENGTH, RemoteCache
from petals_tune.remote.skeleton import Skeleton
from petals_tune.swarm import loop
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.route import Hop
from petals_tune.swarm.stats import SwarmStats
from petals_tune.swarm.trace import CallContext
from petals_tune.tuning.support import collect_adapter
from petals_tune.wire.adapter import AdapterVersion
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan

# Small micro-batches keep all servers of a chain busy; below this size a linear runs noticeably slower per position.
MICRO_BATCH_POSITIONS = 128


class RemoteBlocks(Skeleton):
    """The block list of a grafted model. It still holds the blocks, without weights; it iterates as one remote module.

    Indexing with an int gives a weightless block (PEFT and the library's own helpers walk them), a slice gives a module
    that runs these blocks on the swarm.
    """

    def __init__(self, blocks: Any, *, family: Family, chain: Chain, micro_batch_rows: int | None):
        super().__init__(blocks)
        self.family, self.chain, self.micro_batch_rows = family, chain, micro_batch_rows
        self.caught = CaughtArguments()

    @property
    def stats(self) -> SwarmStats:
        """Bytes, calls, retries and waiting time so far."""
        return self.chain.client.stats

    def servers(self) -> tuple[ServerRecord, ...]:
        """The servers of this model that are known now."""
        return self.chain.client.servers

    def route(self) -> tuple[Hop, ...]:
        """The servers that a call through all blocks would take now."""
        return loop.run(self.chain.client.route(BlockSpan(0, len(self)), work=1))

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        start, stop, step = index.indices(len(self))
        if step != 1 or start >= stop:
            raise ConfigError(f"remote blocks are cut as start:stop with start < stop, not {index}")
        return RemoteSpan(self, BlockSpan(start, stop))

    def new_session(self, max_length: int) -> RemoteCache:
        """A generation session for `max_length` text positions; caches on the servers are reserved at its first use."""
        return RemoteCache(self.chain, BlockSpan(0, len(self)), max_length)

    def close(self) -> None:
        """Leave the swarm. A call afterwards fails."""
        loop.run(self.chain.client.close())


class RemoteSpan:
    """Blocks `span` of a grafted model, run on the swarm when called. Iterates as a list of one: itself."""

    def __init__(self, blocks: RemoteBlocks, span: BlockSpan):
        self.blocks, self.span = blocks, span

    def __iter__(self) -> Iterator[RemoteSpan]:
        return iter((self,))

    def __len__(self) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        # What a model's loop asks its layers, such as Gemma's `attention_type`, the first weightless block answers.
        if name in ("blocks", "span"):
            raise AttributeError(name)
        return getattr(self.blocks[self.span.start], name)

    def __call__(self, hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
        """(B, S, H) -> (B, S, H); inside the model's own loop as a tuple, where the family's layers return tuples.

        What the loop hands to its layers (4-D masks, rotary tables, ALiBi) is made again on the servers, from the
        mask and the positions that the base model was called with.
        """
        caught = self.blocks.caught
        output = self._run(hidden, caught) if caught.session is None else self._step(hidden, caught, caught.session)
        return (output,) if caught.in_model and self.blocks.family.returns_tuple else output

    def _step(self, hidden: torch.Tensor, caught: CaughtArguments, session: RemoteCache) -> torch.Tensor:
        if session.span != self.span:
            raise ConfigError(f"a generation session is for all blocks {session.span}, not for {self.span}")
        return session.step(
            hidden, padding=caught.padding, positions=caught.positions, adapter=lambda: self._adapter()[0]
        )

    def _run(self, hidden: torch.Tensor, caught: CaughtArguments) -> torch.Tensor:
        adapter, tensors = self._adapter()
        training = self.blocks.training
        call = RemoteCall(
            chain=self.blocks.chain,
            span=self.span,
            context=CallContext(
                padding=caught.padding,
                positions=caught.positions,
                adapter=adapter,
                train=training,
                seed=int(torch.randint(2**62, ())) if training else 0,
            ),
            rows=self.blocks.micro_batch_rows or -(-MICRO_BATCH_POSITIONS // hidden.shape[1]),
        )
        return RemoteBlocksFunction.apply(call, hidden, *tensors)

    def _adapter(self) -> tuple[AdapterVersion | None, list[torch.Tensor]]:
        blocks = enumerate(nn.ModuleList.__iter__(self.blocks))
        return collect_adapter(list(blocks)[self.span.start : self.span.stop])


class CaughtArguments:
    """The padding mask and positions of the call that runs now.

    Layers are handed 4-D masks; servers build these themselves, so the 2-D ones are caught before the base model runs.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self, *_: object) -> None:
        self.in_model = False
        self.padding: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.session: RemoteCache | None = None

    def watch(self, base: PreTrainedModel, new_session: Callable[[int], RemoteCache]) -> None:
        """Catch the arguments of `base` from now on; a call with `use_cache=True` alone gets a session of its own."""
        self._new_session = new_session
        base.register_forward_pre_hook(self._before, with_kwargs=True)
        base.register_forward_hook(self._forget, always_call=True)  # blocks that are called by hand are not masked

    def _before(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if len(args) > 1:
            raise ConfigError(
                "call the base model of remote blocks with keyword arguments (input_ids may be positional)"
            )
        if kwargs.get("output_attentions"):
            raise ConfigError("output_attentions: servers do not send attention weights; leave it False")
        if kwargs.get("output_hidden_states"):
            raise ConfigError("output_hidden_states: the blocks run on servers; slice model.remote_blocks instead")
        self.in_model = True
        self.session = self._session_for(kwargs.get("past_key_values"), kwargs.get("use_cache"))
        self.padding = _padding(kwargs.get("attention_mask"))
        positions = kwargs.get("position_ids")
        self.positions = None if positions is None else positions.long()
        return args, {**kwargs, "past_key_values": self.session, "use_cache": self.session is not None}

    def _session_for(self, cache: Any, use_cache: bool | None) -> RemoteCache | None:
        if isinstance(cache, RemoteCache):
            return cache
        if cache is not None and cache.get_seq_length():
            raise ConfigError(
                "past_key_values: a local cache knows nothing of remote blocks; pass the one that the model returned, "
                "or a session of model.inference_session()"
            )
        # A config says use_cache=True by default; only a caller who asks for a cache gets one.
        return self._new_session(DEFAULT_MAX_LENGTH) if use_cache and not torch.is_grad_enabled() else None


def _padding(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The 2-D mask as bool, or None where it hides nothing."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ConfigError(f"attention_mask: a 2-D mask (B, S) is needed, not {getattr(mask, 'shape', type(mask))}")
    padding = mask.bool()
    return None if bool(padding.all()) else padding

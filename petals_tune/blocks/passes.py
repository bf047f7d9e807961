"""Passes through some of the blocks in memory: what a forward and a step of generation have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from petals_tune.blocks.adapters import AdapterHooks, CallPlan
from petals_tune.blocks.devices.transfers import move_arguments
from petals_tune.blocks.generation.alibi import use_apart_attention
from petals_tune.blocks.kernels import use_fast_kernels, without_cudnn_attention
from petals_tune.blocks.loading import LoadedBlocks
from petals_tune.blocks.positions import PositionLimits
from petals_tune.blocks.separate_rows import SeparateRows, SessionRows
from petals_tune.copies import to_device
from petals_tune.errors import BlocksNotHere, NotFinite, PetalsTuneError, RequestRefused
from petals_tune.wire.messages import Forward, Step
from petals_tune.wire.span import BlockSpan

# What torch, or transformers' code, raises on input that passed our checks.
TORCH_ERRORS = (RuntimeError, LookupError, ValueError, TypeError, MemoryError)


class Passes:
    """Calls a model with any sub-span of its blocks. Not thread-safe."""

    def __init__(self, loaded: LoadedBlocks):
        self.loaded, self.model = loaded, loaded.model
        use_fast_kernels(self.model, loaded.quantization)
        self.blocks = list(loaded.blocks)
        use_apart_attention(self.blocks)
        self._lists: dict[BlockSpan, nn.ModuleList] = {}
        self._training = False
        self.hooks = AdapterHooks(self.blocks, loaded.span.start)
        self.separate = SeparateRows(self.model, self.blocks, self.hooks.alone)
        self.positions = PositionLimits.of(self.model, loaded.blocks)
        self.takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        # Bamba, one of the models that transformers calls stateful, counts the positions of each call from 0.
        self.counts_from_zero = bool(getattr(self.model, "_is_stateful", False))
        parameter = next(p for p in self.model.parameters() if p.is_floating_point())
        self.device, self.dtype = parameter.device, self.model.dtype
        move_arguments(self.blocks, self.device)
        self.hidden_size: int = self.model.config.hidden_size

    def block(self, number: int) -> nn.Module:
        return self.blocks[number - self.loaded.span.start]

    def check_span(self, span: BlockSpan) -> None:
        """Raises BlocksNotHere for blocks that another server may have."""
        if not self.loaded.span.covers(span):
            raise BlocksNotHere(f"blocks {span} are not here; this server holds {self.loaded.span}")

    def check(self, span: BlockSpan, request: Forward | Step) -> None:
        self.check_span(span)
        if (size := request.hidden.shape[2]) != self.hidden_size:
            text = f"hidden size {size}, and the model's is {self.hidden_size}"
            raise RequestRefused(text, reason="hidden size")
        self.positions.check(request)

    @contextmanager
    def configured(self, span: BlockSpan, plan: CallPlan) -> Iterator[None]:
        """The model with the blocks `span` alone, in the mode of `plan`."""
        first, last = span.start - self.loaded.span.start, span.stop - self.loaded.span.start
        if span not in self._lists:
            self._lists[span] = nn.ModuleList(self.blocks[first:last])
        self.loaded.family.put_blocks(self.model, self._lists[span])
        self.loaded.per_block.write(self.model.config, span)
        if self._training != plan.train:
            self.loaded.quantization.set_mode(self.model, training=plan.train)
            self._training = plan.train
        self.hooks.plan = plan
        try:
            with without_cudnn_attention(self.device):
                yield
        finally:
            self.hooks.plan = None

    def run(
        self,
        hidden: torch.Tensor,
        rows: Sequence[SessionRows],
        *,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """The output (B, S, H) of the configured blocks for `hidden`, whose rows are those of sessions.

        `mask` (B, S), or as long as the cache, is True where a position is attended to; `positions` is (B or 1, S).
        """
        options: dict[str, Any] = {} if positions is None else {"position_ids": to_device(positions, self.device)}
        if cache is not None:
            options["past_key_values"] = cache
        with self.separate.call_of(rows):
            output: torch.Tensor = self.model(
                inputs_embeds=hidden,
                attention_mask=None if mask is None else to_device(mask, self.device, torch.long),
                use_cache=False,  # a cache is used all the same; with True, MiniMax wants one of its own class
                **options,
            ).last_hidden_state
        return output

    @torch.no_grad()
    def not_finite(self, span: BlockSpan, hidden: torch.Tensor, run: Callable[[], object]) -> PetalsTuneError:
        """The error for an output that is not finite: of the input `hidden`, or of the first block in another `run`."""
        if not hidden.isfinite().all():
            text = f"non-finite numbers in the hidden states at block {span.start}"
            return RequestRefused(text, block=span.start, reason="hidden not finite")
        bad: list[int] = []

        def hook(number: int, block: nn.Module, args: object, output: Any) -> None:
            if not (output[0] if isinstance(output, tuple) else output).isfinite().all():
                bad.append(number)

        hooks = [
            self.blocks[number - self.loaded.span.start].register_forward_hook(partial(hook, number))
            for number in range(span.start, span.stop)
        ]
        try:
            run()
        finally:
            for each in hooks:
                each.remove()
        first = min(bad, default=span.stop)
        text = f"non-finite numbers come out of block {first}, from finite ones, {self.in_dtype}"
        return NotFinite(text, block=first, dtype=self.dtype_name)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def in_dtype(self) -> str:
        beyond = (
            ", which ends at 65,504: a server with dtype=bfloat16 or float32 holds more"
            if self.dtype is torch.float16
            else ""
        )
        return f"in {self.dtype_name}{beyond}"

"""Backward through blocks of which a forward kept the inputs alone: each is computed once more, the last one first.

What a text takes is then a hidden state for each block and the graph of one block, in place of the graphs of all. Each
block draws its dropout from a seed of its own, so that both computations are equal, and so are the gradients, bit for
bit, to those of a whole graph. Source: Chen et al. 2016, arXiv:1604.06174.

torch.utils.checkpoint does not fit: it keeps what bitsandbytes' int8 linear saves on `ctx`, and with `use_reentrant` it
gives no gradients to tensors that are no arguments, as an adapter's are.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.graphs import Graph, KeptMemory, scale_gradient, unscale_gradients
from petals_tune.errors import RequestRefused
from petals_tune.wire.span import BlockSpan

_PLAIN = (torch.Tensor, torch.dtype, torch.device, bool, int, float, str, type(None))  # what may be given twice


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What a block was called with."""

    number: int
    block: nn.Module
    hidden: torch.Tensor  # (B, S, H) its input, a leaf
    version: int  # of that tensor: it must not be changed in place
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def repeat(self) -> torch.Tensor:
        output = self.block(self.hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


class BlockRecorder:
    """Records the arguments of each block in a forward, and cuts the graph behind each block: no more than one lives.

    Blocks can be computed one by one where each is given the output of the one before and nothing else that depends on
    it, and leaves no state behind.
    """

    def __init__(self, blocks: Mapping[int, nn.Module]) -> None:
        """Record the calls of `blocks`, a run of them by their numbers, in the context that this is."""
        self._blocks = blocks
        self._hooks: list[RemovableHandle] = []
        self._calls: list[_Call] = []
        self._entry: torch.Tensor | None = None  # what the first block was given
        self._last: torch.Tensor | None = None  # output of the block before
        self._is_chain = True

    def __enter__(self) -> None:
        for number, block in self._blocks.items():
            # Before all other hooks, which change what they are given when the block is computed again, too.
            record = partial(self._record, number)
            self._hooks.append(block.register_forward_pre_hook(record, prepend=True, with_kwargs=True))
            self._hooks.append(block.register_forward_hook(self._cut))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, number: int, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given, *rest = args
        if self._entry is None:
            self._entry = given
        else:
            self._is_chain &= _is_same(given, self._last)
        others = tree_leaves((rest, kwargs))
        self._is_chain &= all(isinstance(each, _PLAIN) for each in others)
        self._is_chain &= not any(isinstance(each, torch.Tensor) and each.requires_grad for each in others)
        hidden = given.detach().requires_grad_(given.requires_grad)
        call = _Call(
            number=number, block=block, hidden=hidden, version=hidden._version, args=tuple(rest), kwargs=kwargs
        )
        self._calls.append(call)
        return (hidden, *rest), kwargs

    def _cut(self, block: nn.Module, args: object, output: Any) -> Any:
        cut = tree_map(_cut_from_graph, output)
        self._last = cut[0] if isinstance(cut, tuple) else cut
        return cut

    def inputs(
        self,
        output: torch.Tensor,
        hidden: torch.Tensor | None,
        adapter: Adapter | None,
        configured: Callable[[], AbstractContextManager[None]],
    ) -> BlockInputs:
        """What was recorded of a forward from `hidden` (None: no gradient there) to `output`.

        `configured` gives the context to compute the blocks in once more. Raises RequestRefused where they cannot be
        computed one by one.
        """
        numbers, entry = [call.number for call in self._calls], self._entry
        unchanged = all(call.hidden._version == call.version for call in self._calls)
        if not (self._is_chain and _is_same(output, self._last) and unchanged and numbers == list(self._blocks)):
            raise RequestRefused(
                f"blocks {min(self._blocks)}:{max(self._blocks) + 1} pass more to each other than hidden states: they "
                "are not computed one by one",
                reason="no single blocks",
            )
        assert entry is not None
        return BlockInputs(
            calls=self._calls,
            entry=None if entry is hidden else entry,
            output_dtype=output.dtype,
            shape=output.shape,
            device=output.device,
            hidden=hidden,
            adapter_parts=adapter,
            configured=configured,
        )


def _is_same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Is it the same tensor, or a view of all of it? (GPT-2's model shapes the last output, as it has been shaped.)"""
    return other is not None and (
        tensor is other
        or (tensor._base is other and tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape)
    )


def _cut_from_graph(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


@dataclass(frozen=True, kw_only=True)
class BlockInputs:
    """The inputs of all blocks of a forward, in the place of its graph: a `Graph` to those who ask for gradients."""

    calls: list[_Call]
    entry: torch.Tensor | None  # what the model made of `hidden` before the first block, with its graph; None: nothing
    output_dtype: torch.dtype
    shape: torch.Size  # of the output
    device: torch.device  # of the output
    hidden: torch.Tensor | None  # the input (B, S, H), where its gradient is wanted
    adapter_parts: Adapter | None
    configured: Callable[[], AbstractContextManager[None]]

    @property
    def adapter(self) -> list[torch.Tensor]:
        return [] if self.adapter_parts is None else self.adapter_parts.tensors

    def add_to(self, memory: KeptMemory) -> None:
        """Count what is kept."""
        for each in tree_leaves(
            [self.entry, self.hidden, *((call.hidden, call.args, call.kwargs) for call in self.calls)]
        ):
            if isinstance(each, torch.Tensor):
                memory.add(each)

    def gradients(self, grad: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """(gradient at the input or None, gradients of the adapter's tensors); frees what was kept. As of a `Graph`."""
        flow: torch.Tensor | None
        flow, scale = scale_gradient(grad, self.output_dtype)
        del grad
        found: dict[int, torch.Tensor] = {}  # by the tensor's id
        with self.configured(), torch.enable_grad():
            while self.calls and flow is not None:
                flow = self._through(self.calls.pop(), flow, found)
            self.calls.clear()
            if self.hidden is not None and flow is not None and self.entry is not None:
                (flow,) = torch.autograd.grad(self.entry, [self.hidden], flow)
        at_input = flow if self.hidden is not None else None
        at_adapter = [found[id(tensor)] if id(tensor) in found else torch.zeros_like(tensor) for tensor in self.adapter]
        if at_input is None:
            return None, unscale_gradients(at_adapter, scale)
        at_input, *at_adapter = unscale_gradients([at_input, *at_adapter], scale)
        return at_input, at_adapter

    def _through(self, call: _Call, flow: torch.Tensor, found: dict[int, torch.Tensor]) -> torch.Tensor | None:
        """The gradient at the input of a block, from the one at its output; None where nothing before it needs one."""
        parts = self.adapter_parts
        own = [] if parts is None else parts.on(BlockSpan(call.number, call.number + 1)).tensors
        output = call.repeat()
        if not output.requires_grad:
            return None
        wanted = [*([call.hidden] if call.hidden.requires_grad else []), *own]
        gradients = list(torch.autograd.grad(output, wanted, flow, materialize_grads=True))
        at_input = gradients.pop(0) if call.hidden.requires_grad else None
        found.update((id(tensor), gradient) for tensor, gradient in zip(own, gradients, strict=True))
        return at_input


KeptGraph = Graph | BlockInputs

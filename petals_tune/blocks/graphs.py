"""Autograd graphs kept for a backward, and the memory that they hold.

Shapes: B rows, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

LARGEST = (
    4  # exponent of a scaled gradient's largest value: blocks may enlarge it 4,000 times, and float16 ends at 2**16
)
MOST_SHIFT = 120  # of an exponent: the scale and its inverse are normal float32 numbers


@dataclass
class KeptMemory:
    """Bytes of the storages that a graph keeps alive: each counted once, the model's weights left out."""

    weights: frozenset[int]  # data pointers of the model's own storages
    storages: dict[int, int] = field(default_factory=dict)  # data pointer -> bytes

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage.nbytes()

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())

    @contextmanager
    def counting(self, hidden_from_autograd: Iterable[nn.Module]) -> Iterator[None]:
        """Count what autograd saves in the meantime, and the inputs of the modules `hidden_from_autograd`.

        Those keep their inputs on `ctx`, where saved-tensor hooks do not see them: bitsandbytes' int8 linear does.
        """

        def save(tensor: torch.Tensor) -> torch.Tensor:
            self.add(tensor)
            return tensor.detach()  # saving an output itself would make a cycle with its graph

        hooks = [module.register_forward_pre_hook(lambda _, args: self.add(args[0])) for module in hidden_from_autograd]
        try:
            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The output of a forward with its autograd graph, and the tensors that its backward gives gradients for."""

    output: torch.Tensor  # (B, S, H)
    hidden: torch.Tensor | None  # the input (B, S, H), where its gradient is wanted
    adapter: list[torch.Tensor]

    @property
    def shape(self) -> torch.Size:
        return self.output.shape

    @property
    def device(self) -> torch.device:
        return self.output.device

    def add_to(self, memory: KeptMemory) -> None:
        """Count what is kept beside what autograd saves."""
        for tensor in (self.output, self.hidden):
            if tensor is not None:
                memory.add(tensor)

    def gradients(self, grad: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """(gradient at the input or None, gradients of the adapter's tensors); frees the graph."""
        inputs = [*([] if self.hidden is None else [self.hidden]), *self.adapter]
        grad, scale = scale_gradient(grad, self.output.dtype)
        # A linear that this forward did not pass has a gradient too: zero.
        found = unscale_gradients(torch.autograd.grad(self.output, inputs, grad, materialize_grads=True), scale)
        return (None if self.hidden is None else found.pop(0)), found


def scale_gradient(grad: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`grad` in the `dtype` of the output of blocks, and the factor by which it is larger; None: it is not.

    Blocks in float16 are given the gradient times a power of 2, which is exact, and what comes out is divided by
    it, in float32: a gradient of 1e-7, as a loss over a thousand tokens has them, has one bit left in float16.
    """
    scale = None
    if dtype is torch.float16:
        grad, scale = _scaled(grad.float())
    return grad.to(dtype), scale


def unscale_gradients(found: Iterable[torch.Tensor], scale: torch.Tensor | None) -> list[torch.Tensor]:
    """Gradients for a gradient that `scale_gradient` made larger, divided by that factor."""
    return list(found) if scale is None else [each.float() / scale for each in found]


def _scaled(grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`grad` times a power of 2 that takes its largest value to about 2 to LARGEST, and that power ()."""
    largest = grad.abs().amax()
    exponent = torch.frexp(largest.where(largest.isfinite(), 1.0)).exponent  # what is not finite stays so, unscaled
    scale = torch.ldexp(torch.ones_like(largest), (LARGEST - exponent).clamp(-MOST_SHIFT, MOST_SHIFT))
    return grad * scale, scale

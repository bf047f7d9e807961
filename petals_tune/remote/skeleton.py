"""Blocks without weights: all modules with their names and shapes, so that PEFT can walk them, and none of the memory.

A weight is one number expanded to the right shape with stride 0: a shape, a dtype and a device, and no memory. PEFT
creates and initializes its own tensors beside it as it does on any model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Is this a weight without memory?"""
    return tensor.numel() > 1 and not any(tensor.stride())


def fill_with_placeholders(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace all parameters and buffers of `module`, in place, by frozen placeholder weights on the CPU."""
    for inner in module.modules():
        for name, parameter in list(inner.named_parameters(recurse=False)):
            placeholder = torch.zeros((), dtype=dtype if parameter.is_floating_point() else parameter.dtype)
            setattr(inner, name, nn.Parameter(placeholder.expand(parameter.shape), requires_grad=False))
        for name, buffer in list(inner.named_buffers(recurse=False)):
            setattr(inner, name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))


class Skeleton(nn.ModuleList):
    """A list of blocks with placeholder weights. `.to()`, `.half()` and `state_dict()` see only what PEFT put there."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Skeleton:
        def unless_placeholder(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if is_placeholder(tensor) else fn(tensor)

        super()._apply(unless_placeholder, recurse)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        for name in [
            name for name, tensor in state.items() if isinstance(tensor, torch.Tensor) and is_placeholder(tensor)
        ]:
            del state[name]
        return state

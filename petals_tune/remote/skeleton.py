"""Blocks without weights: all modules with their names and shapes, so that PEFT can walk them, and none of the memory.

A weight is one number expanded to the right shape with stride 0: a shape, a dtype and a device, and no memory. PEFT
creates and initializes its own tensors beside it as it does on any model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from petals_tune.errors import ConfigError


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
    """A list of blocks with placeholder weights.

    `.to()`, `.half()`, `state_dict()` and `load_state_dict()` see only what PEFT put there.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.register_load_state_dict_post_hook(Skeleton._forget_missing)

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

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._absent = {f"{prefix}{name}" for name, _ in self._placeholders()}
        if present := sorted(self._absent & set(state_dict)):
            raise ConfigError(
                f"{present[0]} is a weight of a remote block, which is on the servers: load a state dict without the "
                "blocks' weights, such as this model's own",
                key="state_dict",
                seen=present[0],
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _forget_missing(self, incompatible: Any) -> None:
        """Drop placeholders from what a state dict lacks."""
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in self._absent]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        for _, tensor in self._placeholders():  # a clone would have the memory that a placeholder spares
            again = tensor.detach()
            memo[id(tensor)] = nn.Parameter(again, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else again
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def _placeholders(self) -> Iterator[tuple[str, torch.Tensor]]:
        named = (*self.named_parameters(), *self.named_buffers())
        return ((name, tensor) for name, tensor in named if is_placeholder(tensor))


@dataclass(frozen=True)
class Weightless:
    """Refuses a call of one block, whose weights would all be zero."""

    number: int

    def __call__(self, block: nn.Module, args: Any) -> None:
        raise ConfigError(
            f"block {self.number} has no weights here: run it on the swarm with "
            f"remote_blocks[{self.number}:{self.number + 1}](hidden)",
            key="remote_blocks",
            seen=self.number,
        )

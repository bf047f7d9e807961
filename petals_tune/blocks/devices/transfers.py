"""Copies between the devices of one model, where its blocks are on several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def device_of(module: nn.Module) -> torch.device:
    """The device of a block: all its weights are on one."""
    return next(module.parameters()).device


def move_arguments(blocks: Sequence[nn.Module], entry: torch.device) -> None:
    """Have the arguments of each block copied to its device before it runs; no block on `entry` needs that.

    The model around the blocks makes masks, positions and rotary tables on `entry`, and passes the same tensors to all
    blocks: each is copied to a device once, where accelerate's hooks copy it for each block. Hidden states are where
    the block before left them, and gradients go back the same way.
    """
    copies: dict[torch.device, WeakTensorKeyDictionary] = {}
    for block in blocks:
        if (device := device_of(block)) != entry:
            copies.setdefault(device, WeakTensorKeyDictionary())
            block.register_forward_pre_hook(_mover(device, copies[device]), with_kwargs=True)


def _mover(device: torch.device, copies: WeakTensorKeyDictionary) -> _Hook:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        move = partial(_copy, device=device, copies=copies)
        return tree_map(move, args), tree_map(move, kwargs)

    return hook


def _copy(value: Any, *, device: torch.device, copies: WeakTensorKeyDictionary) -> Any:
    """`value` on `device` where it is a tensor; anything else, such as a cache, as it is."""
    if not isinstance(value, torch.Tensor) or value.device == device:
        return value
    if value.requires_grad:  # a copy has its own place in each graph
        return value.to(device)
    if (copied := copies.get(value)) is None:
        copied = copies[value] = value.to(device)
    return copied

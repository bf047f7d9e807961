"""Prompts inside the model: vectors (P, H) that are added to the first P positions at the input of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from petals_tune.adapters.base import AdapterMethod, PositionBytes, refusal, shapes
from petals_tune.errors import UnsupportedAdapter
from petals_tune.wire.adapter import AdapterPart


class BlockPrompt(nn.Module):
    """The prompt (P, H) of one block, as a child of the block. Where the block runs here, a hook adds it.

    It belongs to the adapter `adapter`, the soft prompt of that name.
    """

    def __init__(self, prompt: torch.Tensor, adapter: str, *, is_first: bool):
        super().__init__()
        self.prompt, self.adapter, self.is_first = nn.Parameter(prompt), adapter, is_first

    def add(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """As a forward pre-hook of a block, whose first argument is the hidden states (B, S, H).

        Raises UnsupportedAdapter at the first block where a cache holds the first positions already.
        """
        caches = [each for each in (*args, *kwargs.values()) if hasattr(each, "get_seq_length")]
        if self.is_first and any(cache.get_seq_length() for cache in caches):
            raise UnsupportedAdapter(
                "deep prompts are added to the first positions, and these are in the cache already: where the blocks "
                "run here, generate with use_cache=False",
                key="use_cache",
            )
        return (_add_to_first(args[0], self.prompt), *args[1:]), kwargs


class Prompt(AdapterMethod):
    name: ClassVar[str] = "prompt"
    usage: ClassVar[str] = "tuning=deep_prompt"
    first_step_only: ClassVar[bool] = True  # the first positions are in that one
    once_a_module: ClassVar[bool] = True

    def owns(self, layer: nn.Module) -> bool:
        return isinstance(layer, BlockPrompt)

    def collect(
        self, layer: Any, *, block: int, path: str, names: Sequence[str] | None
    ) -> Iterator[tuple[AdapterPart, list[torch.Tensor]]]:
        if names is None or layer.adapter in names:
            yield AdapterPart(block=block, method=self.name, tensors=[layer.prompt.detach()]), [layer.prompt]

    def check(self, part: AdapterPart, module: nn.Module, hidden_size: int) -> None:
        if part.module:
            raise refusal(part, "prompts are added at the input of a block, not of a module inside it")
        found = shapes(part)
        if len(found) != 1 or len(found[0]) != 2 or found[0][1] != hidden_size:
            raise refusal(part, f"prompts are one tensor (P, {hidden_size}), not {found}")

    def is_at_input(self, part: AdapterPart) -> bool:
        return True

    def change_input(self, part: AdapterPart, x: torch.Tensor, *, training: bool) -> torch.Tensor:
        return _add_to_first(x, part.tensors[0])

    def position_bytes(self, part: AdapterPart, *, training: bool) -> PositionBytes:
        hidden_size = part.tensors[0].shape[1]
        return PositionBytes(kept=4 * hidden_size, working=4 * 2 * hidden_size)

    def least_positions(self, part: AdapterPart) -> int:
        return part.tensors[0].shape[0]


def _add_to_first(hidden: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """`hidden` (B, S, H) with `prompt` (P, H) added to the first P positions of every row."""
    padding = (0, 0, 0, hidden.shape[1] - prompt.shape[0])
    return hidden + F.pad(prompt, padding).to(hidden.dtype)

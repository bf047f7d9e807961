"""Positions that a model's blocks can compute: a request for others is refused before it reaches torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petals_tune.errors import RequestRefused
from petals_tune.wire.messages import Forward, Step


@dataclass(frozen=True, kw_only=True)
class PositionLimits:
    """Numbers of positions; None where there is no limit.

    A text without given positions may be longer than `given`, as in transformers: rotary tables and ALiBi go on.
    """

    given: int | None  # positions that a client gives stay below it, or below the length of its text so far
    table: int | None  # rows of a table of positions in the blocks, as GPT-J's: all positions stay below it
    length: int | None  # positions of the longest text, where the blocks have a table of distances, as MPT's

    @classmethod
    def of(cls, model: PreTrainedModel, blocks: nn.ModuleList) -> PositionLimits:
        tables = [_rows(module, "embed_positions", dims=2) for module in blocks.modules()]
        lengths = [_rows(module, "bias", dims=4) for module in blocks.modules()]  # GPT-Neo's causal masks
        if hasattr(model, "build_mpt_alibi_tensor"):
            lengths.append(model.config.max_seq_len)
        return cls(given=_scaled_positions(model.config), table=_least(tables), length=_least(lengths))

    def check(self, request: Forward | Step) -> None:
        """Raises RequestRefused, with the largest position that fits, for positions beyond the limits."""
        stop = (request.position if isinstance(request, Step) else 0) + request.hidden.shape[1]
        given = 0 if request.positions is None else int(request.positions.max()) + 1
        if self.length is not None and stop > self.length:
            raise _refusal(stop, self.length)
        if self.table is not None and (used := given or stop) > self.table:
            raise _refusal(used, self.table)
        if self.given is not None and given > max(self.given, stop):
            raise _refusal(given, max(self.given, stop))


def _refusal(positions: int, most: int) -> RequestRefused:
    return RequestRefused(
        f"position {positions - 1}, and the largest one that this model's blocks take here is {most - 1}",
        reason="positions",
        max_position=most - 1,
    )


def _scaled_positions(config: PretrainedConfig) -> int | None:
    """Return how many positions a config is made for, rotary scaling included; None where it does not say."""
    most: int | None = getattr(config, "max_position_embeddings", None)
    if most is None:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    for each in [rope, *rope.values()]:  # the values have parameters of their own where layer types differ
        if isinstance(each, dict):
            original = each.get("original_max_position_embeddings") or config.max_position_embeddings
            most = max(most, int(original * (each.get("factor") or 1)))
    return most


def _rows(module: nn.Module, name: str, *, dims: int) -> int | None:
    """Return the rows of the buffer `name` of `module`; None where it has none with that many dimensions."""
    buffer: Any = dict(module.named_buffers(recurse=False)).get(name)
    return buffer.shape[-2] if isinstance(buffer, torch.Tensor) and buffer.dim() == dims else None


def _least(counts: list[int | None]) -> int | None:
    return min((count for count in counts if count is not None), default=None)

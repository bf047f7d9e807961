"""BLOOM's attention in a step of one position, each session apart: transformers writes it out for all rows at once.

Its biases (ALiBi) grow with the distance of two positions. Only their differences matter to a softmax, so they are
counted back from the new position, which rounds them least.

Shapes: B rows, R rows of one session, H heads, T positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.bloom.modeling_bloom import BloomAttention, _get_alibi_slopes, dropout_add

from petals_tune.blocks.generation.attention import NotApart, attend


class ApartBloomAttention(BloomAttention):
    """BLOOM's attention; in a pass that computes each session apart, by scaled dot products with its biases."""

    _biases: torch.Tensor | None = None  # (1, H, 1, T) of the distances T - 1 to 0

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        alibi: torch.Tensor,
        attention_mask: Any,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        if layer_past is None or not isinstance(attention_mask, list):
            return super().forward(
                hidden_states, residual, alibi, attention_mask, layer_past, use_cache, output_attentions, **kwargs
            )
        if self.pretraining_tp > 1 and self.slow_but_exact:
            raise NotApart("products in slices")
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        assert self.layer_idx is not None
        layer_past.update(key, value, self.layer_idx)
        padded = alibi.unflatten(0, (len(hidden_states), -1))  # of one position alone where no session has padding

        def bias(rows: slice | None, position: int, start: int, stop: int) -> torch.Tensor:
            if rows is not None:
                return padded[rows, :, :, start:stop]
            biases = self._biases_of(position + 1, query)
            end = biases.shape[-1] - position - 1
            return biases[..., end + start : end + stop]

        context = attend(query, key, attention_mask, self.inv_norm_factor, bias)
        output: torch.Tensor = self.dense(context.flatten(2))
        return dropout_add(output, residual, self.hidden_dropout, self.training), None

    def _biases_of(self, length: int, like: torch.Tensor) -> torch.Tensor:
        known = self._biases
        if known is None or known.shape[-1] < length or known.dtype is not like.dtype or known.device != like.device:
            room = max(1 << (length - 1).bit_length(), 256)
            distances = torch.arange(room - 1, -1, -1, device=like.device)
            slopes = _get_alibi_slopes(self.num_heads, like.device)
            known = self._biases = (-slopes[:, None] * distances).to(like.dtype)[None, :, None]
        return known


def use_apart_attention(blocks: Iterable[nn.Module]) -> None:
    """Replace BLOOM's attention in `blocks`, in place: names and hooks stay."""
    for block in blocks:
        for module in block.modules():
            if type(module) is BloomAttention:
                module.__class__ = ApartBloomAttention

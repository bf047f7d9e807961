"""Attention of a step of one position: each session apart, from its own keys and values, in one pass over the weights.

Most families ask transformers for their masks and their attention by the name in their config. Under the name of this
file they get these: `_mask` evaluates the family's own mask function at each session's own positions, and `_attend`
computes each session by itself. So windows, chunks and padding are the library's, at any mixture of positions; no keys
are copied, and a row's numbers depend on nothing that its mates hold.

Shapes: B rows, R rows of one session, H heads, G grouped heads of keys, T positions, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from petals_tune.blocks.generation.memory import Part

NAME = "petals_tune"

Bias = Callable[[int, int], torch.Tensor]  # of the positions from a start to a stop


class Attending(Protocol):
    """The cache of a pass (blocks/generation/step_cache.py), as attention sees it."""

    rows: list[int]  # of each session
    positions: list[int]  # of each session's new token
    padded: list[bool]  # whether a session has padding
    mask_window: int | None  # of the layers that the next mask is for

    def take(self, keys: torch.Tensor) -> list[list[Part]]:
        """What each session sees, in the layer that has just stored `keys`."""
        ...


@dataclass(frozen=True)
class _Pass:
    cache: Attending
    implementation: str  # the family's own


_current: ContextVar[_Pass | None] = ContextVar("attention of a step", default=None)


class NotApart(RuntimeError):
    """This family's attention does not come through the library's interfaces as it should."""


@dataclass(frozen=True)
class Visible:
    """What one session's rows see in layers of one kind: positions from `first` on, but for those that a mask hides."""

    first: int
    mask: torch.Tensor | None = None  # (R, T) bool, True = attend

    def mask_on(self, device: torch.device) -> torch.Tensor | None:
        """The mask (R, 1, 1, T) on the device of a block, which may be on another one than the model."""
        return None if self.mask is None else self.mask[:, None, None].to(device)


@contextmanager
def each_session_apart(config: PretrainedConfig, cache: Attending) -> Iterator[None]:
    """Within the block, a model with `config` computes the attention of a step of one position as above."""
    own = config._attn_implementation
    token = _current.set(_Pass(cache, own))
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = own
        _current.reset(token)


def _mask(
    *,
    batch_size: int,
    q_length: int,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> list[Visible]:
    """What each session sees, by the library's `mask_function` of (row, head, position, position)."""
    here = _current.get()
    if here is None or q_length != 1 or use_vmap:
        raise NotApart("a mask of several positions, or by a function that takes no tensors")
    cache, window = here.cache, here.cache.mask_window
    if batch_size != sum(cache.rows):
        raise NotApart(f"a mask for {batch_size} rows")
    if mask_function is causal_mask_function and attention_mask is None:
        return [Visible(0)] * len(cache.rows)
    firsts = [0 if window is None else max(position - window + 1, 0) for position in cache.positions]
    lengths = [position + 1 - first for position, first in zip(cache.positions, firsts, strict=True)]
    # All pairs of a row and a position that it might see, one after the other.
    each_row = [number for number, rows in enumerate(cache.rows) for _ in range(rows)]
    repeats = torch.tensor([lengths[number] for number in each_row], device=device)
    ends = repeats.cumsum(0)
    shift = torch.tensor([firsts[number] for number in each_row], device=device) - (ends - repeats)
    total = int(ends[-1])
    rows = torch.repeat_interleave(torch.arange(batch_size, device=device), repeats, output_size=total)
    keys = torch.arange(total, device=device) + shift[rows]
    queries = torch.tensor([cache.positions[number] for number in each_row], device=device)[rows]
    seen = mask_function(rows, torch.zeros_like(rows), queries, keys).expand(total)
    if attention_mask is not None:
        seen = seen & attention_mask[rows, keys]
    if bool(seen.all()):
        return [Visible(first) for first in firsts]
    parts = seen.split([count * length for count, length in zip(cache.rows, lengths, strict=True)])
    return [
        _visible(part.view(count, length), first)
        for part, count, length, first in zip(parts, cache.rows, lengths, firsts, strict=True)
    ]


def _visible(seen: torch.Tensor, first: int) -> Visible:
    """Leave out the oldest positions, which no row sees; then no mask is needed where all rows see the rest."""
    hidden = int(seen.any(0).int().argmax())
    seen = seen[:, hidden:]
    return Visible(first + hidden, None if bool(seen.all()) else seen)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: list[Visible] | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """(B, 1, H, D): the attention of each session's rows of `query` (B, H, 1, D) to its own keys and values."""
    here = _current.get()
    if here is None or not isinstance(attention_mask, list) or query.shape[2] != 1:
        raise NotApart("attention of several positions, or with a mask of its own")
    special = kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None
    if here.implementation == "sdpa" and not special:
        return attend(query, key, attention_mask, scaling), None
    attention, outputs = _own_attention(module, here.implementation), []
    for own, parts, seen in zip(query.split(here.cache.rows), here.cache.take(key), attention_mask, strict=True):
        keys, values = joined(_since(parts, seen.first))
        mask = _as_added(seen.mask_on(own.device), own, here.implementation)
        outputs.append(attention(module, own, keys, values, mask, scaling=scaling, **kwargs)[0])
    return _together(outputs), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    visible: Sequence[Visible],
    scaling: float | None,
    bias: Callable[[slice | None, int, int, int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """(B, 1, H, D): as `_attend`, by scaled dot products.

    `bias` gives what is added to the scores, (1 or R, H, 1, T), for the rows of a padded session or for any others
    (None), their new position, and the positions from a start to a stop.
    """
    here = _current.get()
    assert here is not None
    batch, heads, _, size = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], size)  # heads of a group are its queries
    outputs, first = [], 0
    cache, kept = here.cache, here.cache.take(key)
    each = [grouped] if len(kept) == 1 else grouped.split(cache.rows)
    for own, parts, seen, position, padded in zip(each, kept, visible, cache.positions, cache.padded, strict=True):
        mine = None
        if bias is not None:
            mine = partial(bias, slice(first, first + len(own)) if padded else None, position)
        outputs.append(
            _attention(
                own,
                _since(parts, seen.first),
                seen.mask_on(own.device),
                scaling,
                mine,
                of_all_rows=mine is None or not padded,
            )
        )
        first += len(own)
    return _together(outputs).reshape(batch, 1, heads, -1)


def _attention(
    query: torch.Tensor,
    parts: Sequence[Part],
    mask: torch.Tensor | None,
    scaling: float | None,
    bias: Bias | None,
    *,
    of_all_rows: bool,
) -> torch.Tensor:
    """(R, G, heads of a group, D): one session's attention, by scaled dot products."""
    has_kernel = query.device.type == "cpu" and query.shape[-1] == parts[0].values.shape[-1]
    if has_kernel and mask is None and of_all_rows and (len(parts) > 1 or parts[0].shared is not None):
        return _over_parts(query, parts, scaling, bias)
    keys, values = joined(parts)
    if bias is not None:
        biases = bias(parts[0].start, parts[-1].stop)
        mask = biases if mask is None else biases.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)


def _over_parts(query: torch.Tensor, parts: Sequence[Part], scaling: float | None, bias: Bias | None) -> torch.Tensor:
    """As over all parts in one, which are not joined: the softmax over each, weighted by its sum.

    Rows that share a row of a beginning are queries of one call, which reads it once.
    """
    outputs, sums = [], []
    for part in parts:
        added = None if bias is None else bias(part.start, part.stop)
        output = query.new_empty(*query.shape[:3], part.values.shape[-1])
        log_sum = query.new_empty(query.shape[:3], dtype=torch.float32)
        for row, of in [(None, None)] if part.shared is None else part.shared.groups:
            own = query if of is None else query[of]
            if row is None:
                found, sum_ = _with_sum(own, part.keys, part.values, scaling, added)
            else:
                as_queries = own.transpose(0, 1).flatten(1, 2)[None]
                keys, values = part.keys[row : row + 1], part.values[row : row + 1]
                found, sum_ = _with_sum(as_queries, keys, values, scaling, added)
                found = found[0].unflatten(1, own.shape[:1] + own.shape[2:3]).transpose(0, 1)
                sum_ = sum_[0].unflatten(1, own.shape[:1] + own.shape[2:3]).transpose(0, 1)
            if of is None:
                output, log_sum = found, sum_
            else:
                output[of], log_sum[of] = found, sum_
        outputs.append(output)
        sums.append(log_sum)
    weights = torch.stack(sums).softmax(0)[..., None]
    return (torch.stack(outputs) * weights).sum(0).to(query.dtype)


def _with_sum(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None, added: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention, and the logarithms of its sums of exponentials (R, G, queries). The kernel has no public name."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found, log_sum = attention(query, keys, values, 0.0, False, attn_mask=added, scale=scaling)
    return found, log_sum


def joined(parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all parts, with the session's rows."""
    if len(parts) == 1:
        return parts[0].for_rows()
    keys, values = zip(*(part.for_rows() for part in parts), strict=True)
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def _since(parts: Sequence[Part], first: int) -> Sequence[Part]:
    """The parts of the positions from `first` on."""
    if parts[0].start > first:
        raise NotApart(f"positions from {first} on are seen, and these blocks keep those from {parts[0].start} on")
    if parts[0].start == first:
        return parts
    return [part.since(first) for part in parts if part.stop > first]


def _together(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs))


def _as_added(seen: torch.Tensor | None, like: torch.Tensor, implementation: str) -> torch.Tensor | None:
    """A mask as the attention called `implementation` takes it: written out in Python it adds one to the scores."""
    if seen is None or implementation != "eager":
        return seen
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, torch.finfo(like.dtype).min)


def _own_attention(module: nn.Module, implementation: str) -> Callable[..., tuple[torch.Tensor, Any]]:
    """The family's own attention called `implementation`."""
    if implementation != "eager":
        found: Any = ALL_ATTENTION_FUNCTIONS[implementation]
    else:
        found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise NotApart(f"{type(module).__name__} has no attention of its own by that name")
    own: Callable[..., tuple[torch.Tensor, Any]] = found
    return own


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)

"""Positions of text behind a soft prompt, in batches that are padded on the left."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from petals_tune.errors import ConfigError

_FROM_MASK = {"bloom"}  # models without position_ids that count the mask


def positions_behind_gaps(owner: Any, mask: torch.Tensor, length: int) -> torch.Tensor | None:
    """Return the (B, length) positions of a batch's last tokens where some row has padding between its tokens.

    PEFT puts a soft prompt in front of the padding: [prompt, padding, text]. Counted by place, as models do by default,
    a text would stand the further from its prompt the longer the other rows are. Here padding is not counted. None
    where no row has such a gap, or where the model counts the mask by itself.

    owner: the module whose forward loops over the blocks
    mask:  (B, S) 1 = attend, of all positions so far; `length` of them are the input, the others are in a cache

    Raises ConfigError where blocks would count the padding nevertheless: in a sliding window, and in MPT's ALiBi.
    """
    real = mask.bool()
    gaps = real[:, :1] & (~real[:, :-1] & real[:, 1:]).any(dim=1, keepdim=True)  # (B, 1)
    if not gaps.any():
        return None
    takes_positions = "position_ids" in inspect.signature(owner.forward).parameters
    window = getattr(owner.config, "sliding_window", None) or mask.shape[1]
    if mask.shape[1] > window or not (takes_positions or owner.config.model_type in _FROM_MASK):
        raise ConfigError(
            "padding_side: behind a soft prompt, blocks of this model would count padding on the left as text: pad on "
            "the right, or give rows of one length",
            key="padding_side",
            seen="left",
        )
    if not takes_positions:
        return None
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(gaps, real.long().cumsum(dim=1) - 1, places)[:, -length:]

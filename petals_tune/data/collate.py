"""Collation: rows padded to a batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from petals_tune.data.rows import IGNORED, Row

PaddingSide = Literal["right", "left"]
PADDING_SIDES = get_args(PaddingSide)

Batch = dict[str, Tensor]


def collate(rows: Sequence[Row], *, pad_id: int, padding_side: PaddingSide = "right") -> Batch:
    """Pad B rows to the length T of the longest.

    Returns input_ids (B, T) int64, attention_mask (B, T) int64 with 1 = no padding, and labels (B, T) int64 with -100 =
    not supervised.
    """

    def pad(values: Sequence[list[int]], padding: int) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.int64) for row in values]
        return pad_sequence(tensors, batch_first=True, padding_value=padding, padding_side=padding_side)

    return {
        "input_ids": pad([row.input_ids for row in rows], pad_id),
        "attention_mask": pad([[1] * len(row.input_ids) for row in rows], 0),
        "labels": pad([row.labels for row in rows], IGNORED),
    }


def pad_at_end(batch: Batch) -> Batch:
    """Return the batch with each row's padding behind its tokens, and an attention mask of ones.

    A decoder's positions see those before them alone, so that padding at the end needs no mask: each row's numbers are
    those of the row alone in every family of models, with a soft prompt in front too, and whatever the other rows hold.
    """
    order = batch["attention_mask"].bool().long().argsort(dim=1, descending=True, stable=True)
    rows = {name: tensor.gather(1, order) for name, tensor in batch.items()}
    return rows | {"attention_mask": torch.ones_like(batch["attention_mask"])}


def choose_pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token's id, else the end token's, else 0: padding is masked, so that any valid id works."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0

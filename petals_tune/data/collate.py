"""Rows become a batch: padding and nothing else. Pure functions."""

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
    """A batch of B rows, as long as its longest row.

    input_ids (B, T) int64, attention_mask (B, T) int64 with 1 = real, labels (B, T) int64 with -100 = not learned.
    """

    def padded(values: Sequence[list[int]], padding: int) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.int64) for row in values]
        return pad_sequence(tensors, batch_first=True, padding_value=padding, padding_side=padding_side)

    return {
        "input_ids": padded([row.input_ids for row in rows], pad_id),
        "attention_mask": padded([[1] * len(row.input_ids) for row in rows], 0),
        "labels": padded([row.labels for row in rows], IGNORED),
    }


def choose_pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding token, else its end token, else 0: it is masked out, so any id of the vocabulary does."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0

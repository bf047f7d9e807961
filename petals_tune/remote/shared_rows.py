"""Rows of a generation session that are equal so far: beams and samples of one prompt are computed as one row."""

from __future__ import annotations

import torch

from petals_tune.swarm.history import Inputs

_SAMPLED = 64  # positions of a row that are compared first, of `_VALUES` numbers each
_VALUES = 4


def share_rows(inputs: Inputs, came: torch.Tensor) -> tuple[Inputs, torch.Tensor, torch.Tensor | None]:
    """Keep one of each set of rows that come from the same row and are given the same.

    inputs: of B rows
    came:   (B,) int64, the row that each of them was in the step before

    Returns (inputs of U rows, (U,) the row that each of these was, (B,) which of the U each row is now; None: all are
    distinct).
    """
    if len(came) == 1 or len(came.unique()) == len(came):
        return inputs, came, None
    rows_of: dict[tuple[float, ...], list[int]] = {}  # distinct rows that may be equal
    kept: list[int] = []
    now = []
    for row, key in enumerate(_keys(inputs, came)):
        alike = rows_of.setdefault(key, [])
        equal = next((each for each in alike if _are_equal(inputs, kept[each], row)), None)
        if equal is None:
            equal = len(kept)
            alike.append(equal)
            kept.append(row)
        now.append(equal)
    if len(kept) == len(now):
        return inputs, came, None
    rows = torch.tensor(kept)
    return inputs.rows(rows), came[rows], torch.tensor(now)


def _keys(inputs: Inputs, came: torch.Tensor) -> list[tuple[float, ...]]:
    """What equal rows have in common, of each row: quick to compare, since a prompt may be long."""
    sample = inputs.hidden[:, :: max(1, len(inputs) // _SAMPLED), :_VALUES].flatten(1).tolist()
    return [(before, *values) for before, values in zip(came.tolist(), sample, strict=True)]


def _are_equal(inputs: Inputs, one: int, other: int) -> bool:
    tensors = [inputs.hidden, inputs.padding, inputs.positions]
    return all(torch.equal(each[one], each[other]) for each in tensors if each is not None and len(each) > 1)

"""Which rows of a step are computed once."""

import pytest
import torch

from petals_tune.remote.shared_rows import share_rows
from petals_tune.swarm.history import Inputs

PROMPT = torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(1))
OTHER = PROMPT.clone()
OTHER[0, 131, 7] += 1  # neither in a sampled position nor among the sampled values


def given(*rows: torch.Tensor, **fields: torch.Tensor) -> Inputs:
    return Inputs(**{"hidden": torch.cat(rows), "padding": None, "positions": None, **fields})


def test_equal_rows_that_come_from_the_same_row_are_one():
    inputs, came, now = share_rows(given(PROMPT, OTHER, PROMPT, PROMPT, OTHER), torch.tensor([0, 0, 0, 1, 0]))
    assert torch.equal(inputs.hidden, torch.cat([PROMPT, OTHER, PROMPT]))
    assert (came.tolist(), now.tolist()) == ([0, 0, 1], [0, 1, 0, 2, 1])


@pytest.mark.parametrize(
    "fields",
    [
        {"padding": torch.arange(200).expand(2, -1) >= torch.tensor([[0], [3]])},
        {"positions": torch.arange(200) + torch.tensor([[0], [1]])},
    ],
    ids=["padding", "positions"],
)
def test_rows_with_other_padding_or_positions_are_others(fields):
    inputs, _, now = share_rows(given(PROMPT, PROMPT, **fields), torch.zeros(2, dtype=torch.long))
    assert (len(inputs.hidden), now) == (2, None)
    ((name, tensor),) = fields.items()
    inputs, _, now = share_rows(given(PROMPT, PROMPT, PROMPT, **{name: tensor[[0, 1, 0]]}), torch.zeros(3).long())
    assert now.tolist() == [0, 1, 0]
    assert torch.equal(getattr(inputs, name), tensor)


def test_rows_that_come_from_different_rows_are_not_looked_at():
    inputs = given(PROMPT, PROMPT)
    assert share_rows(inputs, torch.tensor([1, 0]))[0] is inputs

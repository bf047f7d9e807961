import pytest
import torch

from petals_tune.swarm.session import History, Inputs


def inputs(*numbers: int) -> Inputs:
    """Two rows with these numbers as their positions' hidden states, the second row's negative."""
    row = torch.tensor(numbers, dtype=torch.float32)
    return Inputs(hidden=torch.stack([row, -row])[:, :, None], padding=None, positions=None)


def replayed(history: History) -> list[list[float]]:
    return torch.cat([part.hidden for part in history.replayed()], dim=1)[:, :, 0].tolist()


@pytest.mark.parametrize("length", range(1, 8))
def test_a_history_is_cut_wherever_its_parts_begin(length):
    history = History()
    for part in (inputs(1, 2, 3), inputs(4), inputs(5, 6)):
        history.add(part)
    history.cut(length)
    assert history.length == min(length, 6)
    assert replayed(history)[0] == [1, 2, 3, 4, 5, 6][:length]
    history.add(inputs(9))
    assert replayed(history)[0] == [*[1, 2, 3, 4, 5, 6][:length], 9]


def test_a_history_is_cut_to_nothing():
    history = History()
    history.add(inputs(1, 2))
    history.cut(0)
    assert (history.length, history.replayed()) == (0, [])


def test_rows_keep_the_order_that_they_had_when_a_part_was_cut():
    history = History()
    history.add(inputs(1, 2, 3))
    history.reorder(torch.tensor([1, 0]))
    history.cut(2)
    history.add(inputs(7))
    history.reorder(torch.tensor([1, 1]))
    assert replayed(history) == [[1, 2, -7], [1, 2, -7]]

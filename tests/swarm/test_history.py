"""Inputs that are kept to be replayed: what a server that follows the steps of a replay has seen of each row."""

import pytest
import torch

from petals_tune.swarm.history import History, Inputs, Replay, compose


def inputs(*rows: tuple[int, ...]) -> Inputs:
    """Rows with these numbers as their positions' hidden states."""
    return Inputs(hidden=torch.tensor(rows, dtype=torch.float32)[:, :, None], padding=None, positions=None)


def twice(*numbers: int) -> Inputs:
    """Two rows with these numbers, the second row's negative."""
    return inputs(numbers, tuple(-number for number in numbers))


def seen(replay: Replay) -> list[list[float]]:
    """The positions of each row of a server that took the steps of `replay`, one after the other."""
    rows: list[list[float]] = []
    for step, order in replay.steps:
        rows = rows or [[] for _ in step.hidden]
        rows = rows if order is None else [list(rows[row]) for row in order]
        assert len(rows) == len(step.hidden)
        for row, new in zip(rows, step.hidden[:, :, 0].tolist(), strict=True):
            row.extend(new)
    return rows if replay.order is None else [rows[row] for row in replay.order]


@pytest.mark.parametrize("length", range(1, 8))
def test_a_history_is_cut_wherever_its_parts_begin(length):
    history = History()
    for part in (twice(1, 2, 3), twice(4), twice(5, 6)):
        history.add(part)
    history.cut(length)
    assert history.length == min(length, 6)
    assert seen(history.replayed())[0] == [1, 2, 3, 4, 5, 6][:length]
    history.add(twice(9))
    assert seen(history.replayed())[0] == [*[1, 2, 3, 4, 5, 6][:length], 9]


def test_a_history_is_cut_to_nothing():
    history = History()
    history.add(twice(1, 2))
    history.cut(0)
    assert (history.length, history.replayed()) == (0, Replay(steps=[], order=None))


def test_rows_keep_the_order_that_they_had_when_a_part_was_cut():
    history = History()
    history.add(twice(1, 2, 3))
    history.reorder(torch.tensor([1, 0]))
    history.cut(2)
    history.add(twice(7))
    history.reorder(torch.tensor([1, 1]))
    assert seen(history.replayed()) == [[1, 2, -7], [1, 2, -7]]


def test_rows_are_replayed_once_as_long_as_they_are_the_same():
    """A prompt of one row, three beams of it of which one is dropped, and another prompt's row between them."""
    history = History()
    history.add(inputs((1, 2), (10, 20)))
    history.reorder(torch.tensor([0, 0, 1, 0]))
    history.add(inputs((3,), (4,), (30,), (5,)))
    history.reorder(torch.tensor([3, 0, 0, 2]))
    replay = history.replayed()
    assert seen(replay) == [[1, 2, 5], [1, 2, 3], [1, 2, 3], [10, 20, 30]]
    assert [len(step.hidden) for step, _ in replay.steps] == [2, 3], "the dropped beam is not computed again"
    history.add(inputs((6,), (7,), (8,), (60,)))
    assert seen(history.replayed()) == [[1, 2, 5, 6], [1, 2, 3, 7], [1, 2, 3, 8], [10, 20, 30, 60]]
    assert [len(step.hidden) for step, _ in history.replayed().steps] == [2, 3, 4]


def test_a_fork_goes_on_by_itself():
    history = History()
    history.add(twice(1, 2, 3))
    forked = history.fork(2, torch.tensor([1, 1, 0]))
    forked.add(inputs((7,), (8,), (9,)))
    history.reorder(torch.tensor([1, 0]))
    history.add(twice(4))
    assert seen(forked.replayed()) == [[-1, -2, 7], [-1, -2, 8], [1, 2, 9]]
    assert seen(history.replayed()) == [[-1, -2, -3, 4], [1, 2, 3, -4]]


@pytest.mark.parametrize(
    ("before", "order", "both"),
    [(None, None, None), (None, [1, 1], [1, 1]), ([2, 0], None, [2, 0]), ([2, 0], [1, 1, 0], [0, 0, 2])],
)
def test_orders_one_after_the_other(before, order, both):
    tensors = [None if each is None else torch.tensor(each) for each in (before, order)]
    found = compose(*tensors)
    assert (found if found is None else found.tolist()) == both

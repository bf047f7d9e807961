"""Packing, length buckets, and the order of rows over epochs and processes."""

from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_tune.data.batching import RowOrder, RowShare, pack, training_order
from petals_tune.data.chat_rows import Row

LENGTHS = [3 + (n * 7) % 40 for n in range(203)]


@given(st.lists(st.integers(2, 20), max_size=60))
def test_packs_hold_every_row_once_and_are_not_too_long(lengths: list[int]) -> None:
    packs = pack(lengths, 20)
    assert sorted(chain.from_iterable(packs)) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 20 for rows in packs)
    assert len(packs) <= max(1, 2 * -(-sum(lengths) // 20))


def batches(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def padding(order: list[int], size: int) -> int:
    return sum(max(LENGTHS[n] for n in batch) - LENGTHS[n] for batch in batches(order, size) for n in batch)


def order_of(*, buckets: bool, epoch: int = 0, seed: int = 0) -> list[int]:
    return training_order(LENGTHS, batch_rows=4, buckets=buckets, seed=seed, epoch=epoch)


@pytest.mark.parametrize("buckets", [False, True])
def test_every_epoch_has_every_row_once_in_an_order_of_its_own(buckets: bool) -> None:
    orders = [order_of(buckets=buckets, epoch=epoch) for epoch in range(3)] + [order_of(buckets=buckets, seed=1)]
    assert all(sorted(order) == list(range(203)) for order in orders)
    assert all(one != other for one, other in pairwise(orders))
    assert order_of(buckets=buckets, epoch=1) == orders[1]


def test_buckets_need_less_padding_and_do_not_go_from_short_to_long() -> None:
    plain, bucketed = order_of(buckets=False), order_of(buckets=True)
    assert padding(bucketed, 4) < padding(plain, 4) / 4
    longest = [max(LENGTHS[n] for n in batch) for batch in batches(bucketed, 4)]
    assert longest != sorted(longest)
    assert len(batches(bucketed, 4)[-1]) == 3  # the short batch stays the last


def sampler(rank: int = 0, ranks: int = 1, *, batch_size: int = 4) -> RowOrder:
    return RowOrder(LENGTHS, batch_size=batch_size, buckets=True, seed=5, rank=rank, ranks=ranks)


def test_the_steps_of_two_processes_are_those_of_one() -> None:
    whole = batches(list(sampler(batch_size=8)), 8)
    shares = [batches(list(sampler(rank, 2)), 4) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == len(whole)  # nobody waits for the other
    for step, batch in enumerate(whole):
        assert sorted(shares[0][step] + shares[1][step]) == sorted(batch)


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 5), ranks=st.integers(1, 4))
def test_a_row_is_repeated_only_where_a_process_would_have_no_batch(rows: int, batch_size: int, ranks: int) -> None:
    shares = []
    for rank in range(ranks):
        order = RowOrder([3] * rows, batch_size=batch_size, buckets=False, seed=5, rank=rank, ranks=ranks)
        shares.append(batches(list(order), batch_size))
        assert sum(map(len, shares[-1])) == len(order)
    steps = -(-rows // (batch_size * ranks))
    assert {len(share) for share in shares} == {steps}
    whole = training_order([3] * rows, batch_rows=batch_size * ranks, buckets=False, seed=5, epoch=0)
    for step, batch in enumerate(batches(whole, batch_size * ranks)):
        found = [row for share in shares for row in share[step]]
        assert sorted(set(found) & set(batch)) == sorted(batch)
        assert len(found) == max(len(batch), ranks)


def test_a_place_in_an_epoch_can_be_resumed() -> None:
    rows = sampler()
    list(rows)  # the first epoch
    place = iter(rows)
    for _ in range(10):
        next(place)
    state, rest = place.state_dict(), list(place)
    resumed = iter(sampler())
    resumed.load_state_dict(state)
    assert list(resumed) == rest
    assert list(resumed.rows) == list(rows)  # and so is the epoch after it


def test_validation_rows_are_shared_without_repeating_any() -> None:
    rows = [Row(input_ids=[1, 2], labels=[1, 2])] * 7
    shares = [RowShare(rows, rank=rank, ranks=3) for rank in range(3)]
    assert sorted(chain(*shares)) == list(range(7))
    assert [len(share) for share in shares] == [3, 2, 2]

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from petals_tune.data.shuffle import ShuffledRows


def loader(seed: int = 0) -> StatefulDataLoader:
    return StatefulDataLoader(
        range(12), batch_size=3, sampler=ShuffledRows(12, seed), collate_fn=list, generator=torch.Generator()
    )


def epochs(of: StatefulDataLoader, count: int) -> list[list[list[int]]]:
    return [list(of) for _ in range(count)]


def test_every_epoch_has_all_rows_in_an_order_of_its_own_that_follows_from_the_seed() -> None:
    found = epochs(loader(), 3)
    assert all(sorted(row for batch in epoch for row in batch) == list(range(12)) for epoch in found)
    assert found[0] != found[1] != found[2]
    assert found == epochs(loader(), 3)
    assert found != epochs(loader(seed=1), 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("batches", [1, 2, 4])
def test_a_loader_that_goes_on_gives_the_rest_of_its_epoch_and_the_same_later_ones(epoch: int, batches: int) -> None:
    whole, first, second = epochs(loader(), 4), loader(), loader()
    epochs(first, epoch)
    begun = iter(first)
    assert [next(begun) for _ in range(batches)] == whole[epoch][:batches]
    second.load_state_dict(first.state_dict())
    assert epochs(second, 2) == [whole[epoch][batches:], whole[epoch + 1]]

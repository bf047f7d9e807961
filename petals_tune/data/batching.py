"""Which rows go together: short rows packed into one, rows of alike length in one batch. Pure but for the sampler."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from petals_tune.data.rows import Row

_OPEN_PACKS = 16  # rows that may still take another one
_BUCKET_BATCHES = 16  # batches that are sorted by length at a time


def pack(rows: Sequence[Row], max_tokens: int) -> list[Row]:
    """Rows joined end to end, up to max_tokens each: fewer rows, almost no padding.

    A row in a pack sees the rows before it: blocks are given a padding mask, which cannot part them.
    """
    packed: list[list[Row]] = []
    waiting: list[tuple[list[Row], int]] = []  # a pack, and the tokens that still fit into it
    for row in rows:
        length = len(row.input_ids)
        place = next((n for n, (_, room) in enumerate(waiting) if length <= room), None)
        if place is None:
            own = [row]
            packed.append(own)
            waiting = [*waiting, (own, max_tokens - length)][-_OPEN_PACKS:]
        else:
            parts, room = waiting[place]
            parts.append(row)
            waiting[place] = (parts, room - length)
    return [
        Row(
            input_ids=[token for row in parts for token in row.input_ids],
            labels=[label for row in parts for label in row.labels],
            cut_tokens=sum(row.cut_tokens for row in parts),
        )
        for parts in packed
    ]


def training_order(lengths: Sequence[int], *, batch_rows: int, buckets: bool, seed: int, epoch: int) -> list[int]:
    """Positions of all rows, shuffled. With `buckets`, the batch_rows that follow each other are of alike length.

    Only a short last batch stays where it is, at the end.
    """
    dice = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(len(lengths), generator=dice).tolist()
    if not buckets:
        return order
    window = batch_rows * _BUCKET_BATCHES
    by_length = [
        position
        for start in range(0, len(order), window)
        for position in sorted(order[start : start + window], key=lambda position: lengths[position])
    ]
    batches = [by_length[start : start + batch_rows] for start in range(0, len(order), batch_rows)]
    whole = [batch for batch in batches if len(batch) == batch_rows]
    mixed = [whole[n] for n in torch.randperm(len(whole), generator=dice).tolist()]
    return [position for batch in [*mixed, *batches[len(whole) :]] for position in batch]


class RowOrder(DistributedSampler):
    """The rows of one of several processes, in this epoch's order, which a checkpoint can resume.

    The batches that all processes take in one step are the batch that a single process would take with as many rows
    in all. Rows are repeated where they do not go round. (Lightning leaves a DistributedSampler as it is.)
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, buckets: bool, seed: int, rank: int, ranks: int):
        super().__init__(lengths, num_replicas=ranks, rank=rank, seed=seed)  # type: ignore[arg-type]  # it asks for the length alone
        self.lengths, self.batch_rows, self.buckets = lengths, batch_size * ranks, buckets

    def __iter__(self) -> "Place":
        return Place(self, {"seed": self.seed, "epoch": self.epoch, "taken": 0})

    def order(self, seed: int, epoch: int) -> list[int]:
        order = training_order(self.lengths, batch_rows=self.batch_rows, buckets=self.buckets, seed=seed, epoch=epoch)
        order += order[: -len(order) % self.num_replicas]
        return order[self.rank :: self.num_replicas]


class Place(Iterator[int]):
    """Where one epoch is. torchdata's loader saves the state and loads it again."""

    def __init__(self, rows: RowOrder, state: dict[str, int]):
        self.rows = rows
        self.load_state_dict(state)

    def __next__(self) -> int:
        if self.state["taken"] == len(self.order):
            raise StopIteration
        self.state["taken"] += 1
        return self.order[self.state["taken"] - 1]

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = dict(state)
        self.order = self.rows.order(state["seed"], state["epoch"])
        self.rows.epoch = state["epoch"] + 1  # Lightning sets it for each epoch; a loop by hand goes on by itself


class RowShare(DistributedSampler):
    """Every `ranks`-th row, none twice: what one of several processes validates."""

    def __init__(self, rows: Sequence[Row], *, rank: int, ranks: int):
        super().__init__(rows, num_replicas=ranks, rank=rank, shuffle=False)  # type: ignore[arg-type]  # the same
        self.share = range(rank, len(rows), ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(self.share)

    def __len__(self) -> int:
        return len(self.share)

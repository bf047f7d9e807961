"""Packing of short rows, batches of similar length, and the order of rows over epochs and processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from petals_tune.data.rows import Row

_OPEN_PACKS = 16  # packs that may still take another row
_BUCKET_BATCHES = 16  # batches whose rows are sorted by length together


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return which rows are joined end to end, in rows of at most `max_tokens`: fewer rows, almost no padding.

    A row attends to those before it in its pack: blocks get a padding mask alone, which cannot separate them.
    """
    packs: list[list[int]] = []
    open_packs: list[tuple[list[int], int]] = []  # a pack, and the tokens that still fit into it
    for row, length in enumerate(lengths):
        index = next((n for n, (_, free) in enumerate(open_packs) if length <= free), None)
        if index is None:
            packs.append([row])
            open_packs = [*open_packs, (packs[-1], max_tokens - length)][-_OPEN_PACKS:]
        else:
            rows, free = open_packs[index]
            rows.append(row)
            open_packs[index] = (rows, free - length)
    return packs


def training_order(lengths: Sequence[int], *, batch_rows: int, buckets: bool, seed: int, epoch: int) -> list[int]:
    """Return a random permutation of the row indices for one epoch.

    With `buckets`, the `batch_rows` rows of a batch have similar lengths, and the batches are shuffled; a last batch
    with fewer rows stays at the end.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    if not buckets:
        return order
    window = batch_rows * _BUCKET_BATCHES
    by_length = [
        row
        for start in range(0, len(order), window)
        for row in sorted(order[start : start + window], key=lambda row: lengths[row])
    ]
    batches = [by_length[start : start + batch_rows] for start in range(0, len(order), batch_rows)]
    full = [batch for batch in batches if len(batch) == batch_rows]
    shuffled = [full[n] for n in torch.randperm(len(full), generator=generator).tolist()]
    return [row for batch in [*shuffled, *batches[len(full) :]] for row in batch]


class RowOrder(DistributedSampler):
    """Training sampler of one of several processes; a checkpoint can resume it within an epoch.

    The processes' batches of one step are together the batch of a single process with `ranks` times the rows. All have
    the same number of batches: a row is repeated only where a process would have none in the last one. (A
    DistributedSampler, because Lightning keeps those.)
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, buckets: bool, seed: int, rank: int, ranks: int):
        super().__init__(lengths, num_replicas=ranks, rank=rank, seed=seed)  # type: ignore[arg-type]  # it asks for the length alone
        self.lengths, self.batch_rows, self.buckets = lengths, batch_size * ranks, buckets
        # DistributedSampler would give every process the same number of rows.
        self.num_samples = len(range(rank, len(lengths) + self.repeated(len(lengths)), ranks))
        self._start = (0, 0)  # an epoch, and how many of its rows were taken before

    def start_at(self, *, epoch: int, batches: int) -> None:
        """Begin the next epoch that is iterated over with number `epoch`, after so many of its batches."""
        self._start, self.epoch = (epoch, min(batches * self.batch_rows, len(self.lengths))), epoch

    def __iter__(self) -> EpochIterator:
        epoch, taken = self._start
        return EpochIterator(
            self, {"seed": self.seed, "epoch": self.epoch, "taken": taken if epoch == self.epoch else 0}
        )

    def epoch_order(self, seed: int, epoch: int) -> list[int]:
        """Return the row indices of one epoch; the processes take them by turns."""
        return training_order(self.lengths, batch_rows=self.batch_rows, buckets=self.buckets, seed=seed, epoch=epoch)

    def repeated(self, rows: int) -> int:
        """Return how many of the `rows` that are left are repeated, so that each process has some in the last step."""
        last = rows % self.batch_rows
        return max(0, self.num_replicas - last) if last else 0


class EpochIterator(Iterator[int]):
    """Row indices of one epoch for one process. torchdata's StatefulDataLoader saves and loads its state.

    `taken` counts the rows of all processes, so that a run of another number of processes can go on from it.
    """

    def __init__(self, rows: RowOrder, state: dict[str, int]):
        self.rows = rows
        self.load_state_dict(state)

    def __next__(self) -> int:
        if self.state["taken"] + self.rows.rank >= len(self.order):
            raise StopIteration
        # Lightning sets it for each epoch; a plain loop over the loader does not. Not on creation: torchdata's loader
        # with workers makes two iterators and uses the second.
        self.rows.epoch = self.state["epoch"] + 1
        row = self.order[self.state["taken"] + self.rows.rank]
        self.state["taken"] += self.rows.num_replicas
        return row

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = dict(state)
        self.order = self.rows.epoch_order(state["seed"], state["epoch"])
        left = len(self.order) - self.state["taken"]
        self.order = [*self.order, *islice(cycle(self.order), self.rows.repeated(left))]


class RowShare(DistributedSampler):
    """Evaluation sampler of one of several processes: every `ranks`-th row, none of them repeated."""

    def __init__(self, rows: Sequence[Row], *, rank: int, ranks: int):
        super().__init__(rows, num_replicas=ranks, rank=rank, shuffle=False)  # type: ignore[arg-type]  # the same
        self.share = range(rank, len(rows), ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(self.share)

    def __len__(self) -> int:
        return len(self.share)

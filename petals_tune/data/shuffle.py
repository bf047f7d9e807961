"""The order of the training rows: another one in each epoch, and the same again after a resumption.

torchdata's own RandomSampler goes on with the right batches of the epoch it was interrupted in, and shuffles all later
epochs otherwise than an uninterrupted run does: they follow from how often a generator was asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

_FAR = 1_000_003  # so that neighbouring seeds do not share epochs


class ShuffledRows(Sampler[int]):
    """Row numbers below `count`; the order follows from the seed and the number of the epoch alone."""

    def __init__(self, count: int, seed: int):
        self._count, self.seed = count, seed
        self.epoch = 0  # of the next iterator

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return _Epoch(self)

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + _FAR * epoch)
        return torch.randperm(self._count, generator=generator).tolist()


class _Epoch(Iterator[int]):
    """One epoch's row numbers; torchdata's loader saves and restores its state."""

    def __init__(self, sampler: ShuffledRows):
        self._sampler = sampler
        self._begin(sampler.epoch, given=0)

    def _begin(self, epoch: int, given: int) -> None:
        self._epoch, self._given = epoch, given
        self._order = self._sampler.order(epoch)
        self._sampler.epoch = epoch + 1

    def __next__(self) -> int:
        if self._given == len(self._order):
            raise StopIteration
        self._given += 1
        return self._order[self._given - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._sampler.seed, "epoch": self._epoch, "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampler.seed = state["seed"]
        self._begin(state["epoch"], state["given"])

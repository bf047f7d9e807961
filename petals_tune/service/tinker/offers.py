"""Checkpoints for sampling as models of OpenAI's interface, by their paths."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from petals_tune.service.served import Offer
from petals_tune.service.tinker.samplers import Samplers
from petals_tune.service.tinker.store import Store


@dataclass(frozen=True, kw_only=True)
class SavedOffer(Offer):
    """A checkpoint, whose adapter is loaded while it is used."""

    samplers: Samplers

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[str | None]:
        assert self.owner is not None
        async with self.samplers.adapter_at(self.name, self.owner) as adapter:
            yield adapter


class SavedOffers:
    """The checkpoints that owners saved by `save_weights_for_sampler` under a name."""

    def __init__(self, store: Store, samplers: Samplers):
        self._store, self._samplers = store, samplers

    def of(self, owner: str) -> list[Offer]:
        """Those of an owner, of the run used last first."""
        return [
            SavedOffer(name=each.path, adapter=None, created=int(each.created_s), owner=owner, samplers=self._samplers)
            for run in self._store.runs(owner)
            for each in self._store.checkpoints(run.id)
            if each.kind == "sampler_weights" and each.named
        ]

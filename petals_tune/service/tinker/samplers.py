"""Sampling sessions, and the adapters that they need: loaded from checkpoints, the least recently used unloaded."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from petals_tune.service.errors import ServiceError
from petals_tune.service.tinker.checkpoints import Checkpoints
from petals_tune.service.tinker.records import CheckpointRecord, SamplerRecord
from petals_tune.service.tinker.runs.turns import in_thread
from petals_tune.service.tinker.store import Store


class SampledModel(Protocol):
    """The model, as sampling needs it beside the decoder (petals_tune/service/tinker/runs/adapters.py). Thread-safe."""

    def load_for_sampling(self, adapter: str, folder: Path) -> None: ...

    def remove(self, adapter: str) -> None: ...

    def prompt_logprobs(
        self, adapter: str | None, ids: Sequence[int], top: int
    ) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """Log-probabilities of `ids` from the second one on, and the `top` most likely tokens there."""
        ...


@dataclass(eq=False)
class _Loaded:
    adapter: str  # its name in the model
    users: int = 0


class Samplers:
    """All sampling sessions. Used by one event loop."""

    def __init__(self, store: Store, checkpoints: Checkpoints, model: SampledModel, *, most: int):
        """most: adapters in memory, but for those that are used at the moment."""
        self._store, self._checkpoints, self._model, self._most = store, checkpoints, model, most
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # by their folders, the one used last is the last
        self._changing = asyncio.Lock()

    def open(self, owner: str, session: str, base_model: str, path: str | None) -> str:
        """A sampling session over the checkpoint at `path`; None: over the base model."""
        id = f"{session}:sample:{secrets.token_hex(8)}"
        self._store.put(SamplerRecord(id=id, owner=owner, session=session, base_model=base_model, path=path))
        return id

    def find(self, id: str, owner: str) -> SamplerRecord:
        """Raises ServiceError (404) where this owner has none of this name, or its weights are gone."""
        found = self._store.one(SamplerRecord, id=id, owner=owner)
        if found is None:
            raise ServiceError(404, f"there is no sampling session {id!r} here", kind="invalid_request_error")
        if found.path is not None:
            self._checkpoints.find(found.path, owner)
        return found

    @asynccontextmanager
    async def adapter_of(self, sampler: SamplerRecord) -> AsyncIterator[str | None]:
        """The adapter of a sampling session, loaded for the block; None: the base model."""
        if sampler.path is None:
            yield None
            return
        async with self.adapter_at(sampler.path, sampler.owner) as adapter:
            yield adapter

    @asynccontextmanager
    async def adapter_at(self, path: str, owner: str) -> AsyncIterator[str]:
        """The adapter of a checkpoint, loaded for the block. Raises ServiceError (404) where it is not there."""
        async with self._changing:
            checkpoint, _ = self._checkpoints.find(path, owner)
            loaded = self._loaded.get(checkpoint.folder)
            if loaded is None:
                loaded = _Loaded(f"tinker {checkpoint.folder}")
                folder = self._checkpoints.folder_of(checkpoint)
                await in_thread(self._model.load_for_sampling, loaded.adapter, folder)
                self._loaded[checkpoint.folder] = loaded
            self._loaded.move_to_end(checkpoint.folder)
            loaded.users += 1
            self._make_room()
            self._note_use(checkpoint)
        try:
            yield loaded.adapter
        finally:
            loaded.users -= 1
            self._note_use(checkpoint)

    def forget(self, checkpoint: CheckpointRecord) -> None:
        """Unload the adapter of a checkpoint that was deleted; who uses it goes on."""
        if (loaded := self._loaded.pop(checkpoint.folder, None)) is not None:
            self._model.remove(loaded.adapter)

    def _make_room(self) -> None:
        idle = [folder for folder, loaded in self._loaded.items() if loaded.users == 0]
        for folder in idle[: max(len(self._loaded) - self._most, 0)]:
            self._model.remove(self._loaded.pop(folder).adapter)

    def _note_use(self, checkpoint: CheckpointRecord) -> None:
        self._store.change(
            CheckpointRecord,
            {"used_s": time.time()},
            run=checkpoint.run,
            kind=checkpoint.kind,
            name=checkpoint.name,
        )

"""Live runs: in memory while they are used, else written out, and loaded again when they are asked for."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from petals_tune.service.errors import ServiceError
from petals_tune.service.tinker.records import CheckpointRecord, ParkedRecord, RunRecord
from petals_tune.service.tinker.runs.run import Run, TrainedModel
from petals_tune.service.tinker.runs.turns import Turns, in_thread
from petals_tune.service.tinker.store import Store

logger = logging.getLogger(__name__)

PARKED = "live"  # the folder beside a run's checkpoints


@dataclass(eq=False)
class Live:
    """A run in memory."""

    run: Run
    turns: Turns = field(default_factory=Turns)
    users: int = 0  # requests that run or wait


class LiveRuns:
    """All runs that can go on. Used by one event loop."""

    def __init__(self, store: Store, folder: Path, model: TrainedModel, *, most: int):
        """folder: of checkpoints; most: runs in memory, but for those with requests that run or wait."""
        self._store, self._folder, self._model, self._most = store, folder, model, most
        self._live: OrderedDict[str, Live] = OrderedDict()  # the one used last is the last
        self._changing = asyncio.Lock()

    def check(self, id: str, owner: str) -> RunRecord:
        """The record of a run that can go on.

        Raises ServiceError (404) where this owner has no such run, and (410) where it has gone, with what to call.
        """
        record = self._store.one(RunRecord, id=id, owner=owner)
        if record is None:
            raise ServiceError(404, f"there is no model {id!r} here", kind="invalid_request_error")
        if id not in self._live and self._store.one(ParkedRecord, run=id) is None:
            raise gone(record, self._store.checkpoints(id))
        return record

    async def begin(self, record: RunRecord, checkpoint: Path | None = None, *, with_optimizer: bool = False) -> None:
        """Begin a run, from a checkpoint where one is given. Raises what the model raises; then there is no run."""

        def make() -> Run:
            self._model.create(record.id, record.lora)
            try:
                run = Run(record, self._model)
                if checkpoint is not None:
                    run.load(checkpoint, with_optimizer=with_optimizer)
            except BaseException:
                self._model.remove(record.id)
                raise
            return run

        async with self._changing:
            run = await in_thread(make)
            self._store.put(record)
            self._live[record.id] = Live(run)
            await self._make_room()

    @asynccontextmanager
    async def turn(self, id: str, owner: str, number: int) -> AsyncIterator[Run]:
        """Wait for the turn of request `number` of a run; it is in memory for the block. Raises as `check`, `Turns`."""
        async with self._changing:
            record = self.check(id, owner)
            if id not in self._live:
                self._live[id] = await in_thread(self._revived, record)
            live = self._live[id]
            self._live.move_to_end(id)
            live.users += 1
            await self._make_room()
        try:
            async with live.turns.turn(number):
                yield live.run
        finally:
            live.users -= 1

    async def drop(self, id: str) -> None:
        """End a run for good; its checkpoints stay. What runs goes on to its end."""
        async with self._changing:
            if (live := self._live.pop(id, None)) is not None:
                live.turns.stop()
                self._model.remove(id)
            self._store.remove(ParkedRecord, run=id)
            await asyncio.to_thread(shutil.rmtree, self._folder / id / PARKED, ignore_errors=True)

    def stop(self) -> None:
        """Let requests that run go on to their end, and begin no others."""
        for live in self._live.values():
            live.turns.stop()

    async def park_all(self) -> None:
        """Write all runs out; none may be in use."""
        async with self._changing:
            for id in list(self._live):
                await self._park(id)

    async def _make_room(self) -> None:
        idle = [id for id, live in self._live.items() if live.users == 0]
        for id in idle[: max(len(self._live) - self._most, 0)]:
            await self._park(id)

    async def _park(self, id: str) -> None:
        live = self._live[id]
        run = live.run
        folder = Path(id) / PARKED / secrets.token_hex(8)
        await in_thread(run.save, self._folder / folder, with_optimizer=True, with_gradients=True)
        loss, weight = run.unfinished
        self._store.put(
            ParkedRecord(run=id, folder=str(folder), done=live.turns.done, steps=run.steps, loss=loss, weight=weight)
        )
        del self._live[id]
        self._model.remove(id)

    def _revived(self, record: RunRecord) -> Live:
        parked = self._store.one(ParkedRecord, run=record.id)
        assert parked is not None  # checked
        self._model.create(record.id, record.lora)
        try:
            run = Run(record, self._model)
            run.load(self._folder / parked.folder, with_optimizer=True)
            run.steps, run.unfinished = parked.steps, (parked.loss, parked.weight)
        except BaseException:
            self._model.remove(record.id)
            raise
        # From here on the run changes: after a kill it would go on from where it was parked, and its client would not.
        self._store.remove(ParkedRecord, run=record.id)
        shutil.rmtree(self._folder / record.id / PARKED, ignore_errors=True)
        return Live(run, Turns(parked.done))


def gone(record: RunRecord, checkpoints: list[CheckpointRecord]) -> ServiceError:
    """The error for a run whose live weights are lost, with its last checkpoint."""
    last = next((each for each in checkpoints if each.kind == "weights"), None)
    what = "it has no checkpoint: begin a new one with create_lora_training_client"
    if last is not None:
        call = f"create_training_client_from_state_with_optimizer({last.path!r})"
        what = f"go on from its last checkpoint with service_client.{call}"
    return ServiceError(
        410,
        f"the live weights of {record.id} are gone (its session ended, or the service was killed); {what}",
        kind="invalid_request_error",
    )

"""Checkpoints of runs: records, and folders in PEFT's format."""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petals_tune.errors import ConfigError
from petals_tune.service.errors import ServiceError
from petals_tune.service.tinker.bodies import SaveWeights
from petals_tune.service.tinker.records import CheckpointRecord, ParkedRecord, RunRecord
from petals_tune.service.tinker.runs.run import Run
from petals_tune.service.tinker.store import Store

AUTOSAVE = "autosave"  # the name of checkpoints that nobody asked for
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{,99}")


class Checkpoints:
    """The checkpoints of all runs. Thread-safe."""

    def __init__(self, store: Store, folder: Path):
        self._store, self.folder = store, folder

    def find(self, path: str, owner: str) -> tuple[CheckpointRecord, RunRecord]:
        """A checkpoint by its path, and its run. Raises ServiceError (404) where this owner has none of that name."""
        found = self._store.checkpoint(path)
        run = None if found is None else self._store.one(RunRecord, id=found.run)
        if found is None or run is None or not (run.owner == owner or found.public):
            raise ServiceError(404, f"there is no checkpoint {path!r} here", kind="invalid_request_error")
        return found, run

    def folder_of(self, checkpoint: CheckpointRecord) -> Path:
        return self.folder / checkpoint.folder

    def check_name(self, run: str, kind: str, asked: SaveWeights) -> None:
        """Raises ConfigError for a name that cannot be one, or that another checkpoint has."""
        name = asked.path
        if name is not None and not _NAME.fullmatch(name):
            raise ConfigError(
                "the name of a checkpoint has up to 100 letters, digits, '-', '_' and '.'", key="path", seen=name
            )
        known = self._store.one(CheckpointRecord, run=run, kind=kind, name=name)
        if known is not None and not asked.overwrite and name != AUTOSAVE:
            hint = ": overwrite=True replaces it" if kind == "weights" else ": give another name"
            raise ConfigError(f"there is a checkpoint {known.path}{hint}", key="path", seen=name)

    def save(
        self, run: Run, kind: str, asked: SaveWeights, *, name: str | None = None, recipients: Sequence[Any] = ()
    ) -> CheckpointRecord:
        """Save a checkpoint of a run, whole or not at all. Raises ConfigError for a name that cannot be used.

        name: of one that its owner did not name, in the place of `asked.path`
        recipients: for whom alone its files are encrypted
        """
        id = run.record.id
        if name is None:
            self.check_name(id, kind, asked)
        given, now_s = name or str(asked.path), time.time()
        before = self._store.one(CheckpointRecord, run=id, kind=kind, name=given)
        # Another folder than before: the record decides which of them is the checkpoint.
        folder = Path(id) / kind / (given if before is None else f"{given}~{secrets.token_hex(4)}")
        shutil.rmtree(self.folder / folder, ignore_errors=True)
        size_bytes = run.save(self.folder / folder, with_optimizer=kind == "weights", recipients=recipients)
        record = CheckpointRecord(
            run=id,
            kind=kind,
            name=given,
            folder=str(folder),
            bytes=size_bytes,
            named=name is None,
            public=False,
            metadata=asked.user_metadata or {},
            created_s=now_s,
            used_s=now_s,
            expires_s=None if asked.ttl_seconds is None else now_s + asked.ttl_seconds,
        )
        self._store.put(record)
        if before is not None:
            shutil.rmtree(self.folder / before.folder, ignore_errors=True)
        return record

    def delete(self, checkpoint: CheckpointRecord) -> None:
        # The record first: a folder that no record names is no checkpoint any more.
        self._store.remove(CheckpointRecord, run=checkpoint.run, kind=checkpoint.kind, name=checkpoint.name)
        shutil.rmtree(self.folder / checkpoint.folder, ignore_errors=True)

    def delete_expired(self, *, unnamed_s: float) -> list[CheckpointRecord]:
        """Delete expired checkpoints, and those without a name that nobody used for so long; return them."""
        now_s = time.time()
        over = [
            each
            for each in self._store.all(CheckpointRecord)
            if (each.expires_s is not None and each.expires_s <= now_s)
            or (not each.named and each.kind == "sampler_weights" and each.used_s + unnamed_s <= now_s)
        ]
        for each in over:
            self.delete(each)
        return over

    def delete_strays(self) -> None:
        """Delete folders that no record names, which a kill left; only while nothing is saved."""
        known = {each.folder for each in self._store.all(CheckpointRecord)}
        known |= {each.folder for each in self._store.all(ParkedRecord)}
        for place in self.folder.glob("*/*/*"):
            if place.is_dir() and str(place.relative_to(self.folder)) not in known:
                shutil.rmtree(place, ignore_errors=True)

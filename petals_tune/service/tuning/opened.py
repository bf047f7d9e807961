"""Tuning as a part of the service: its routes, records and folders, while it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from starlette.routing import Route

from petals_tune.files import make_folder
from petals_tune.service.adapter_folder import AdapterFolder
from petals_tune.service.tinker import store as tinker
from petals_tune.service.tuning.command import Recipe
from petals_tune.service.tuning.files import Files
from petals_tune.service.tuning.jobs import Jobs
from petals_tune.service.tuning.routes import Tuning
from petals_tune.service.tuning.runs import FolderRuns, JobRuns, Runs, RunSource, TinkerRuns
from petals_tune.service.tuning.store import Store
from petals_tune.train.options import Swarm


@asynccontextmanager
async def opened_tuning(
    cfg: DictConfig,
    swarm: Swarm,
    peers: Sequence[str],
    offers: AdapterFolder,
    adapters: Any,
    names: Mapping[str, int],
) -> AsyncIterator[list[Route]]:
    """The routes of files, jobs and runs of the service that `cfg` describes; jobs run within the block.

    adapters: the registry of the model; names: of the base model, with its most positions, which a chat may have too.
    Raises ConfigError for options that cannot work.
    """
    options, service = cfg.tuning, Path(cfg.folder).resolve()
    folder, tinker_folder = service / "tuning", service / "tinker"
    for each in (folder / "files", folder / "jobs", tinker_folder):
        make_folder(each, key="folder")
    compose = partial(Recipe.of, source=cfg.model.source, revision=cfg.model.revision, swarm=swarm, peers=peers)
    recipe = await asyncio.to_thread(
        compose,
        options.recipe,
        max_tokens=min(names.values()),
        tokens=[str(Path(each).resolve()) for each in options.tokens],
    )
    source = f"{cfg.model.source}@{cfg.model.revision or ''}"
    with ExitStack() as stack:
        store = Store(folder / "records.sqlite")
        stack.callback(store.close)
        tinker_store = tinker.Store(tinker_folder / "runs.sqlite")
        stack.callback(tinker_store.close)
        files = Files(store, folder / "files", most_mb=options.file_mb, most_mb_a_key=options.files_mb_a_key)
        jobs = Jobs(
            store,
            folder / "jobs",
            recipe,
            source=source,
            at_once=options.at_once,
            most_waiting=options.jobs_a_key,
            offers=offers,
            load=adapters.load,
            remove=adapters.remove,
        )
        sources: list[RunSource] = [JobRuns(jobs=jobs), TinkerRuns(store=tinker_store, folder=tinker_folder)]
        if cfg.outputs is not None:
            sources.append(FolderRuns(folder=Path(cfg.outputs), but_not=service))
        tuning = Tuning(store, files, jobs, names=list(names), source=source, batch_size=recipe.batch_size)
        async with jobs.running():
            yield [*tuning.routes, *Runs(sources).routes]

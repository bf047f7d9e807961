"""A service on 127.0.0.1 with the paths of tuning alone, whose jobs run a small program in the place of a recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from starlette.types import ASGIApp

from petals_tune.errors import ConfigError
from petals_tune.service.adapter_folder import AdapterFolder
from petals_tune.service.tuning.command import Recipe
from petals_tune.service.tuning.files import Files
from petals_tune.service.tuning.jobs import Jobs
from petals_tune.service.tuning.routes import Tuning
from petals_tune.service.tuning.runs import JobRuns, Runs, RunSource
from petals_tune.service.tuning.store import JobRecord, Store
from petals_tune.service.users.keys import Keys
from petals_tune.service.web.app import application
from tests.service.port import served

PROGRAM = Path(__file__).with_name("small_run.py")
KEYS = Keys(owners={Keys.digest("key of ann"): "ann", Keys.digest("key of ben"): "ben"})
SOURCE = "tiny@"


class SmallRecipe(Recipe):
    """The number of epochs is that of steps; a suffix says how the run goes."""

    def command(self, job: JobRecord, folder: Path, *, starts_from: Path | None, place: int) -> list[str]:
        mode = job.suffix or "done"
        return [sys.executable, "-I", "-S", str(PROGRAM), str(folder), mode, str(job.hyperparameters.n_epochs)]


SMALL = SmallRecipe(common=(), batch_size=4, learning_rate=1e-3, private=False, tokens=())


@dataclass(kw_only=True)
class Registry:
    """The adapters of a model: their folders by name."""

    loaded: dict[str, Path] = field(default_factory=dict)

    def load(self, name: str, folder: Path) -> None:
        if not (folder / "adapter_config.json").exists():
            raise ConfigError(f"{folder} has no adapter", key="adapter")
        self.loaded[name] = folder


@dataclass(kw_only=True)
class SmallService:
    url: str
    folder: Path
    offers: AdapterFolder
    registry: Registry
    store: Store

    def client(self, owner: str = "ann") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=f"key of {owner}", max_retries=0)

    def job_folder(self, job: Any) -> Path:
        return self.folder / "jobs" / job.id


@contextmanager
def small_service(
    folder: Path,
    *,
    recipe: Recipe = SMALL,
    at_once: int = 1,
    most_waiting: int = 8,
    most_mb: int = 1,
    most_mb_a_key: int = 2,
    keys: Keys = KEYS,
    sources: Sequence[RunSource] = (),
    source: str = SOURCE,
) -> Iterator[SmallService]:
    """A service whose records and files are in `folder`, until the end of the block."""
    for each in ("files", "jobs"):
        (folder / each).mkdir(exist_ok=True)
    registry, store = Registry(), Store(folder / "records.sqlite")
    offers = AdapterFolder(["base"], None, load=registry.load, remove=registry.loaded.pop)

    @asynccontextmanager
    async def opened() -> AsyncIterator[ASGIApp]:
        files = Files(store, folder / "files", most_mb=most_mb, most_mb_a_key=most_mb_a_key)
        jobs = Jobs(
            store,
            folder / "jobs",
            recipe,
            source=source,
            at_once=at_once,
            most_waiting=most_waiting,
            offers=offers,
            load=registry.load,
            remove=registry.loaded.pop,
        )
        tuning = Tuning(store, files, jobs, names=["base"], source=source, batch_size=recipe.batch_size)
        async with jobs.running():
            yield application([*tuning.routes, *Runs([JobRuns(jobs=jobs), *sources]).routes], keys)
        store.close()

    with served(opened) as running:
        yield SmallService(url=running.url, folder=folder, offers=offers, registry=registry, store=store)


def chat(question: str, answer: str = "An answer.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def jsonl(rows: Sequence[Any]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


CHATS = jsonl([chat(f"Question {number}?") for number in range(10)])


def upload(client: openai.OpenAI, content: bytes = CHATS, name: str = "chats.jsonl") -> str:
    return client.files.create(file=(name, content), purpose="fine-tune").id


def options(suffix: str | None = None, epochs: int = 3, **more: Any) -> dict[str, Any]:
    """Of a job of so many steps."""
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}}
    named = {} if suffix is None else {"suffix": suffix}
    return {"model": "base", "method": method, **named, **more}

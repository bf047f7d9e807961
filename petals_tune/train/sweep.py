"""The runs of one command. Those of a sweep (-m) share one swarm, and end with a table and a picture."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_object
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from omegaconf import DictConfig
from transformers import PreTrainedModel

from petals_tune.errors import ConfigError, PetalsTuneError, ServerError, SwarmError
from petals_tune.files import replacing
from petals_tune.train.curves import read_metrics
from petals_tune.train.options import ClientOptions, LocalSwarm
from petals_tune.train.parts import Parts
from petals_tune.train.result import Result
from petals_tune.train.run import joined, remote_model, run, say

Direction = Literal["minimize", "maximize"]
KNOWN: dict[str, Direction] = {"loss": "minimize", "perplexity": "minimize", "accuracy": "maximize"}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What jobs are compared by, and which way is better."""

    metric: str
    direction: Direction

    @classmethod
    def of(cls, cfg: DictConfig, *, sweeper: Any) -> Goal:
        """The goal of a job, before it runs. Raises ConfigError where the `sweeper` would look the other way."""
        metric = cfg.sweep.metric or get_object(cfg.objective._target_).headline
        direction = cfg.sweep.direction or KNOWN.get(metric)
        if direction is None:
            raise ConfigError(f"which {metric} is better? Say sweep.direction=minimize or sweep.direction=maximize")
        theirs = sweeper.get("direction")  # Optuna's; Hydra's own sweeper runs all there is, and has none
        theirs = getattr(theirs, "name", theirs)
        if theirs not in (None, direction):
            raise ConfigError(
                f"this sweeper would {theirs} the {metric} of the jobs: add hydra.sweeper.direction={direction}, "
                "or choose another sweep.metric, such as loss"
            )
        return cls(metric=metric, direction=direction)

    def value(self, result: Result) -> float:
        """Raises ConfigError where the run has no such metric."""
        after = result.measured["after"]
        if self.metric not in after:
            raise ConfigError(f"sweep.metric is {self.metric!r}: a validation of this run has {', '.join(after)}")
        return after[self.metric]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep. `result` is None where it failed."""

    number: int
    overrides: dict[str, str]
    folder: Path
    goal: Goal
    result: Result | None = None

    @property
    def value(self) -> float:
        assert self.result is not None
        return self.goal.value(self.result)


class Runs:
    """Runs the jobs that Hydra hands over; leaving the block ends the swarm and reports a sweep, however it ended."""

    def __init__(self) -> None:
        self._swarm = KeptSwarm()
        self._jobs: list[Job] = []
        self._folder = Path()

    def __enter__(self) -> Runs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._swarm.close()
        if self._jobs:
            report(self._jobs, self._folder)

    def run(self, cfg: DictConfig) -> float:
        """Tune as `cfg` says; returns what the job is compared by, for a sweeper that chooses by itself."""
        hydra = HydraConfig.get()
        if hydra.mode != RunMode.MULTIRUN:
            return run(cfg)["after"]["loss"]
        self._folder = Path(hydra.sweep.dir)
        overrides = dict(text.partition("=")[::2] for text in hydra.overrides.task)
        goal = Goal.of(cfg, sweeper=hydra.sweeper)
        job = Job(number=hydra.job.num, overrides=overrides, folder=Path(cfg.output_dir), goal=goal)
        say(f"\njob       {job.number}: {' '.join(hydra.overrides.task)}")
        try:
            run(cfg, self._swarm)
            result = Result.load(job.folder)
            value = goal.value(result)
        except PetalsTuneError as error:
            # The others go on; Hydra raises this one again when they are done.
            say(f"job       {job.number} failed: {error}")
            self._jobs.append(job)
            if isinstance(error, SwarmError | ServerError):
                self._swarm.close()  # the next job gets another one
            raise
        self._jobs.append(replace(job, result=result))
        return value


class KeptSwarm:
    """A `Connect` that keeps a local swarm for the next run, until one asks for other servers."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._opened: tuple[str, LocalSwarm] | None = None
        self._peers: list[str] = []

    @contextmanager
    def __call__(self, parts: Parts) -> Iterator[PreTrainedModel]:
        if not isinstance(parts.swarm, LocalSwarm):
            with remote_model(parts) as model:
                yield model
            return
        # How the client talks to its servers is no reason to start others.
        as_client: dict[str, Any] = {field.name: field.default for field in fields(ClientOptions)}
        wanted = parts.source, replace(parts.swarm, **as_client)
        if self._opened != wanted:
            self.close()
            say(f"swarm     {parts.swarm.opening(parts.blocks)}, for all jobs ...")
            self._peers = self._stack.enter_context(parts.swarm.opened(parts.source, parts.blocks))
            self._opened = wanted
        with joined(parts, self._peers) as model:
            yield model

    def close(self) -> None:
        self._opened = None
        self._stack.close()


def report(jobs: Sequence[Job], folder: Path) -> None:
    """Print the table, the best job first, and leave it with a picture as sweep.csv and sweep.png."""
    done = ranked(jobs)
    table = rows_of(done, failed=[job for job in jobs if job.result is None])
    with replacing(folder / "sweep.csv") as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows(table)
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for row in table:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if done:
        draw_sweep(done, folder / "sweep.png")
    say(f"the sweep is in {folder}: sweep.csv{', sweep.png' if done else ''}, and one folder for each job")


def ranked(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that ended well; those that are judged by the same metric side by side, the best first."""

    def order(job: Job) -> tuple[str, float, float]:
        assert job.result is not None
        value = job.value if job.goal.direction == "minimize" else -job.value
        return job.goal.metric, value, job.result.measured["after"]["loss"]

    return sorted((job for job in jobs if job.result is not None), key=order)


def rows_of(done: Sequence[Job], *, failed: Sequence[Job]) -> list[list[str]]:
    """A header, then a row for each job: what differs between them, what they reached, what it took."""
    keys = differing([*done, *failed])
    table = [["job", *keys, "metric", "before", "after", "loss", "min", "tokens/s", "sent MB"]]
    for job in done:
        result = job.result
        assert result is not None
        before, after = result.measured["before"], result.measured["after"]
        figures = [
            job.goal.metric,
            f"{before[job.goal.metric]:.4f}",
            f"{after[job.goal.metric]:.4f}",
            f"{after['loss']:.4f}",
            f"{result.minutes:.1f}",
            f"{result.tokens_per_s:.0f}",
            f"{result.sent_mb:.0f}",
        ]
        table.append([str(job.number), *(job.overrides.get(key, "") for key in keys), *figures])
    for job in failed:
        table.append([str(job.number), *(job.overrides.get(key, "") for key in keys), "failed", *[""] * 6])
    return table


def differing(jobs: Sequence[Job]) -> list[str]:
    """The overrides that are not the same in all jobs; of a single one, all."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    return [key for key in keys if len(jobs) == 1 or len({job.overrides.get(key) for job in jobs}) > 1]


def short(value: str) -> str:
    """A number that a sweeper drew, with the digits that matter."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def draw_sweep(jobs: Sequence[Job], picture: Path) -> None:
    """What the jobs are compared by, the best on top, beside their validation loss over the steps."""
    keys = differing(jobs)
    labels = [", ".join(f"{key}={short(job.overrides[key])}" for key in keys if key in job.overrides) for job in jobs]
    figure = Figure(figsize=(11, 1.6 + 0.35 * len(jobs) + 1.5), layout="constrained")
    metric, curves = figure.subplots(1, 2)
    for place, (job, label) in enumerate(zip(jobs, labels, strict=True)):
        color = f"C{place % 10}"
        metric.plot(job.value, place, "o", color=color)
        points = read_metrics(job.folder / "metrics.csv").get("val/loss", [])
        curves.plot(*zip(*points, strict=True), marker=".", color=color, label=label)
    metric.set_yticks(range(len(jobs)), labels)
    metric.invert_yaxis()
    compared = dict.fromkeys(job.goal.metric for job in jobs)
    metric.set_xlabel(f"{' or '.join(compared)} after training")
    metric.grid(alpha=0.3)
    curves.set_xlabel("optimizer steps")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.set_ylabel("validation loss")
    curves.grid(alpha=0.3)
    for panel in (metric, curves):
        panel.spines[["top", "right"]].set_visible(False)
    with replacing(picture) as partial:
        figure.savefig(partial, dpi=120)

"""The jobs of one command. Those of a sweep (-m) share one local swarm, and end with a table and a plot."""

from __future__ import annotations

import csv
import math
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
from petals_tune.hydra_errors import first_line
from petals_tune.train.curves import read_metrics
from petals_tune.train.options import ClientOptions, LocalSwarm, open_swarm
from petals_tune.train.parts import Parts
from petals_tune.train.result import Result
from petals_tune.train.run import connected_model, remote_model, run, say

Direction = Literal["minimize", "maximize"]
METRIC_DIRECTIONS: dict[str, Direction] = {"loss": "minimize", "perplexity": "minimize", "accuracy": "maximize"}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The metric that jobs are compared by, and whether it is minimized or maximized."""

    metric: str
    direction: Direction

    @classmethod
    def from_config(cls, cfg: DictConfig, *, sweeper: Any) -> Goal:
        """Return the goal of a job. Raises ConfigError where the `sweeper` optimizes in the other direction."""
        metric = cfg.sweep.metric or get_object(cfg.objective._target_).headline
        direction = cfg.sweep.direction or METRIC_DIRECTIONS.get(metric)
        if direction is None:
            raise ConfigError(
                f"which {metric} is better? Say sweep.direction=minimize or sweep.direction=maximize",
                key="sweep.direction",
            )
        of_sweeper = sweeper.get("direction")  # Optuna's; Hydra's own sweeper runs all jobs and has none
        of_sweeper = getattr(of_sweeper, "name", of_sweeper)
        if of_sweeper not in (None, direction):
            raise ConfigError(
                f"this sweeper would {of_sweeper} the {metric} of the jobs: add hydra.sweeper.direction={direction}, "
                "or choose another sweep.metric, such as loss",
                key="hydra.sweeper.direction",
                seen=of_sweeper,
            )
        return cls(metric=metric, direction=direction)

    def value(self, result: Result) -> float:
        """Return the metric of a run. Raises ConfigError where the run has no such metric."""
        after = result.measured["after"]
        if self.metric not in after:
            raise ConfigError(
                f"sweep.metric is {self.metric!r}: a validation of this run has {', '.join(after)}",
                key="sweep.metric",
                seen=self.metric,
            )
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


class JobRunner:
    """Runs the jobs of a command. Leaving the block closes the swarm and reports a sweep, also after an error."""

    def __init__(self) -> None:
        self._swarm = SharedSwarm()
        self._jobs: list[Job] = []
        self._folder = Path()

    def __enter__(self) -> JobRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._swarm.close()
        if self._jobs:
            report(self._jobs, self._folder)

    def run(self, cfg: DictConfig) -> float:
        """Tune as `cfg` says; returns the goal's value, by which a sweeper such as Optuna chooses the next job."""
        hydra = HydraConfig.get()
        if hydra.mode != RunMode.MULTIRUN:
            return run(cfg)["after"]["loss"]
        self._folder = Path(hydra.sweep.dir)
        overrides = dict(text.partition("=")[::2] for text in hydra.overrides.task)
        goal = Goal.from_config(cfg, sweeper=hydra.sweeper)
        job = Job(number=hydra.job.num, overrides=overrides, folder=Path(cfg.output_dir), goal=goal)
        say(f"\njob       {job.number}: {' '.join(hydra.overrides.task)}")
        try:
            run(cfg, self._swarm)
            result = Result.load(job.folder)
            value = goal.value(result)
        except BaseException as error:
            # The other jobs are run nevertheless; Hydra raises the error at the end.
            say(f"job       {job.number} failed: {first_line(error)}")
            self._jobs.append(job)
            if not isinstance(error, PetalsTuneError) or isinstance(error, SwarmError | ServerError):
                self._swarm.close()  # the next job starts a new one
            raise
        self._jobs.append(replace(job, result=result))
        return value


class SharedSwarm:
    """A `Connect` that keeps a local swarm running for the next job, until one needs other servers."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._opened: tuple[str, str | None, LocalSwarm] | None = None
        self._peers: list[str] = []

    @contextmanager
    def __call__(self, parts: Parts) -> Iterator[PreTrainedModel]:
        if not isinstance(parts.swarm, LocalSwarm):
            with remote_model(parts) as model:
                yield model
            return
        # Options of the client do not need other servers.
        defaults: dict[str, Any] = {field.name: field.default for field in fields(ClientOptions)}
        servers = parts.source, parts.revision, replace(parts.swarm, **defaults)
        if self._opened != servers:
            self.close()
            say(f"swarm     {parts.swarm.describe_opening(parts.blocks)}, for all jobs ...")
            opening = open_swarm(parts.swarm, parts.source, parts.blocks, parts.revision)
            self._peers = self._stack.enter_context(opening)
            self._opened = servers
        with connected_model(parts, self._peers) as model:
            yield model

    def close(self) -> None:
        self._opened = None
        self._stack.close()


def report(jobs: Sequence[Job], folder: Path) -> None:
    """Print a table of the jobs, the best first, and write it to sweep.csv, with a plot in sweep.png."""
    done = rank_jobs(jobs)
    table = table_rows(done, failed=[job for job in jobs if job.result is None])
    with replacing(folder / "sweep.csv") as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows(table)
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for row in table:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if done:
        plot_sweep(done, folder / "sweep.png")
    say(f"the sweep is in {folder}: sweep.csv{', sweep.png' if done else ''}, and one folder for each job")


def rank_jobs(jobs: Sequence[Job]) -> list[Job]:
    """Sort the successful jobs by metric, and within a metric from the best to the worst, NaN last."""

    def order(job: Job) -> tuple[str, float, float]:
        assert job.result is not None
        value = job.value if job.goal.direction == "minimize" else -job.value
        return job.goal.metric, math.inf if math.isnan(value) else value, job.result.measured["after"]["loss"]

    return sorted((job for job in jobs if job.result is not None), key=order)


def table_rows(done: Sequence[Job], *, failed: Sequence[Job]) -> list[list[str]]:
    """Build a header and one row per job: differing overrides, metrics before and after, time and traffic."""
    keys = differing_overrides([*done, *failed])
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


def differing_overrides(jobs: Sequence[Job]) -> list[str]:
    """Return the keys of overrides that are not the same in all jobs; of a single job, all keys."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    return [key for key in keys if len(jobs) == 1 or len({job.overrides.get(key) for job in jobs}) > 1]


def shorten_number(value: str) -> str:
    """Round a number to four digits; other texts are returned as they are."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def plot_sweep(jobs: Sequence[Job], picture: Path) -> None:
    """Plot the jobs' metric, the best on top, beside their validation loss over the steps."""
    keys = differing_overrides(jobs)
    labels = [
        ", ".join(f"{key}={shorten_number(job.overrides[key])}" for key in keys if key in job.overrides) for job in jobs
    ]
    figure = Figure(figsize=(11, 1.6 + 0.35 * len(jobs) + 1.5), layout="constrained")
    metric, curves = figure.subplots(1, 2)
    for index, (job, label) in enumerate(zip(jobs, labels, strict=True)):
        color = f"C{index % 10}"
        metric.plot(job.value, index, "o", color=color)
        metrics_file = job.folder / "metrics.csv"  # not there after a fast_dev_run
        points = read_metrics(metrics_file).get("val/loss", []) if metrics_file.exists() else []
        curves.plot(*zip(*points, strict=True), marker=".", color=color, label=label)
    metric.set_yticks(range(len(jobs)), labels)
    metric.invert_yaxis()
    metrics = dict.fromkeys(job.goal.metric for job in jobs)
    metric.set_xlabel(f"{' or '.join(metrics)} after training")
    metric.grid(alpha=0.3)
    curves.set_xlabel("optimizer steps")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.set_ylabel("validation loss")
    curves.grid(alpha=0.3)
    for panel in (metric, curves):
        panel.spines[["top", "right"]].set_visible(False)
    with replacing(picture) as partial:
        figure.savefig(partial, dpi=120)

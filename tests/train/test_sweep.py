"""A sweep's table, plot and swarm; and two whole sweeps over real servers."""

import csv
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml
from hydra.types import RunMode
from matplotlib.image import imread

from petals_tune.config import check, composed
from petals_tune.errors import ConfigError
from petals_tune.train import sweep
from petals_tune.train.options import LocalSwarm
from petals_tune.train.result import Result
from petals_tune.train.sweep import METRIC_DIRECTIONS, Goal, Job, SharedSwarm, plot_sweep, rank_jobs, report
from tests.raising import raises

METRICS = "step,val/loss\n0,2.0\n5,1.0\n"


def job(number: int, folder: Path, *, metric: str = "accuracy", value: float = 0.5, **overrides: str) -> Job:
    (folder / str(number)).mkdir()
    (folder / str(number) / "metrics.csv").write_text(METRICS)
    result = Result(name="x", base="y", data="z", headline=metric, seed=0)
    result.measured = {"before": {metric: 0.1, "loss": 2.0}, "after": {metric: value, "loss": 1.0}}
    goal = Goal(metric=metric, direction=METRIC_DIRECTIONS.get(metric, "maximize"))
    overrides = {"recipe": "sst2", **overrides}
    return Job(number=number, overrides=overrides, folder=folder / str(number), goal=goal, result=result)


def test_the_best_comes_first_whichever_way_the_metric_goes(tmp_path: Path) -> None:
    jobs = [job(n, tmp_path, value=value) for n, value in enumerate([0.2, 0.9, 0.5])]
    assert [each.number for each in rank_jobs(jobs)] == [1, 2, 0]
    jobs = [job(n + 3, tmp_path, metric="perplexity", value=value) for n, value in enumerate([2.0, 9.0, 5.0])]
    assert [each.number for each in rank_jobs(jobs)] == [3, 5, 4]


def goal(*overrides: str, sweeper: dict[str, Any] | None = None) -> Goal:
    return Goal.from_config(composed(["recipe=sst2", "output_dir=x", *overrides]), sweeper=sweeper or {})


def test_jobs_are_compared_by_the_recipes_metric_or_another_one() -> None:
    assert goal() == goal(sweeper={"direction": "maximize"}) == Goal(metric="accuracy", direction="maximize")
    assert goal("recipe=lm") == Goal(metric="perplexity", direction="minimize")
    assert goal("sweep.metric=loss", sweeper={"direction": "minimize"}).direction == "minimize"
    assert goal("sweep.metric=f1", "sweep.direction=maximize") == Goal(metric="f1", direction="maximize")


def test_a_sweeper_with_the_other_direction_is_an_error_before_the_first_job() -> None:
    with raises(ConfigError, key="hydra.sweeper.direction", seen="minimize"):
        goal(sweeper={"direction": "minimize"})
    with raises(ConfigError, key="sweep.direction"):
        goal("sweep.metric=f1")
    with raises(ConfigError, key="sweep.direction", seen="up"):
        check(composed(["recipe=sst2", "output_dir=x", "sweep.direction=up"]))


def test_a_metric_that_a_run_does_not_have_is_an_error(tmp_path: Path) -> None:
    with raises(ConfigError, key="sweep.metric", seen="f1"):
        _ = replace(job(0, tmp_path), goal=Goal(metric="f1", direction="maximize")).value


def test_the_table_has_the_differing_overrides_and_failed_jobs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(0, tmp_path, value=0.5, seed="0"), job(1, tmp_path, value=0.75, seed="1")]
    jobs.append(replace(job(2, tmp_path, seed="2"), result=None))
    report(jobs, tmp_path)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["1", "0", "2"]
    assert [row["metric"] for row in rows] == ["accuracy", "accuracy", "failed"]
    assert rows[0]["after"] == "0.7500"
    assert "recipe" not in rows[0]
    printed = capsys.readouterr().out
    assert printed.index("0.7500") < printed.index("0.5000") < printed.index("failed")
    assert imread(tmp_path / "sweep.png")[..., :3].std() > 0.01


def test_a_single_job_is_plotted_too(tmp_path: Path) -> None:
    plot_sweep([job(0, tmp_path)], tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").exists()


@pytest.mark.parametrize("error", [ConfigError, RuntimeError, KeyboardInterrupt])
def test_a_failed_job_is_listed_whosever_error_it_was(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hydra = SimpleNamespace(
        mode=RunMode.MULTIRUN,
        sweep=SimpleNamespace(dir=str(tmp_path)),
        overrides=SimpleNamespace(task=["seed=1"]),
        sweeper={},
        job=SimpleNamespace(num=0),
    )
    monkeypatch.setattr(sweep.HydraConfig, "get", lambda: hydra)
    monkeypatch.setattr(sweep, "run", MagicMock(side_effect=error("why")))
    with pytest.raises(error), sweep.JobRunner() as runner:
        runner.run(composed(["recipe=sst2", f"output_dir={tmp_path / '0'}"]))
    with (tmp_path / "sweep.csv").open(newline="") as file:
        assert [(row["job"], row["seed"], row["metric"]) for row in csv.DictReader(file)] == [("0", "1", "failed")]


@dataclass(frozen=True, kw_only=True)
class CountedSwarm(LocalSwarm):
    """Counts how often its servers are started and ended."""

    events: Any = None

    @contextmanager
    def open(self, source: str, blocks: int, **revision: str) -> Any:
        self.events.append("start")
        yield [f"address {self.events.count('start')}"]
        self.events.append("end")


def test_one_swarm_serves_all_jobs_that_want_the_same_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "connected_model", contextmanager(lambda parts, peers: iter([peers])))
    events: list[str] = []
    plain = CountedSwarm(events=events)
    kept = SharedSwarm()

    def peers(revision: str | None = None, **changes: Any) -> list[str]:
        parts: Any = SimpleNamespace(source="tiny", revision=revision, blocks=4, swarm=replace(plain, **changes))
        with kept(parts) as found:
            return found  # type: ignore[return-value]

    assert peers() == peers() == peers(wire_format="float16") == ["address 1"]
    assert events == ["start"]
    assert peers(quantization="nf4") == ["address 2"]
    assert events == ["start", "end", "start"]
    assert peers("old", quantization="nf4") == ["address 3"]
    kept.close()
    assert events == ["start", "end"] * 3


def sweep_command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "petals_tune", "-m", "recipe=sst2", "logger=csv", "data.max_rows=32"]
    small = ["data.max_validation_rows=16", "trainer.max_steps=2", "trainer.val_check_interval=2", "zero_shot=false"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [*command, *small, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.swarm
def test_a_sweep_starts_one_swarm_survives_a_bad_job_and_ends_with_a_table(tiny_folder: Path, tmp_path: Path) -> None:
    ended = sweep_command(f"model.source={tiny_folder}", "optimizer.lr=1e-2,-1,1e-3", folder=tmp_path)
    assert ended.stdout.count("starting local servers") == 1, ended.stdout + ended.stderr
    assert ended.returncode == 2
    assert "error: optimizer: Invalid learning rate: -1" in ended.stderr
    (table,) = (tmp_path / "outputs" / "sst2").glob("sweep_*/sweep.csv")
    with table.open(newline="") as file:
        rows = {row["optimizer.lr"]: row["metric"] for row in csv.DictReader(file)}
    assert rows == {"0.01": "accuracy", "-1": "failed", "0.001": "accuracy"}
    assert table.with_name("sweep.png").exists()
    assert (table.parent / "2" / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow  # it starts a swarm of its own, as the sweep above does
@pytest.mark.swarm
def test_optuna_chooses_the_jobs(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="an extra: pip install 'petals_tune[optuna]'")
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.direction=maximize"]
    optuna += ["hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    space = "optimizer.lr=tag(log,interval(1e-4,1e-1))"
    ended = sweep_command(f"model.source={tiny_folder}", *optuna, space, folder=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("starting local servers") == 1
    (best,) = (tmp_path / "outputs" / "sst2").glob("sweep_*/optimization_results.yaml")
    (table,) = (tmp_path / "outputs" / "sst2").glob("sweep_*/sweep.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["optimizer.lr"] for row in rows}) == 3
    highest = max(float(row["after"]) for row in rows)
    assert yaml.safe_load(best.read_text())["best_value"] == pytest.approx(highest, abs=1e-4)


def test_a_run_that_a_program_started_ends_with_it() -> None:
    code = "import signal; from petals_tune import __main__ as main; print('here', flush=True); "
    code += "signal.signal(signal.SIGTERM, signal.default_int_handler); main.interrupt_at_end_of_stdin(); print('on')"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == b"here\n"  # type: ignore[union-attr]
        assert process.poll() is None
        _, errors = process.communicate()
        assert b"KeyboardInterrupt" in errors
        assert process.returncode == -signal.SIGINT

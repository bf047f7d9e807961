"""Loggers: metrics.csv in the output folder, and what is handed to W&B and others."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable
from dataclasses import asdict
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from petals_tune.train.result import Result


class MetricsFile(CSVLogger):
    """Lightning's CSV logger, writing `metrics.csv` into the folder itself and nothing beside it."""

    def __init__(self, folder: str | Path):
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)  # for whoever reads while it runs
        self._kept: list[dict[str, Any]] = []

    def keep_rows(self, *, steps: int, validated: bool) -> None:
        """Keep the rows that the file has of the first steps, for a run that goes on from there in this folder.

        A row of a training step has the number of steps before it; a validation's has the number of all, and that after
        the last step is kept where the run goes on from after it (`validated`).
        """
        path = Path(self.log_dir, "metrics.csv")
        if path.exists():
            with path.open(newline="") as file:
                rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
            self._kept = [row for row in rows if int(row["step"]) < steps + (validated and "train/loss" not in row)]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            writer = super().experiment  # deletes the file
            writer.metrics, self._kept = self._kept, []
            writer.save()
        return self._experiment

    @rank_zero_only
    def save(self) -> None:
        super().save()
        # Hyperparameters are in config.yaml; Lightning's file for them would be empty.
        Path(self.log_dir, self.experiment.NAME_HPARAMS_FILE).unlink(missing_ok=True)


def wandb_logger(*, save_dir: str, name: str, project: str, **options: Any) -> WandbLogger:
    """Build Lightning's W&B logger, offline where this machine has no account. WANDB_MODE, if set, has precedence.

    Further options are those of wandb.init.
    """
    mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_account() else "offline")
    settings = wandb.Settings(silent=True, console="off")
    wandb.setup(settings)  # otherwise it warns of an option that Lightning always passes
    return WandbLogger(save_dir=save_dir, name=name, project=project, mode=mode, settings=settings, **options)


def log_config(loggers: Iterable[Logger], cfg: DictConfig) -> None:
    """Log the resolved configuration; not to metrics.csv, which has config.yaml beside it."""
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    for logger in loggers:
        if not isinstance(logger, CSVLogger):
            logger.log_hyperparams(resolved)


def log_results(loggers: Iterable[Logger], output: Path, result: Result) -> None:
    """Log a run's result, its learning curves and the adapter, as an artifact, to W&B."""
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        run = logger.experiment
        run.summary.update({"result": asdict(result)})
        if (output / "curves.png").exists():
            logger.log_image("curves", [str(output / "curves.png")])
        if not (output / "adapter").is_dir():  # not a single step was taken
            continue
        name = re.sub(r"[^\w.-]", "-", result.name)  # characters that W&B allows in a name
        adapter = wandb.Artifact(f"{name}-adapter", type="adapter", metadata=asdict(result))
        # immutable: the output folder keeps the files, so W&B's staging folder needs no copy of them.
        adapter.add_dir(str(output / "adapter"), policy="immutable")
        run.log_artifact(adapter)


def finish_wandb_runs(loggers: Iterable[Logger]) -> None:
    """Finish W&B's runs, so that the next run of this process gets its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def has_wandb_account() -> bool:
    """Whether there is a key in the environment, or in ~/.netrc from `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc().authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False

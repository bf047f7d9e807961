"""Where metrics go: always metrics.csv in the output folder, and to the loggers of the config group `logger`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger


class MetricsFile(CSVLogger):
    """Lightning's CSV logger, writing `metrics.csv` into the folder itself and nothing beside it."""

    def __init__(self, folder: str | Path):
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=10)

    @rank_zero_only
    def save(self) -> None:
        super().save()
        # Hyperparameters are in config.yaml; here they would be an empty file.
        Path(self.log_dir, self.experiment.NAME_HPARAMS_FILE).unlink(missing_ok=True)


def wandb_logger(*, save_dir: str, name: str, project: str, **options: Any) -> WandbLogger:
    """Lightning's W&B logger, offline where this machine has no account. WANDB_MODE, if set, has the last word.

    Further options are those of wandb.init.
    """
    mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_account() else "offline")
    settings = wandb.Settings(silent=True, console="off")
    wandb.setup(settings)  # or it warns of an option that Lightning always passes
    return WandbLogger(save_dir=save_dir, name=name, project=project, mode=mode, settings=settings, **options)


def finish(loggers: Iterable[Logger]) -> None:
    """End W&B runs now, so that another run of this process gets its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def has_wandb_account() -> bool:
    """A key in the environment, or one that `wandb login` left in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc().authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False

"""Everything a run is made of but the model: built, and therefore known to be sound, before a server starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from peft import PeftConfig
from torch import nn
from transformers import AutoTokenizer

from petals_tune.config import build
from petals_tune.data.module import TextData
from petals_tune.errors import ConfigError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.convert import model_folder
from petals_tune.train.loggers import MetricsFile
from petals_tune.train.module import MakeOptimizer, MakeSchedule, check_precision, scheduled
from petals_tune.train.objective import Objective
from petals_tune.train.options import Swarm
from petals_tune.tuning.saved import adapter_folder, base_of, saved_config
from petals_tune.tuning.support import check_config


@dataclass(frozen=True, kw_only=True)
class Parts:
    """See the module. `source` is a folder in Hugging Face format or a hub name, `blocks` how many blocks it has.

    `base` is the name by which `source` was asked for, `adapter` the folder of one to start from.
    """

    base: str
    source: str
    blocks: int
    adapter: Path | None
    data: TextData
    objective: Objective
    tuning: PeftConfig
    optimizer: MakeOptimizer
    schedule: MakeSchedule
    swarm: Swarm
    trainer: Trainer


def prepare(cfg: DictConfig, *, stage: str = "fit") -> Parts:
    """Build what needs no server, the quick parts first; `stage` is what the data is set up for, in Lightning's words.

    Raises ConfigError or DataError.
    """
    swarm: Swarm = build(cfg.swarm, where="swarm")
    optimizer = build(cfg.optimizer, where="optimizer")
    schedule = build(cfg.schedule, where="schedule")
    _try(optimizer, schedule)
    trainer = build_trainer(cfg)
    check_precision(trainer)
    init_from = cfg.tuning.get("init_from")
    adapter = None if init_from is None else adapter_folder(init_from)
    base = cfg.model.source or _base_of(adapter)
    source = model_folder(base)
    blocks = Checkpoint(source).config.get_text_config().num_hidden_layers
    swarm.check(blocks)
    tokenizer = AutoTokenizer.from_pretrained(source)
    objective = build(cfg.objective, where="objective", tokenizer=tokenizer)
    if adapter is None:
        tuning = build(cfg.tuning, where="tuning", tokenizer=tokenizer)
        tuning.task_type = objective.task_type
    else:
        tuning = saved_config(adapter)
    check_config(tuning)
    data = build(cfg.data, where="data", tokenizer=tokenizer)
    data.setup(stage)
    return Parts(
        base=base,
        source=source,
        blocks=blocks,
        adapter=adapter,
        data=data,
        objective=objective,
        tuning=tuning,
        optimizer=optimizer,
        schedule=schedule,
        swarm=swarm,
        trainer=trainer,
    )


def _base_of(adapter: Path | None) -> str:
    if adapter is None:
        raise ConfigError(
            "model=of_adapter takes the base model that an adapter names, and there is no adapter: "
            "give tuning.init_from=FOLDER_OR_HUB_NAME, or another model"
        )
    return base_of(adapter)


def build_trainer(cfg: DictConfig) -> Trainer:
    """A stock Trainer with the callbacks and loggers of the configuration, and metrics.csv."""
    loggers = [build(section, where=f"logger.{name}") for name, section in cfg.logger.items()]
    callbacks = [build(section, where=f"callbacks.{name}") for name, section in cfg.callbacks.items() if section]
    metrics = MetricsFile(Path(cfg.output_dir))
    try:
        return build(cfg.trainer, where="trainer", logger=[metrics, *loggers], callbacks=callbacks)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {error}") from error


def _try(optimizer: MakeOptimizer, schedule: MakeSchedule) -> None:
    """Lightning makes these in the middle of a fit; bad options should be known before."""
    try:
        made = optimizer([nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {error}") from error
    try:
        scheduled(schedule, made, 1)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"schedule: {error}") from error

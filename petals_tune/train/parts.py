"""The parts of a run but for the model, built and checked before a server starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from peft import PeftConfig
from transformers import AutoTokenizer

from petals_tune.config import build
from petals_tune.data.module import TextData
from petals_tune.errors import ConfigError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.convert import model_folder
from petals_tune.train.checks import (
    check_batches,
    check_callbacks,
    check_end,
    check_optimizer,
    check_trainer,
    check_tuning,
)
from petals_tune.train.loggers import MetricsFile
from petals_tune.train.module import OptimizerFactory, ScheduleFactory, check_precision
from petals_tune.train.objective import Objective
from petals_tune.train.options import Swarm
from petals_tune.tuning.saved import adapter_folder, base_of, saved_config
from petals_tune.tuning.support import check_config


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What `prepare` builds from a configuration."""

    base: str  # the base model, as the configuration names it
    source: str  # its folder in Hugging Face format, or its name on the hub
    blocks: int  # how many it has
    adapter: Path | None  # folder of an adapter to start from
    data: TextData
    objective: Objective
    tuning: PeftConfig
    optimizer: OptimizerFactory
    schedule: ScheduleFactory
    swarm: Swarm
    trainer: Trainer


def prepare(cfg: DictConfig, *, stage: str = "fit") -> Parts:
    """Build the parts, the quick ones first, and read the data that `stage` (of Lightning) needs.

    Raises ConfigError or DataError.
    """
    swarm: Swarm = build(cfg.swarm, where="swarm")
    optimizer = build(cfg.optimizer, where="optimizer")
    schedule = build(cfg.schedule, where="schedule")
    trainer = build_trainer(cfg)
    check_trainer(trainer)
    check_precision(trainer)
    check_end(trainer)
    check_optimizer(optimizer, schedule, trainer)
    init_from = cfg.tuning.get("init_from")
    adapter = None if init_from is None else adapter_folder(init_from)
    base = cfg.model.source or _base_model_of(adapter)
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
    check_callbacks(trainer, objective)
    if stage == "fit":
        check_batches(trainer, data)
    if adapter is None:
        check_tuning(tuning, source, objective)
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


def _base_model_of(adapter: Path | None) -> str:
    if adapter is None:
        raise ConfigError(
            "model=of_adapter takes the base model that an adapter names, and there is no adapter: "
            "give tuning.init_from=FOLDER_OR_HUB_NAME, or another model",
            key="tuning.init_from",
        )
    return base_of(adapter)


def build_trainer(cfg: DictConfig) -> Trainer:
    """Build a stock Trainer with the callbacks and loggers of the configuration, and metrics.csv."""
    loggers = [build(section, where=f"logger.{name}") for name, section in cfg.logger.items()]
    callbacks = [build(section, where=f"callbacks.{name}") for name, section in cfg.callbacks.items() if section]
    metrics = MetricsFile(Path(cfg.output_dir))
    try:
        return build(cfg.trainer, where="trainer", logger=[metrics, *loggers], callbacks=callbacks)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {error}", key="trainer") from error

"""Checks of a run before a server starts: what Lightning, torch or PEFT would refuse in the middle of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from lightning import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from peft import PeftConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from petals_tune.data.module import TextData
from petals_tune.errors import ConfigError, PetalsTuneError
from petals_tune.hydra_errors import first_line
from petals_tune.train.module import advance, build_schedule, time_limit
from petals_tune.train.objective import ClassHead, Objective
from petals_tune.tuning.support import tune

_MOST_STEPS = 100_000  # of a schedule that are tried: a second

# Attributes of a Trainer and their least values, where Lightning would divide by zero or ignore the value.
_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
}


def check_trainer(trainer: Trainer) -> None:
    """Raise ConfigError for values that the Trainer takes and cannot work with, or ignores."""
    for name, least in _LEAST.items():
        value = getattr(trainer, name)
        if value is not None and not value >= least:
            raise ConfigError(
                f"trainer.{name} is {value}: it must be {least} or more", key=f"trainer.{name}", seen=value
            )
    interval = getattr(trainer, "val_check_interval", None)  # not there where it is a time
    if interval is not None and not interval > 0:
        raise _refused("val_check_interval", interval, "it must be more than 0")
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy) or _is_spawned(trainer):
        name = getattr(trainer.strategy, "strategy_name", None) or type(trainer.strategy).__name__
        raise _refused("strategy", name, "with remote blocks auto and ddp work")
    if trainer.num_nodes > 1:
        raise _refused("num_nodes", trainer.num_nodes, "processes of one machine can train together, trainer.devices=N")


def check_device(accelerator: str, precision: str | int | None) -> None:
    """Raise ConfigError for a GPU that is not here, and for float16 on a CPU, where Lightning would take bfloat16."""
    found = {"cuda": CUDAAccelerator.is_available(), "mps": MPSAccelerator.is_available()}
    has_gpu = any(found.values())
    if not {"gpu": has_gpu, **found}.get(accelerator, True):
        raise _refused("accelerator", accelerator, f"torch {torch.__version__} finds no such device here; cpu works")
    if str(precision) in ("16", "16-mixed") and (accelerator == "cpu" or (accelerator == "auto" and not has_gpu)):
        raise _refused(
            "precision", precision, "float16 is for a GPU, trainer.accelerator=gpu; a CPU takes bf16-mixed or 32-true"
        )


def check_end(trainer: Trainer, *, steps_done: int = 0) -> None:
    """Raise ConfigError where a run would take no step, or never end."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if steps == 0 or epochs == 0:
        raise _refused("max_steps" if steps == 0 else "max_epochs", 0, "the run would not train; take 1 or more")
    if steps == -1 and epochs == -1 and time_limit(trainer) is None:
        raise _refused("max_steps", -1, "the run would never end: set it, trainer.max_epochs or trainer.max_time")
    if steps != -1 and steps_done >= steps:
        raise _refused(
            "max_steps", steps, f"the checkpoint of ckpt_path is at step {steps_done}: give more steps to go on from it"
        )


def check_batches(trainer: Trainer, data: TextData) -> None:
    """Raise ConfigError where the Trainer's limits leave no batch of an epoch, or no validation in it."""
    training = _limit(trainer, "limit_train_batches", len(data.train_split.rows), data)
    _limit(trainer, "limit_val_batches", len(data.validation_split.rows), data)
    interval = getattr(trainer, "val_check_interval", None)  # not there where it is a time
    if type(interval) is int and interval > training and trainer.check_val_every_n_epoch is not None:
        raise _refused(
            "val_check_interval",
            interval,
            f"an epoch has {training} batches; to count batches over all epochs, add "
            "trainer.check_val_every_n_epoch=null",
        )


def check_callbacks(trainer: Trainer, objective: Objective) -> None:
    """Raise ConfigError where a callback waits for a metric that no validation of the objective has, or cannot work."""
    known = sorted(f"val/{name}" for name in objective.summary({"loss": 1.0, objective.headline: 1.0}))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it
        if isinstance(callback, StochasticWeightAveraging):
            raise ConfigError(
                "StochasticWeightAveraging copies the whole model, and a server's blocks have no copy here",
                key="callbacks",
                seen=type(callback),
            )
        monitor = getattr(callback, "monitor", None)
        if monitor is None or monitor in known or monitor.startswith(("train/", "swarm/")):
            continue
        if monitor.startswith("val/") and not type(objective).__module__.startswith("petals_tune."):
            continue  # an objective of somebody's own may have other metrics
        raise ConfigError(
            f"the callback {type(callback).__name__} monitors {monitor!r}: a validation has {', '.join(known)}",
            key="callbacks",
            seen=monitor,
        )


def check_optimizer(
    optimizer: Callable[..., Optimizer], schedule: Callable[..., LRScheduler], trainer: Trainer
) -> None:
    """Take a step of the optimizer, and all of the schedule, on a tensor without a meaning. Raises ConfigError."""
    # Matrices, since some optimizers take nothing else.
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.zeros(2, 2)
    try:
        built = optimizer([parameter])
        built.step(lambda: 0.0)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer: {first_line(error)}", key="optimizer") from error
    if any(not math.isfinite(group["lr"]) for group in built.param_groups):
        raise ConfigError("optimizer.lr is not a finite number", key="optimizer.lr", seen=built.param_groups[0]["lr"])
    steps = trainer.max_steps if trainer.max_steps > 0 else None if trainer.max_epochs == -1 else 1
    try:
        made = build_schedule(schedule, built, steps)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        hint = (
            "; without trainer.max_steps its length is not known: set it, or take schedule=constant"
            if steps is None
            else ""
        )
        raise ConfigError(f"schedule: {first_line(error)}{hint}", key="schedule") from error
    if isinstance(made, ReduceLROnPlateau):
        raise ConfigError("schedule: one that waits for a metric is not supported", key="schedule", seen=type(made))
    try:
        advance(made, min(steps or 1, _MOST_STEPS))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"schedule: {first_line(error)}", key="schedule") from error


def check_tuning(config: PeftConfig, base: PretrainedConfig, objective: Objective) -> None:
    """Let PEFT wrap a model without weights. Raises ConfigError where it refuses, such as for unknown modules."""
    if getattr(config, "num_virtual_tokens", 1) == 0:
        raise ConfigError("tuning: a prompt of 0 tokens trains nothing", key="tuning.num_virtual_tokens", seen=0)
    # PEFT draws initial values: those of the run must not depend on this.
    with torch.random.fork_rng(devices=()):
        model = _empty_model(base, objective)
        _try_tuning(model, copy.deepcopy(config))


def _try_tuning(model: PreTrainedModel, config: PeftConfig) -> None:
    try:
        tune(model, config)
    except PetalsTuneError:
        raise
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
        raise ConfigError(f"tuning: {first_line(error)}", key="tuning") from error


def _empty_model(base: PretrainedConfig, objective: Objective) -> PreTrainedModel:
    """Return the model of an objective on torch's meta device: all modules and shapes, and no values."""
    config = copy.deepcopy(base)
    with torch.device("meta"):
        if isinstance(objective, ClassHead):
            config.num_labels = len(objective.words)
            return AutoModelForSequenceClassification.from_config(config)
        return AutoModelForCausalLM.from_config(config)


def _limit(trainer: Trainer, name: str, rows: int, data: TextData) -> int:
    """Return the batches of an epoch within a limit of the Trainer. Raises ConfigError where there are none."""
    batches, limit = math.ceil(rows / (data.batch_size * trainer.world_size)), getattr(trainer, name)
    within = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if not within:
        raise _refused(name, limit, f"that leaves none of {batches} batches, and a run needs one")
    return within


def _is_spawned(trainer: Trainer) -> bool:
    return getattr(trainer.strategy, "_start_method", "popen") != "popen"


def _refused(name: str, seen: object, why: str) -> ConfigError:
    return ConfigError(f"trainer.{name} is {seen}: {why}", key=f"trainer.{name}", seen=seen)

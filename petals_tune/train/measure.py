"""The metrics of an adapter, without training it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning import Trainer, seed_everything
from omegaconf import DictConfig
from torchdata.stateful_dataloader import StatefulDataLoader

from petals_tune.config import Run, check
from petals_tune.data.module import TextData
from petals_tune.data.rows import Row
from petals_tune.train.module import FineTuner
from petals_tune.train.parts import prepare
from petals_tune.train.quiet import quiet
from petals_tune.train.result import shown
from petals_tune.train.run import Connect, interrupts_raised, named, remote_model, say
from petals_tune.tuning.saved import load_adapter

Split = Literal["training", "validation", "test"]

STAGES: dict[Split, str] = {"training": "fit", "validation": "validate", "test": "test"}  # in Lightning's words


def measured(
    cfg: DictConfig, connect: Connect = remote_model, *, schema: type[Run] = Run
) -> dict[str, dict[str, float]]:
    """The metrics of `tuning.init_from` on `cfg.split`: `adapter`, and `base` for the model alone with `zero_shot`.

    Raises ConfigError before any server is started.
    """
    quiet()
    check(cfg, schema=schema)
    seed_everything(cfg.seed, verbose=False)
    parts = prepare(cfg, stage=STAGES[cfg.split])
    assert parts.adapter is not None  # evaluate.yaml sets it
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
    rows, loader = rows_and_loader(parts.data, cfg.split)
    say(f"model     {named(parts.base)}, {parts.blocks} blocks, with the adapter {parts.adapter}")
    say(f"data      {parts.data.source.description}; {len(rows):,} rows of the {cfg.split} split")
    metrics = {}
    with connect(parts) as model:
        if cfg.zero_shot:
            tuner = FineTuner(model, parts.objective, parts.optimizer)
            metrics["base"] = validated(parts.trainer, tuner, loader)
            say(f"base      {shown(metrics['base'])}")
        tuner = FineTuner(load_adapter(model, parts.adapter), parts.objective, parts.optimizer)
        metrics["adapter"] = validated(parts.trainer, tuner, loader)
        say(f"adapter   {shown(metrics['adapter'])}")
    return metrics


def rows_and_loader(data: TextData, split: Split) -> tuple[list[Row], StatefulDataLoader]:
    match split:
        case "training":
            return data.train_split.rows, data.train_dataloader()
        case "validation":
            return data.validation_split.rows, data.val_dataloader()
        case "test":
            return data.test_split.rows, data.test_dataloader()


def validated(trainer: Trainer, tuner: FineTuner, loader: StatefulDataLoader) -> dict[str, float]:
    with interrupts_raised(trainer):
        trainer.validate(tuner, loader, verbose=False)
    return tuner.summaries["val"][1]

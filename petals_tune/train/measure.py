"""Evaluation of an adapter without training it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning import Trainer, seed_everything
from omegaconf import DictConfig
from torchdata.stateful_dataloader import StatefulDataLoader

from petals_tune.config import Run, check
from petals_tune.data.encoding import EncodedSplit
from petals_tune.data.module import TextData
from petals_tune.train.backbone import describe_block_location
from petals_tune.train.module import FineTuner
from petals_tune.train.parts import prepare
from petals_tune.train.quiet import silence_known_warnings
from petals_tune.train.result import format_metrics
from petals_tune.train.run import Connect, display_name, raise_interrupts, remote_model, say
from petals_tune.tuning.saved import load_adapter

Split = Literal["training", "validation", "test"]

STAGES: dict[Split, str] = {"training": "fit", "validation": "validate", "test": "test"}  # Lightning's names


def evaluate_adapter(cfg: DictConfig, connect: Connect = remote_model, *, schema: type[Run] = Run) -> dict[str, Any]:
    """Compute the metrics of the adapter `tuning.init_from` on `cfg.split`.

    Returns them as `adapter`, and with `cfg.zero_shot` those of the model alone as `base`; as `rows` what became of the
    rows in the data, as `data_digest` the SHA-256 of the data, and as `blocks` where and how the blocks ran.

    Raises ConfigError before any server is started.
    """
    silence_known_warnings()
    check(cfg, schema=schema)
    seed_everything(cfg.seed, verbose=False)
    parts = prepare(cfg, stage=STAGES[cfg.split])
    assert parts.adapter is not None  # evaluate.yaml sets it
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
    split, loader = load_split(parts.data, cfg.split)
    say(f"model     {display_name(parts.base)}, {parts.blocks} blocks, with the adapter {parts.adapter}")
    say(f"data      {parts.data.source.description}; {len(split.rows):,} rows of the {cfg.split} split")
    say(f"          {split.format_counts(cfg.split)}")
    if parts.asked:
        say(f"asked     {parts.asked}")
    metrics: dict[str, Any] = {}
    with connect(parts) as model:
        blocks = describe_block_location(model)
        if parts.trained is not None and parts.trained.blocks not in ("", blocks):
            say(f"blocks    {blocks}; the adapter was trained with blocks {parts.trained.blocks}")
        if cfg.zero_shot:
            tuner = FineTuner(model, parts.objective, parts.optimizer)
            metrics["base"] = validate(parts.trainer, tuner, loader)
            say(f"base      {format_metrics(metrics['base'])}")
        tuner = FineTuner(load_adapter(model, parts.adapter), parts.objective, parts.optimizer)
        metrics["adapter"] = validate(parts.trainer, tuner, loader)
        say(f"adapter   {format_metrics(metrics['adapter'])}")
    return {**metrics, "blocks": blocks, "rows": split.counts(), "data_digest": parts.data.digest}


def load_split(data: TextData, split: Split) -> tuple[EncodedSplit, StatefulDataLoader]:
    """Return the encoded rows and the loader of a split."""
    match split:
        case "training":
            return data.train_split, data.train_dataloader()
        case "validation":
            return data.validation_split, data.val_dataloader()
        case "test":
            return data.test_split, data.test_dataloader()


def validate(trainer: Trainer, tuner: FineTuner, loader: StatefulDataLoader) -> dict[str, float]:
    with raise_interrupts(trainer):
        trainer.validate(tuner, loader, verbose=False)
    return tuner.summaries["val"][1]

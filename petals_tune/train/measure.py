"""The metrics of an adapter, without training it."""

from __future__ import annotations

from pathlib import Path

from lightning import seed_everything
from omegaconf import DictConfig

from petals_tune.config import Run, check
from petals_tune.train.module import FineTuner
from petals_tune.train.parts import Parts, prepare
from petals_tune.train.quiet import quiet
from petals_tune.train.result import shown
from petals_tune.train.run import Connect, interrupts_raised, named, remote_model, say
from petals_tune.tuning.saved import load_adapter


def measured(
    cfg: DictConfig, connect: Connect = remote_model, *, schema: type[Run] = Run
) -> dict[str, dict[str, float]]:
    """The metrics of `tuning.init_from` on `cfg.split`: `adapter`, and `base` for the model alone with `zero_shot`.

    Raises ConfigError before any server is started.
    """
    quiet()
    check(cfg, schema=schema)
    seed_everything(cfg.seed, verbose=False)
    training = cfg.split == "training"
    parts = prepare(cfg, stage="fit" if training else "validate")
    assert parts.adapter is not None  # evaluate.yaml sets it
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
    rows = len((parts.data.train_split if training else parts.data.validation_split).rows)
    say(f"model     {named(parts.base)}, {parts.blocks} blocks, with the adapter {parts.adapter}")
    say(f"data      {parts.data.source.description}; {rows:,} rows of the {cfg.split} split")
    metrics = {}
    with connect(parts) as model:
        if cfg.zero_shot:
            tuner = FineTuner(model, parts.objective, parts.optimizer)
            metrics["base"] = _validated(parts, tuner, training=training)
            say(f"base      {shown(metrics['base'])}")
        tuner = FineTuner(load_adapter(model, parts.adapter), parts.objective, parts.optimizer)
        metrics["adapter"] = _validated(parts, tuner, training=training)
        say(f"adapter   {shown(metrics['adapter'])}")
    return metrics


def _validated(parts: Parts, tuner: FineTuner, *, training: bool) -> dict[str, float]:
    loader = parts.data.train_dataloader() if training else parts.data.val_dataloader()
    with interrupts_raised(parts.trainer):
        parts.trainer.validate(tuner, loader, verbose=False)
    return tuner.summaries["val"][1]

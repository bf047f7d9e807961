"""One run, from its configuration to what it leaves: parts, swarm, model, adapter, fit, export."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from lightning import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel, TaskType
from transformers import PreTrainedModel

from petals_tune.config import check
from petals_tune.files import write_text
from petals_tune.model.convert import EMBEDDED, EMBEDDED_NAME
from petals_tune.remote.auto import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from petals_tune.train.backbone import coverage, remote_blocks, swarm_stats, where_blocks_run
from petals_tune.train.callbacks import MB, Speed
from petals_tune.train.curves import draw_curves
from petals_tune.train.export import export_adapter, method
from petals_tune.train.loggers import finish, publish, tell_config
from petals_tune.train.module import FineTuner
from petals_tune.train.objective import load_model
from petals_tune.train.parts import Parts, prepare
from petals_tune.train.quiet import quiet
from petals_tune.train.result import Measured, Result, shown
from petals_tune.tuning.saved import load_adapter
from petals_tune.tuning.support import tune

Connect = Callable[[Parts], AbstractContextManager[PreTrainedModel]]


@contextmanager
def remote_model(parts: Parts) -> Iterator[PreTrainedModel]:
    """The model over its swarm. The connection and a local swarm end with the block, however it ends."""
    say(f"swarm     {parts.swarm.opening(parts.blocks)} ...")
    with parts.swarm.opened(parts.source, parts.blocks) as peers, joined(parts, peers) as model:
        yield model


@contextmanager
def joined(parts: Parts, peers: list[str]) -> Iterator[PreTrainedModel]:
    """The model over the swarm of `peers`; the connection ends with the block."""
    started_s = time.monotonic()
    model = load_model(
        parts.objective,
        parts.source,
        causal_lm=AutoDistributedModelForCausalLM,
        classifier=AutoDistributedModelForSequenceClassification,
        initial_peers=peers,
        **parts.swarm.client_options(),
    )
    try:
        say(f"connected in {time.monotonic() - started_s:.1f} s; {coverage(model)}")
        yield model
    finally:
        remote_blocks(model).close()


def run(cfg: DictConfig, connect: Connect = remote_model) -> Measured:
    """Tune as `cfg` says; returns the metrics `before` and `after`, and `zero_shot` where it was asked for.

    Leaves in cfg.output_dir: config.yaml, metrics.csv, checkpoint.ckpt (the trained tensors alone), adapter/ in PEFT's
    format, curves.png, result.json, and what callbacks and loggers write. Raises ConfigError before any server is
    started.
    """
    started_s = time.monotonic()
    quiet()
    check(cfg)
    seed_everything(cfg.seed, verbose=False)
    parts = prepare(cfg)
    output = Path(cfg.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if parts.trainer.is_global_zero:
        write_text(output / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    tell_config(parts.trainer.loggers, cfg)
    say(f"model     {named(parts.base)}, {parts.blocks} blocks\n{parts.data.description}\n{parts.data.summary()}\n")

    result = Result(
        name=cfg.name,
        base=parts.base,
        data=parts.data.description,
        headline=parts.objective.headline,
        seed=cfg.seed,
        started_from=cfg.tuning.get("init_from"),
    )
    try:
        with connect(parts) as model:
            result.blocks = where_blocks_run(model)
            if cfg.zero_shot:
                measure(parts, FineTuner(model, parts.objective, parts.optimizer), "zero_shot", into=result.measured)
            net = load_adapter(model, parts.adapter, trainable=True) if parts.adapter else tune(model, parts.tuning)
            result.trained_parameters, result.parameters = net.get_nb_trainable_parameters()
            say(f"trains    {result.trained_share}: {method(net.peft_config[net.active_adapter])[0]}")
            tuner = FineTuner(net, parts.objective, parts.optimizer, parts.schedule)
            try:
                fit(parts, tuner, result, ckpt_path=cfg.ckpt_path)
            finally:
                # Also on Ctrl-C and when the swarm is gone: what was trained is on this machine.
                add_figures(result, parts.trainer, net, minutes=(time.monotonic() - started_s) / 60)
                if parts.trainer.global_step and parts.trainer.is_global_zero:
                    export(parts.trainer, tuner, output, result)
                    say(
                        f"saved     step {result.steps} in {output}\n"
                        f"          to go on from it: ckpt_path={output}/checkpoint.ckpt"
                    )
                    if parts.objective.task_type == TaskType.CAUSAL_LM:
                        say(f"          to talk to it: python -m petals_tune.chat adapter={output}/adapter")
        if parts.trainer.is_global_zero:
            result.save(output)
            publish(parts.trainer.loggers, output, result)
    finally:
        finish(parts.trainer.loggers)
    say(f"{result.said()}; all of it is in {output}")
    return result.measured


def fit(parts: Parts, tuner: FineTuner, result: Result, *, ckpt_path: str | None) -> None:
    """Validate, fit, validate."""
    measure(parts, tuner, "before", into=result.measured)
    with interrupts_raised(parts.trainer):
        parts.trainer.fit(tuner, datamodule=parts.data, ckpt_path=ckpt_path)
    step, summary = tuner.summaries["val"]
    measure(parts, tuner, "after", into=result.measured, known=summary if step == parts.trainer.global_step else None)


def measure(
    parts: Parts, tuner: FineTuner, when: str, *, into: Measured, known: dict[str, float] | None = None
) -> None:
    """Put the metrics of the whole validation split into `into[when]`, and print them as soon as they are known."""
    if known is None:
        rows = len(parts.data.validation_split.rows)
        say(f"{when:<10}measuring {rows} validation rows ...")
        with tuner.validating_as(when if when == "zero_shot" else "val"), interrupts_raised(parts.trainer):
            parts.trainer.validate(tuner, datamodule=parts.data, verbose=False)
            known = tuner.summaries[tuner.split][1]
    into[when] = known
    say(f"{when:<10}{shown(known)}")


def add_figures(result: Result, trainer: Trainer, net: PeftModel, *, minutes: float) -> None:
    """What the run took so far."""
    stats = swarm_stats(net)
    result.steps, result.minutes = trainer.global_step, minutes
    result.sent_mb, result.received_mb, result.retries = stats.sent_bytes / MB, stats.received_bytes / MB, stats.retries
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it
        if isinstance(callback, Speed):
            result.tokens_per_s = callback.tokens_per_s


@contextmanager
def interrupts_raised(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C inside Lightning leaves as KeyboardInterrupt, not as its sys.exit(1) with SIGINT ignored from then on."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def export(trainer: Trainer, tuner: FineTuner, output: Path, result: Result) -> None:
    """Leave the adapter and the curves."""
    export_adapter(tuner.net, output / "adapter", result)
    metrics = output / "metrics.csv"
    if metrics.exists():  # a fast_dev_run has none
        draw_curves(metrics, output / "curves.png", title=result.name)


def named(base: str) -> str:
    return f"{EMBEDDED_NAME} ({EMBEDDED})" if base == EMBEDDED else base


def say(text: str) -> None:
    """A line of a run's story: at once, whoever reads it, a terminal or a file."""
    print(text, flush=True)

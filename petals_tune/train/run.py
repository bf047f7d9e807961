"""One run, from its configuration to what it leaves: parts, swarm, model, adapter, fit, export."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from lightning import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import PreTrainedModel

from petals_tune.config import check
from petals_tune.files import write_text
from petals_tune.remote.auto import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from petals_tune.train.backbone import remote_blocks, swarm_stats, without_adapter
from petals_tune.train.callbacks import MB
from petals_tune.train.curves import draw_curves
from petals_tune.train.export import export_adapter
from petals_tune.train.loggers import finish
from petals_tune.train.module import FineTuner
from petals_tune.train.objective import load_model
from petals_tune.train.parts import Parts, prepare
from petals_tune.train.quiet import quiet
from petals_tune.tuning.support import tune

Connect = Callable[[Parts], AbstractContextManager[PreTrainedModel]]


@contextmanager
def remote_model(parts: Parts) -> Iterator[PreTrainedModel]:
    """The model over its swarm. The connection and a local swarm end with the block, however it ends."""
    with parts.swarm.opened(parts.source, parts.blocks) as peers:
        model = load_model(
            parts.objective,
            parts.source,
            causal_lm=AutoDistributedModelForCausalLM,
            classifier=AutoDistributedModelForSequenceClassification,
            initial_peers=peers,
            **parts.swarm.client_options(),
        )
        try:
            yield model
        finally:
            remote_blocks(model).close()


def run(cfg: DictConfig, connect: Connect = remote_model) -> dict[str, dict[str, float]]:
    """Tune as `cfg` says; returns the metrics `before` and `after`, and `zero_shot` where it was asked for.

    Leaves in cfg.output_dir: config.yaml, metrics.csv, checkpoint.ckpt (the trained tensors alone), adapter/ in PEFT's
    format, curves.png, and what callbacks and loggers write. Raises ConfigError before any server is started.
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
    print(f"{parts.data.description}\n{parts.data.summary()}\n", flush=True)

    with connect(parts) as model:
        net = tune(model, parts.tuning)
        tuner = FineTuner(net, parts.objective, parts.optimizer, parts.schedule)
        print(f"trains {trained_share(net)}", flush=True)
        try:
            measured = measure_and_fit(parts, tuner, zero_shot=cfg.zero_shot, ckpt_path=cfg.ckpt_path)
        finally:
            # Also on Ctrl-C and when the swarm is gone: what was trained is on this machine.
            if parts.trainer.global_step and parts.trainer.is_global_zero:
                export(parts.trainer, tuner, output, base=cfg.model.source, title=cfg.name)
                print(f"saved step {parts.trainer.global_step}; to go on from it: ckpt_path={output}/checkpoint.ckpt")
            finish(parts.trainer.loggers)
    stats = swarm_stats(net)
    print(
        f"{learned(measured, parts.objective.headline)} in {(time.monotonic() - started_s) / 60:.1f} min; "
        f"sent {stats.sent_bytes / MB:.0f} MB, received {stats.received_bytes / MB:.0f} MB; "
        f"trained {trained_share(net)}; all of it is in {output}"
    )
    return measured


def measure_and_fit(
    parts: Parts, tuner: FineTuner, *, zero_shot: bool, ckpt_path: str | None
) -> dict[str, dict[str, float]]:
    """Validate, fit, validate. Every measurement is printed as soon as it is known."""
    measured = {}

    def measure(name: str, summary: dict[str, float]) -> None:
        measured[name] = summary
        print(f"{name:<10}{said(summary)}", flush=True)

    if zero_shot:
        with without_adapter(tuner.net), tuner.validating_as("zero_shot"):
            measure("zero_shot", validated(parts, tuner))
    measure("before", validated(parts, tuner))
    with interrupts_raised(parts.trainer):
        parts.trainer.fit(tuner, datamodule=parts.data, ckpt_path=ckpt_path)
    step, summary = tuner.summaries["val"]
    measure("after", summary if step == parts.trainer.global_step else validated(parts, tuner))
    return measured


def validated(parts: Parts, tuner: FineTuner) -> dict[str, float]:
    """The metrics of the whole validation split, now."""
    with interrupts_raised(parts.trainer):
        parts.trainer.validate(tuner, datamodule=parts.data, verbose=False)
    return tuner.summaries[tuner.split][1]


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


def export(trainer: Trainer, tuner: FineTuner, output: Path, *, base: str, title: str) -> None:
    """Leave the adapter and the curves."""
    export_adapter(tuner.net, output / "adapter", base=base)
    metrics = output / "metrics.csv"
    if metrics.exists():  # a fast_dev_run has none
        draw_curves(metrics, output / "curves.png", title=title)


def trained_share(net: PeftModel) -> str:
    trained, total = net.get_nb_trainable_parameters()
    return f"{trained:,} of {total:,} parameters"


def said(summary: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in summary.items())


def learned(measured: dict[str, dict[str, float]], headline: str) -> str:
    """The headline metric and the loss, before -> after; zero-shot where it was measured."""
    before, after = measured["before"], measured["after"]
    parts = [f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in (headline, "loss")]
    if "zero_shot" in measured:
        parts.append(f"zero-shot {headline} {measured['zero_shot'][headline]:.3f}")
    return ", ".join(parts)

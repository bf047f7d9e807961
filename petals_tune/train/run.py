"""One run: prepare the parts, open the swarm, load the model, tune it, export the adapter."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from lightning import Callback, Trainer, seed_everything
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel, TaskType
from transformers import PreTrainedModel

from petals_tune.config import check
from petals_tune.errors import ConfigError
from petals_tune.files import make_folder, write_text
from petals_tune.model.convert import EMBEDDED, EMBEDDED_NAME
from petals_tune.remote.auto import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from petals_tune.train.backbone import describe_block_location, describe_swarm, remote_blocks, swarm_stats
from petals_tune.train.callbacks import MB, NewestCheckpoint, Speed
from petals_tune.train.checks import check_end
from petals_tune.train.curves import draw_curves
from petals_tune.train.export import describe_method, export_adapter, identity_of
from petals_tune.train.identity import RowOrder, RunIdentity, RunRecord, SavedRun
from petals_tune.train.loggers import MetricsFile, finish_wandb_runs, log_config, log_results
from petals_tune.train.module import FineTuner
from petals_tune.train.objective import load_model
from petals_tune.train.options import open_swarm
from petals_tune.train.parts import Parts, prepare
from petals_tune.train.quiet import silence_known_warnings
from petals_tune.train.result import Result, StageMetrics, format_metrics
from petals_tune.tuning.identity import Identity
from petals_tune.tuning.saved import load_adapter
from petals_tune.tuning.support import tune

CONFIG_FILE = "config.yaml"  # in the output folder of a run

Connect = Callable[[Parts], AbstractContextManager[PreTrainedModel]]


@contextmanager
def remote_model(parts: Parts) -> Iterator[PreTrainedModel]:
    """Open the swarm and load the model over it; the end of the block closes the connection and a local swarm."""
    say(f"swarm     {parts.swarm.describe_opening(parts.blocks)} ...")
    opening = open_swarm(parts.swarm, parts.source, parts.blocks, parts.revision)
    with opening as peers, connected_model(parts, peers) as model:
        yield model


@contextmanager
def connected_model(parts: Parts, peers: list[str]) -> Iterator[PreTrainedModel]:
    """Load the model over the swarm of `peers`; the connection is closed at the end of the block."""
    started_s = time.monotonic()
    model = load_model(
        parts.objective,
        parts.source,
        causal_lm=AutoDistributedModelForCausalLM,
        classifier=AutoDistributedModelForSequenceClassification,
        revision=parts.revision,
        initial_peers=peers,
        **parts.swarm.client_options(),
    )
    try:
        say(f"connected in {time.monotonic() - started_s:.1f} s; {describe_swarm(model)}")
        yield model
    finally:
        remote_blocks(model).close()


def run(cfg: DictConfig, connect: Connect = remote_model) -> StageMetrics:
    """Tune as `cfg` says; returns the metrics `before` and `after` training, and `zero_shot` with `cfg.zero_shot`.

    Writes into cfg.output_dir: config.yaml with the data's digest, metrics.csv, checkpoint.ckpt (the trained parameters
    alone), adapter/ in PEFT's format, curves.png, result.json, and what callbacks and loggers write. Raises ConfigError
    before any server is started.
    """
    started_s = time.monotonic()
    silence_known_warnings()
    check(cfg)
    saved = SavedRun.load(cfg.ckpt_path, name=cfg.name) if cfg.ckpt_path else None
    output = Path(cfg.output_dir)
    check_output(output, saved)
    seed_everything(cfg.seed, verbose=False)
    parts = prepare(cfg)
    check_end(parts.trainer, steps_done=saved.step if saved else 0)
    identity = identity_of(parts)
    run_identity, order = RunIdentity.of(parts, cfg, identity.base), RowOrder.of(parts)
    if saved:
        run_identity.check(saved.identity, saved.path)
    make_folder(output)
    cfg = cfg.copy()
    OmegaConf.update(cfg, "data.digest", parts.data.digest, force_add=True)  # a run of this file needs the same data
    if parts.trainer.is_global_zero:
        write_text(output / CONFIG_FILE, OmegaConf.to_yaml(cfg, resolve=True))
    log_config(parts.trainer.loggers, cfg)
    say(
        f"model     {display_name(parts.base)}, {parts.blocks} blocks\n"
        f"{parts.data.description}\n{parts.data.summary()}\n"
    )

    result = Result(
        name=cfg.name,
        base=parts.base,
        data=parts.data.description,
        headline=parts.objective.headline,
        seed=cfg.seed,
        data_digest=parts.data.digest,
        rows=parts.data.counts(),
        started_from=cfg.tuning.get("init_from"),
    )
    record = RunRecord(identity=run_identity, order=order, data=parts.data)
    parts.trainer.callbacks.insert(0, record)  # type: ignore[attr-defined]  # before the one that saves checkpoints
    if saved:
        resume(saved, parts, record, result)
    try:
        with connect(parts) as model:
            result.blocks = describe_block_location(model)
            if cfg.zero_shot and "zero_shot" not in result.measured:
                measure(parts, FineTuner(model, parts.objective, parts.optimizer), "zero_shot", into=result.measured)
            net = load_adapter(model, parts.adapter, trainable=True) if parts.adapter else tune(model, parts.tuning)
            result.trained_parameters, result.parameters = net.get_nb_trainable_parameters()
            say(f"trains    {result.trained_share}: {describe_method(net.peft_config[net.active_adapter])[0]}")
            tuner = FineTuner(net, parts.objective, parts.optimizer, parts.schedule)
            record.update = partial(add_figures, result, parts.trainer, net, started_s=started_s, saved=saved)
            try:
                fit(parts, tuner, result, ckpt_path=saved.path if saved else None)
            finally:
                # Also after Ctrl-C or the loss of the swarm: the trained parameters are on this machine.
                record.update()
                if parts.trainer.global_step and parts.trainer.is_global_zero:
                    result.exported = tuner.exported.describe()
                    export(tuner, output, result, identity)
                    say(f"saved     {result.exported}, in {output}")
                    for path in saved_checkpoints(parts.trainer):
                        say(f"          to go on from it: ckpt_path={path}")
                    if parts.objective.task_type == TaskType.CAUSAL_LM:
                        say(f"          to talk to it: python -m petals_tune.chat adapter={output}/adapter")
        if parts.trainer.is_global_zero:
            result.save(output)
            log_results(parts.trainer.loggers, output, result)
    finally:
        finish_wandb_runs(parts.trainer.loggers)
    say(f"{result.format_summary()}; all of it is in {output}")
    return result.measured


def check_output(output: Path, saved: SavedRun | None) -> None:
    """Raise ConfigError where the folder has another run already; a run may go on in its own."""
    goes_on = saved is not None and saved.path.resolve().is_relative_to(output.resolve())
    if (output / CONFIG_FILE).exists() and not goes_on and not getattr(rank_zero_only, "rank", 0):
        raise ConfigError(
            f"{output} has a run already: take another folder, or go on with that run, "
            f"ckpt_path={output / 'checkpoint.ckpt'}",
            key="output_dir",
            seen=str(output),
        )


def resume(saved: SavedRun, parts: Parts, record: RunRecord, result: Result) -> None:
    """Prepare the parts of a run to go on from a checkpoint, and say from which and what changed."""
    record.position, changes = saved.resumed_position(record.order)
    result.measured |= record.measured_before(saved)
    for logger in parts.trainer.loggers:
        if isinstance(logger, MetricsFile):
            logger.keep_rows(steps=saved.step, validated=not saved.position.validation_due)
    say(f"goes on   from step {saved.step} of {saved.path}{f'; {changes}' if changes else ''}")


def fit(parts: Parts, tuner: FineTuner, result: Result, *, ckpt_path: Path | None) -> None:
    """Validate, unless the run goes on from a checkpoint that has those metrics, fit, and validate again."""
    if "before" not in result.measured:
        measure(parts, tuner, "before", into=result.measured)
    with raise_interrupts(parts.trainer):
        parts.trainer.fit(tuner, datamodule=parts.data, ckpt_path=ckpt_path, weights_only=True)
    step, summary = tuner.summaries.get("val", (-1, {}))  # none in a run that goes on for a few steps
    measure(parts, tuner, "after", into=result.measured, known=summary if step == tuner.exported.step else None)


def measure(
    parts: Parts, tuner: FineTuner, when: str, *, into: StageMetrics, known: dict[str, float] | None = None
) -> None:
    """Compute the metrics of the validation split, unless `known`; print them and store them as `into[when]`."""
    if known is None:
        rows = len(parts.data.validation_split.rows)
        say(f"{when:<10}measuring {rows} validation rows ...")
        with tuner.validating_as(when if when == "zero_shot" else "val"), raise_interrupts(parts.trainer):
            parts.trainer.validate(tuner, datamodule=parts.data, verbose=False)
            known = tuner.summaries[tuner.split][1]
    into[when] = known
    say(f"{when:<10}{format_metrics(known)}")


def add_figures(
    result: Result, trainer: Trainer, net: PeftModel, *, started_s: float, saved: SavedRun | None
) -> Result:
    """Set the figures of time, traffic and speed so far, with those of the run that this one goes on from."""
    stats = swarm_stats(net)
    result.steps, result.minutes = trainer.global_step, (time.monotonic() - started_s) / 60
    result.sent_mb, result.received_mb, result.retries = stats.sent_bytes / MB, stats.received_bytes / MB, stats.retries
    result.formats = stats.formats
    for name, spent in (saved.spent if saved else {}).items():
        setattr(result, name, getattr(result, name) + spent)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it
        if isinstance(callback, Speed):
            result.tokens, result.tokens_per_s = callback.tokens, callback.tokens_per_s
    return result


def saved_checkpoints(trainer: Trainer) -> list[Path]:
    """Return the checkpoints that are there of those that a run keeps up to date."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it
    return [each.path for each in callbacks if isinstance(each, NewestCheckpoint) and each.path.exists()]


@contextmanager
def raise_interrupts(trainer: Trainer) -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C within Lightning, which otherwise ignores SIGINT and calls sys.exit(1)."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def export(tuner: FineTuner, output: Path, result: Result, identity: Identity) -> None:
    """Write the adapter and the learning curves."""
    export_adapter(tuner.net, output / "adapter", result, identity)
    metrics = output / "metrics.csv"
    if metrics.exists():  # not after a fast_dev_run
        draw_curves(metrics, output / "curves.png", title=result.name)


def display_name(base: str) -> str:
    return f"{EMBEDDED_NAME} ({EMBEDDED})" if base == EMBEDDED else base


def say(text: str) -> None:
    """Print a line of a run at once, into a file or a pipe too."""
    print(text, flush=True)

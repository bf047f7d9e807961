"""The parts of a run but for the model, built and checked before a server starts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from peft import PeftConfig, PromptTuningConfig, PromptTuningInit, TaskType
from transformers import PreTrainedTokenizerBase

from petals_tune.config import build
from petals_tune.data.checks import check_positions, check_vocabulary, keep_padding_inside
from petals_tune.data.module import TextData
from petals_tune.data.tokens import word_ids
from petals_tune.errors import ConfigError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.convert import model_folder
from petals_tune.model.families import learned_positions, placeholder_model
from petals_tune.train.checks import (
    check_batches,
    check_callbacks,
    check_device,
    check_end,
    check_optimizer,
    check_trainer,
    check_tuning,
)
from petals_tune.train.loggers import MetricsFile
from petals_tune.train.module import OptimizerFactory, ScheduleFactory, check_precision
from petals_tune.train.objective import Objective
from petals_tune.train.options import Swarm
from petals_tune.train.prompting import asked_as_trained, prompting_of, with_trained_template
from petals_tune.tuning.identity import Identity, Prompting
from petals_tune.tuning.saved import (
    adapter_folder,
    check_adapter,
    choose_base,
    load_tokenizer,
    saved_config,
    saved_vocabulary,
)
from petals_tune.tuning.support import check_config


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What `prepare` builds from a configuration."""

    base: str  # the base model, as the configuration names it
    source: str  # its folder in Hugging Face format, or its name on the hub
    revision: str | None  # branch, tag or commit of it on the hub
    blocks: int  # how many it has
    adapter: Path | None  # folder of an adapter to start from
    data: TextData
    trained: Identity | None  # what `adapter` was trained for; None: unknown
    asked: str | None  # how the adapter's own prompting changed the data of an evaluation
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
    base, revision = _base_model(cfg.model, adapter)
    source = model_folder(base, revision)
    config = Checkpoint(source, revision=revision).config
    blocks = config.get_text_config().num_hidden_layers
    swarm.check(blocks)
    tokenizer = load_tokenizer(source, adapter, revision)
    resized = None if adapter is None else saved_vocabulary(adapter)
    vocabulary = resized or config.get_text_config().vocab_size
    keep_padding_inside(tokenizer, vocabulary)
    objective = build(cfg.objective, where="objective", tokenizer=tokenizer)
    if adapter is None:
        tuning = build(cfg.tuning, where="tuning", tokenizer=tokenizer)
        tuning.task_type, tuning.revision = objective.task_type, revision
        if revision is not None and getattr(tuning, "tokenizer_name_or_path", None) == source:
            tuning.tokenizer_kwargs = {"revision": revision}  # or PEFT reads the initial text by the main branch's
        trained = None
    else:
        tuning = saved_config(adapter)
        labels = head_labels(objective)
        trained = check_adapter(
            adapter,
            task=objective.task_type.value,
            source=source,
            revision=revision,
            named=base,
            labels=labels or None,
        )
    check_config(tuning)
    if trained is None or stage == "fit":
        data, asked = build(cfg.data, where="data", tokenizer=tokenizer), None
    else:
        data, asked = _data_as_trained(cfg.data, trained.prompting, tokenizer, stage=stage)
    data.setup(stage)
    splits = [split.rows for split in data.encoded_splits().values()]
    # A label word may be in no row, and its logit is needed all the same.
    label_ids = word_ids(getattr(objective, "words", ()), tokenizer)
    initial_ids = initial_tokens(tuning, tokenizer) if adapter is None else ()
    check_vocabulary(chain(label_ids, initial_ids, (rows.largest_id for rows in splits)), tokenizer, vocabulary)
    check_positions(
        max(int(rows.lengths.max()) for rows in splits),
        getattr(tuning, "num_virtual_tokens", None) or 0,
        learned_positions(placeholder_model(config)),
    )
    check_callbacks(trainer, objective)
    if stage == "fit":
        check_batches(trainer, data)
    if adapter is None:
        check_tuning(tuning, config, objective)
    return Parts(
        base=base,
        source=source,
        revision=revision,
        blocks=blocks,
        adapter=adapter,
        data=data,
        trained=trained,
        asked=asked,
        objective=objective,
        tuning=tuning,
        optimizer=optimizer,
        schedule=schedule,
        swarm=swarm,
        trainer=trainer,
    )


def initial_tokens(tuning: PeftConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of the text that a soft prompt starts from, as PEFT reads it; none of other methods."""
    if getattr(tuning, "prompt_tuning_init", None) != PromptTuningInit.TEXT:
        return []
    assert isinstance(tuning, PromptTuningConfig)
    ids: list[int] = tokenizer(tuning.prompt_tuning_init_text)["input_ids"]
    return ids[: tuning.num_virtual_tokens]


def head_labels(objective: Objective) -> tuple[str, ...]:
    """Return the label words of a classification head, in the order of its rows; none of other objectives."""
    return tuple(getattr(objective, "words", ())) if objective.task_type == TaskType.SEQ_CLS else ()


def _data_as_trained(
    section: DictConfig, trained: Prompting, tokenizer: PreTrainedTokenizerBase, *, stage: str
) -> tuple[TextData, str | None]:
    """Build data that asks as the adapter was trained, and describe what that changed."""
    changes = []
    if trained.form == "chat" and trained.chat_template != tokenizer.chat_template:
        tokenizer.chat_template = trained.chat_template
        changes.append("its chat template")
    changed = with_trained_template(section, trained)
    if changed is not section:
        changes.append(f"its template {trained.template!r}")
    data: TextData = build(changed, where="data", tokenizer=tokenizer)
    source = asked_as_trained(data.source, prompting_of(data.source, tokenizer, stage=stage), trained)
    if source is not data.source:
        data.source = source
        changes.append(f"its system text {trained.system!r}" if trained.system else "no system text")
    return data, f"as the adapter was trained, with {' and '.join(changes)}" if changes else None


def _base_model(chosen: DictConfig, adapter: Path | None) -> tuple[str, str | None]:
    """Return the base model and its revision."""
    if adapter is not None:
        return choose_base(adapter, source=chosen.source, revision=chosen.revision)
    if chosen.source is None:
        raise ConfigError(
            "model=of_adapter takes the base model that an adapter names, and there is no adapter: "
            "give tuning.init_from=FOLDER_OR_HUB_NAME, or another model",
            key="tuning.init_from",
        )
    return chosen.source, chosen.revision


def build_trainer(cfg: DictConfig) -> Trainer:
    """Build a stock Trainer with the callbacks and loggers of the configuration, and metrics.csv."""
    loggers = [build(section, where=f"logger.{name}") for name, section in cfg.logger.items()]
    callbacks = [build(section, where=f"callbacks.{name}") for name, section in cfg.callbacks.items() if section]
    check_device(str(cfg.trainer.accelerator), cfg.trainer.get("precision"))
    metrics = MetricsFile(Path(cfg.output_dir))
    try:
        return build(cfg.trainer, where="trainer", logger=[metrics, *loggers], callbacks=callbacks)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {error}", key="trainer") from error

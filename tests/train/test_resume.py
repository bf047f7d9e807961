"""A run that stopped anywhere and goes on equals one that was not disturbed, bit for bit."""

import copy
import csv
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lightning import Trainer
from lightning.pytorch import Callback
from peft import LoraConfig, get_peft_model
from transformers import get_scheduler

from petals_tune.data.module import TextData
from petals_tune.train.callbacks import NewestCheckpoint
from petals_tune.train.loggers import MetricsFile
from petals_tune.train.module import FineTuner
from petals_tune.train.objective import CausalLM
from tests.train.tiny import TinyTalk, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.3, target_modules=["q_proj"])
ADAMW = partial(torch.optim.AdamW, lr=0.05)
LINEAR = partial(get_scheduler, name="linear", num_warmup_steps=3)
EPOCHS, BATCHES, VALIDATION_BATCHES = 5, 5, 2  # of 4 rows


class Stopped(RuntimeError):
    """What ends a run in the middle of a test."""


class Stop(Callback):
    """Raises an error at one place of a run, where `at` counts the batches so far or the epochs."""

    def __init__(self, where: str, at: int):
        self.where, self.at, self.batches = where, at, 0

    def _stop(self, where: str, at: int) -> None:
        if where == self.where and at >= self.at:
            torch.rand(3)  # numbers that a process that goes on does not draw
            raise Stopped(where)

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1
        self._stop("batch start", self.batches)

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._stop("optimizer step", self.batches)

    def on_train_batch_end(self, *_: Any) -> None:
        self._stop("batch end", self.batches)

    def on_validation_batch_end(self, *_: Any) -> None:
        self._stop("validation", self.batches)

    def on_validation_end(self, *_: Any) -> None:
        self._stop("validation end", self.batches)

    def on_train_epoch_end(self, *_: Any) -> None:
        self._stop("epoch end", self.batches)


class Rows(Callback):
    """Notes (epoch, optimizer step, token ids) of the batches."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, list[list[int]]]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.current_epoch, trainer.global_step, batch["input_ids"].tolist()))


def fit(
    folder: Path,
    *,
    stop: Stop | None = None,
    checkpoint: Path | None = None,
    optimizer: Callable[..., Any] = ADAMW,
    schedule: Callable[..., Any] = LINEAR,
    epochs: int = EPOCHS,
    **options: Any,
) -> tuple[dict[str, Any] | None, list[Any], list[dict[str, str]]]:
    """Train the tiny model; returns its checkpoint, the batches, and the rows of metrics.csv."""
    torch.manual_seed(3)
    net = get_peft_model(copy.deepcopy(MODEL), copy.deepcopy(LORA))
    workers = options.pop("num_workers", 0)
    data = TextData(
        TinyTalk(), tokenizer=TOKENIZER, batch_size=4, max_rows=19, num_workers=workers
    )  # the last batch has 3 rows
    rows = Rows()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=[MetricsFile(folder)],
        callbacks=[rows, *([stop] if stop else []), NewestCheckpoint(str(folder / "checkpoint.ckpt"))],
        default_root_dir=folder,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    try:
        trainer.fit(FineTuner(net, CausalLM(), optimizer, schedule), datamodule=data, ckpt_path=checkpoint)
    except Stopped:
        assert stop is not None
    if not (folder / "checkpoint.ckpt").exists():
        return None, rows.seen, []
    return torch.load(folder / "checkpoint.ckpt", weights_only=True), rows.seen, read_metrics(folder)


def read_metrics(folder: Path) -> list[dict[str, str]]:
    if not (folder / "metrics.csv").exists():  # of a run that had nothing left to do
        return []
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["global_step"] == other["global_step"]
    assert one["lr_schedulers"] == other["lr_schedulers"]
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
    moments = [found["optimizer_states"][0] for found in (one, other)]
    assert moments[0]["param_groups"] == moments[1]["param_groups"]
    for key, state in moments[0]["state"].items():
        assert all(torch.equal(value, moments[1]["state"][key][name]) for name, value in state.items())


def values(metrics: list[dict[str, str]], name: str) -> list[tuple[int, str]]:
    return [(int(row["step"]), row[name]) for row in metrics if row.get(name)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    @cache
    def run(**options: Any) -> Any:
        return fit(tmp_path_factory.mktemp("undisturbed"), **options)

    return run


VALIDATIONS = [
    {"check_val_every_n_epoch": None, "val_check_interval": 7},  # over all epochs
    {"val_check_interval": 2},  # within each
    {"val_check_interval": 1.0},  # at the end of each
]
PLACES = ["batch start", "optimizer step", "batch end", "validation", "validation end", "epoch end"]


def assert_goes_on(
    undisturbed: Callable[..., Any], folder: Path, stops: list[Stop], num_workers: int = 0, **options: Any
) -> None:
    """Stop a run once and again, go on each time, and compare the end, the batches and the metrics."""
    whole, batches, metrics = undisturbed(**options)
    checkpoint, taken, seen = None, 0, []
    for number, stop in enumerate([*stops, None]):
        here = folder / str(number)
        saved, trained, rows = fit(here, stop=stop, checkpoint=checkpoint, num_workers=num_workers, **options)
        if saved is None:  # not a single step was taken: there is nothing to go on from
            continue
        expected = [batch for batch in batches if batch[1] >= taken]
        assert trained == expected[: len(trained)]
        steps = saved["global_step"]
        seen += [row for row in values(rows, "train/loss") if row[0] < steps]
        checkpoint, taken = here / "checkpoint.ckpt", steps
    assert saved is not None
    assert_same_state(whole, saved)
    assert sorted(seen) == sorted(values(metrics, "train/loss"))
    runs = [read_metrics(folder / str(n)) for n in range(number + 1)]
    assert {row for run in runs for row in values(run, "val/loss")} == set(values(metrics, "val/loss"))


@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes
@given(
    stops=st.lists(st.tuples(st.sampled_from(PLACES), st.integers(1, EPOCHS * BATCHES)), min_size=1, max_size=2),
    accumulate=st.integers(1, BATCHES + 2),
    validation=st.sampled_from(VALIDATIONS),
)
def test_a_run_that_stopped_anywhere_goes_on_exactly(
    stops: list[tuple[str, int]],
    accumulate: int,
    validation: dict[str, Any],
    undisturbed: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    assert_goes_on(
        undisturbed,
        tmp_path_factory.mktemp("stopped"),
        [Stop(*stop) for stop in stops],
        accumulate_grad_batches=accumulate,
        **validation,
    )


# What most often goes wrong: the end of an epoch, a validation, and all of it with processes that pad the batches.
@pytest.mark.parametrize(
    ("where", "at", "num_workers"),
    [("batch start", 6, 0), ("epoch end", 5, 0), ("validation", 10, 0), ("batch start", 8, 2), ("epoch end", 5, 2)],
)
def test_a_run_goes_on_at_an_epochs_end_and_in_a_validation(
    where: str, at: int, num_workers: int, undisturbed: Callable[..., Any], tmp_path: Path
) -> None:
    assert_goes_on(undisturbed, tmp_path, [Stop(where, at)], num_workers, accumulate_grad_batches=2, **VALIDATIONS[2])


def test_a_run_that_goes_on_for_longer_equals_a_longer_run(undisturbed: Callable[..., Any], tmp_path: Path) -> None:
    constant = partial(get_scheduler, name="constant_with_warmup", num_warmup_steps=3)
    whole, *_ = fit(tmp_path / "whole", schedule=constant)
    fit(tmp_path / "short", schedule=constant, epochs=2)
    longer, *_ = fit(tmp_path / "longer", schedule=constant, checkpoint=tmp_path / "short" / "checkpoint.ckpt")
    assert whole is not None
    assert longer is not None
    assert_same_state(whole, longer)


def test_options_of_the_optimizer_and_the_schedule_count_on_resuming(tmp_path: Path) -> None:
    fit(tmp_path / "first", epochs=1)
    other = {
        "optimizer": partial(torch.optim.AdamW, lr=0.2, weight_decay=0.5),
        "schedule": partial(get_scheduler, name="linear", num_warmup_steps=0),
    }
    saved, *_ = fit(tmp_path / "second", checkpoint=tmp_path / "first" / "checkpoint.ckpt", epochs=2, **other)
    assert saved is not None
    (group,) = saved["optimizer_states"][0]["param_groups"]
    assert (group["weight_decay"], group["initial_lr"]) == (0.5, 0.2)
    assert group["lr"] == pytest.approx(0.0)  # at step 10 of 10
    assert saved["lr_schedulers"][0]["last_epoch"] == 10
    assert saved["optimizer_states"][0]["state"][0]["step"] == 10  # of moments that were kept

"""What Lightning, torch or PEFT would refuse in the middle of a run is one ConfigError before a server starts."""

import pytest
import torch

from petals_tune.errors import ConfigError
from petals_tune.train.parts import prepare
from petals_tune.train.run import run
from tests.raising import raises
from tests.train.conftest import Compose
from tests.train.tiny import LocalConnection

LORA = "tuning=lora"

# Overrides -> the key of the error.
MISTAKES = {
    "trainer.limit_val_batches=0": "trainer.limit_val_batches",
    "trainer.limit_val_batches=0.01": "trainer.limit_val_batches",
    "trainer.limit_train_batches=0": "trainer.limit_train_batches",
    "trainer.val_check_interval=1000 trainer.check_val_every_n_epoch=1": "trainer.val_check_interval",
    "trainer.val_check_interval=0": "trainer.val_check_interval",
    "trainer.check_val_every_n_epoch=0": "trainer.check_val_every_n_epoch",
    "trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_val=-1": "trainer.gradient_clip_val",
    "trainer.log_every_n_steps=0": "trainer.log_every_n_steps",
    "trainer.strategy=ddp_spawn": "trainer.strategy",
    "trainer.accelerator=gpu": "trainer.accelerator",
    "trainer.precision=16-mixed": "trainer.precision",  # Lightning would take bf16-mixed
    "trainer.precision=16 trainer.accelerator=auto": "trainer.precision",
    "trainer.precision=bf16-true": "trainer.precision",
    "trainer.max_steps=0": "trainer.max_steps",
    "trainer.max_steps=-1": "trainer.max_steps",
    "trainer.max_steps=-1 trainer.max_time=00:00:01:00 schedule=cosine": "schedule",
    "optimizer.lr=inf": "optimizer.lr",
    "optimizer._target_=torch.optim.SparseAdam ~optimizer.weight_decay": "optimizer",
    "schedule.name=reduce_lr_on_plateau": "schedule",
    "callbacks=[default,early_stopping] callbacks.early_stopping.monitor=val_loss": "callbacks",
    "tuning.init_text=''": "tuning.init_text",
    f"{LORA} tuning.r=0": "tuning",
    f"{LORA} tuning.target_modules=[nothing]": "tuning",
    f"{LORA} tuning.lora_dropout=1.5": "tuning",
}


def test_a_mistake_ends_a_run_before_a_server_starts(tiny_run: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for overrides, key in MISTAKES.items():
        with raises(ConfigError, key=key):
            prepare(tiny_run("personachat", *overrides.split()))


@pytest.mark.parametrize(
    "overrides",
    [
        "trainer.max_steps=-1 trainer.max_time=00:00:00:01 schedule=constant",
        "trainer.max_steps=-1 trainer.max_epochs=1 trainer.limit_train_batches=2 trainer.val_check_interval=2",
        "trainer.max_steps=2 trainer.val_check_interval=1000 trainer.check_val_every_n_epoch=null",
    ],
)
def test_a_run_may_end_by_time_or_epochs_and_validate_seldom(overrides: str, tiny_run: Compose) -> None:
    measured = run(tiny_run("personachat", "~callbacks.replies", *overrides.split()), LocalConnection())
    assert set(measured) == {"before", "after"}

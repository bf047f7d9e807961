"""Lightning as its users know it: FineTuner and TextData under a plain Trainer, and Lightning's own parts by name."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from omegaconf import OmegaConf
from peft import PeftModel, get_peft_model
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import AutoModelForSequenceClassification

from petals_tune.errors import ConfigError
from petals_tune.train.module import FineTuner
from petals_tune.train.objective import CausalLM
from petals_tune.train.run import run
from tests.raising import raises
from tests.train.conftest import Compose
from tests.train.tiny import WORDS, LocalConnection, TinyReviews, tiny_model, tiny_tokenizer
from tests.train.together import LORA, STEPS, talk, trainer, tuner

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def test_fit_and_test_without_hydra(tmp_path: Path) -> None:
    module, data, fitting = tuner(tiny_model()), talk(batch_size=4), trainer(tmp_path)
    (before,) = fitting.test(module, datamodule=data, verbose=False)
    fitting.fit(module, datamodule=data)
    (after,) = fitting.test(module, datamodule=data, verbose=False)
    assert fitting.global_step == STEPS
    assert after["test/loss"] < before["test/loss"]
    (validated,) = fitting.validate(module, datamodule=data, verbose=False)
    assert validated["val/perplexity"] != pytest.approx(after["test/perplexity"])  # of rows of their own


def test_a_schedule_of_torch_needs_no_number_of_steps(tmp_path: Path) -> None:
    net = get_peft_model(tiny_model(), copy.deepcopy(LORA))
    schedule = partial(CosineAnnealingLR, T_max=STEPS)
    module, fitting = FineTuner(net, CausalLM(), partial(torch.optim.SGD, lr=1.0), schedule), trainer(tmp_path)
    fitting.fit(module, datamodule=talk(batch_size=4))
    assert fitting.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-6)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    module = tuner(tiny_model())
    fitting = trainer(tmp_path, max_steps=-1, max_epochs=1, limit_train_batches=4, accumulate_grad_batches=2)
    fitting.fit(module, datamodule=talk(batch_size=2))
    assert fitting.global_step == 2


def test_early_stopping_and_the_best_checkpoint(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")
    stop = EarlyStopping("val/loss", patience=1, min_delta=100.0)  # no gain is ever enough
    fitting = Trainer(
        accelerator="cpu",
        max_epochs=20,
        default_root_dir=tmp_path,
        logger=False,
        callbacks=[best, stop],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_train_batches=1,
    )
    module = tuner(tiny_model())
    fitting.fit(module, datamodule=talk(batch_size=4))
    assert fitting.current_epoch == 2
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert saved.keys() == {name for name, _ in module.trained_parameters()}
    again = tuner(tiny_model())
    fitting.validate(again, datamodule=talk(batch_size=4), ckpt_path=best.best_model_path, verbose=False)
    assert all(torch.equal(saved[name], value) for name, value in again.trained_parameters())


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
def test_a_precision_that_changes_weights_is_refused(precision: str, tmp_path: Path) -> None:
    with raises(ConfigError, key="trainer.precision", seen=precision):
        trainer(tmp_path, precision=precision).fit(tuner(tiny_model()), datamodule=talk(batch_size=4))


def test_mixed_precision_keeps_what_is_trained_in_32_bits(tmp_path: Path) -> None:
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        module, fitting = tuner(tiny_model()), trainer(tmp_path, precision=precision)
        fitting.fit(module, datamodule=talk(batch_size=4))
        assert {value.dtype for _, value in module.trained_parameters()} == {torch.float32}
        losses.append(fitting.test(module, datamodule=talk(batch_size=4), verbose=False)[0]["test/loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


@pytest.mark.parametrize("recipe", ["sst2_head", "sst2_lora_head"])
def test_a_head_is_trained_by_its_recipe_and_loads_with_stock_peft(
    recipe: str, tiny_run: Compose, tiny_folder: Path, tmp_path: Path
) -> None:
    measured = run(tiny_run(recipe, "optimizer.lr=0.05", "trainer.max_steps=12"), LocalConnection())
    assert measured["after"]["loss"] < measured["before"]["loss"]

    base = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=2)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    right = []
    with torch.no_grad():
        for row in TinyReviews().validation():
            logits = loaded(**tiny_tokenizer()(row.prompt, return_tensors="pt")).logits
            right.append(WORDS[logits.argmax().item()] == row.word)
    assert sum(right) / len(right) == pytest.approx(measured["after"]["accuracy"])


def test_lightnings_parts_by_name_from_the_command_line(tiny_run: Compose, tmp_path: Path) -> None:
    cfg = tiny_run(
        "personachat",
        "callbacks=[default,early_stopping]",
        "callbacks.early_stopping.patience=1",
        "+callbacks.early_stopping.min_delta=100",
        "trainer.max_steps=30",
        "trainer.accumulate_grad_batches=2",
        f"+logger.more={{_target_: lightning.pytorch.loggers.CSVLogger, save_dir: '{tmp_path}', name: more}}",
    )
    cfg.schedule = OmegaConf.create({"_target_": "torch.optim.lr_scheduler.StepLR", "_partial_": True, "step_size": 5})
    run(cfg, LocalConnection())
    checkpoint = torch.load(tmp_path / "out" / "checkpoint.ckpt", weights_only=True)
    assert checkpoint["global_step"] < 30
    assert list((tmp_path / "more").rglob("metrics.csv"))


def test_a_fast_dev_run_takes_one_step(tiny_run: Compose, tmp_path: Path) -> None:
    measured = run(tiny_run("personachat", "trainer.fast_dev_run=true"), LocalConnection())
    assert set(measured) == {"before", "after"}

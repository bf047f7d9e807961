"""A run that was interrupted in the middle of a step and resumed equals an uninterrupted one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from petals_tune.errors import SwarmTimeout
from petals_tune.train.module import FineTuner
from petals_tune.train.run import run
from tests.train.conftest import tiny_config
from tests.train.tiny import LocalConnection

LORA = {
    "_target_": "peft.LoraConfig", "task_type": "CAUSAL_LM", "r": 2, "lora_dropout": 0.3, "target_modules": ["q_proj"],
}  # fmt: skip


class LosesItsSwarm(Callback):
    """The forward of batch number `at` of the run fails, after it has drawn random numbers."""

    def __init__(self, at: int):
        self.left = at

    def on_train_batch_start(self, trainer: Any, module: FineTuner, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            torch.rand(3)
            raise SwarmTimeout("nobody is there any more")


def config(model: Path, output: Path, *overrides: str) -> DictConfig:
    cfg = tiny_config(
        model,
        output,
        "personachat",
        "~callbacks.replies",
        "optimizer.lr=0.05",
        "trainer.accumulate_grad_batches=2",
        "trainer.max_steps=9",
        "trainer.val_check_interval=4",
        *overrides,
    )
    cfg.tuning = OmegaConf.create(LORA)
    return cfg


def read_checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(config(tiny_folder, folder), LocalConnection())
    return read_checkpoint(folder)


# Of 10 batches an epoch, 2 a step: in the first epoch, in the middle of an accumulation, at a step's first batch, in
# the second epoch; and once where a validation has just been.
@pytest.mark.parametrize("at", [4, 5, 8, 13, 14])
def test_a_run_that_lost_its_swarm_in_a_step_and_goes_on_equals_one_that_did_not(
    at: int, uninterrupted: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    loses = f"+callbacks.loses={{_target_: tests.train.test_resume.LosesItsSwarm, at: {at}}}"
    with pytest.raises(SwarmTimeout):
        run(config(tiny_folder, tmp_path / "broken", loses), LocalConnection())
    torch.rand(5)  # another process would have drawn other numbers
    checkpoint = f"ckpt_path={tmp_path / 'broken' / 'checkpoint.ckpt'}"
    run(config(tiny_folder, tmp_path / "resumed", checkpoint), LocalConnection())

    resumed = read_checkpoint(tmp_path / "resumed")
    assert uninterrupted["global_step"] == resumed["global_step"] == 9
    assert uninterrupted["lr_schedulers"] == resumed["lr_schedulers"]
    for name, tensor in uninterrupted["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], tensor, rtol=0, atol=0)
    moments = [found["optimizer_states"][0]["state"] for found in (uninterrupted, resumed)]
    for key, state in moments[0].items():
        torch.testing.assert_close(moments[1][key]["exp_avg"], state["exp_avg"], rtol=0, atol=0)

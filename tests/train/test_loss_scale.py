"""Trainer(precision="16-mixed"): a scaled loss, whose steps are left out where gradients overflow. Here on a CPU."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from peft import PromptEncoderConfig, get_peft_model

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import Diverged
from petals_tune.train.callbacks import NewestCheckpoint
from petals_tune.train.module import FineTuner
from petals_tune.train.objective import CausalLM
from tests.inprocess import in_process_swarm
from tests.models import relative_error
from tests.parity import in_float32, remote
from tests.raising import raises
from tests.train.tiny import save_tiny, tiny_model
from tests.train.together import talk, trainer, tuner

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

STEPS = 10


def scaled(folder: Path, *, scale: float, **options: Any) -> Trainer:
    """Lightning makes no 16-mixed for a CPU by itself."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    return trainer(folder, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **options)


@dataclass
class Figures(Callback):
    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if len(self.losses) < trainer.global_step:
            self.losses.append(trainer.callback_metrics["train/loss"].item())
            self.scales.append(float(trainer.callback_metrics.get("train/loss_scale", 1.0)))


def fitted(folder: Path, model: Any) -> tuple[FineTuner, Figures]:
    """Train a soft prompt that two linears make, whose scaled gradients are computed in float16."""
    torch.manual_seed(1)
    prompt = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16)
    figures = Figures()
    module = FineTuner(get_peft_model(model, prompt), CausalLM(), partial(torch.optim.SGD, lr=1.0))
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "max_steps": STEPS, "limit_val_batches": 0}
    options["enable_checkpointing"] = True
    callbacks = [figures, NewestCheckpoint(str(folder / "checkpoint.ckpt"))]
    scaled(folder, scale=2.0**18, callbacks=callbacks, **options).fit(module, datamodule=talk(batch_size=2))
    return module, figures


def test_a_run_over_a_swarm_leaves_out_the_steps_that_a_local_one_does(tmp_path: Path) -> None:
    plain, expected = fitted(tmp_path, in_float32(tiny_model()))
    folder = save_tiny(tmp_path / "model")
    with (
        in_process_swarm(folder, "0:1", "1:2"),
        remote(AutoDistributedModelForCausalLM, folder) as model,
    ):
        module, found = fitted(tmp_path, model)
    falls = [after < before for before, after in zip(expected.scales, expected.scales[1:], strict=False)]
    assert 2 < sum(falls) < STEPS - 2
    assert found.scales == expected.scales
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)
    assert all(loss < 10 for loss in found.losses), "the loss that is logged is not scaled"
    for own, other in zip(module.trained_parameters(), plain.trained_parameters(), strict=True):
        assert own[1].dtype is torch.float32
        assert relative_error(own[1].detach(), other[1].detach()) < 0.01
    saved = torch.load(tmp_path / "checkpoint.ckpt", weights_only=True)
    assert saved["MixedPrecision"]["scale"] in (found.scales[-1], 2 * found.scales[-1], found.scales[-1] / 2)


class Overflow(Callback):
    """Makes every gradient of a tensor infinite."""

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, FineTuner)
        self.name, parameter = module.trained_parameters()[1]
        parameter.register_hook(lambda grad: torch.full_like(grad, torch.inf))


def test_gradients_that_overflow_without_a_scale_end_the_run(tmp_path: Path) -> None:
    module, overflow = tuner(tiny_model()), Overflow()
    before = [parameter.detach().clone() for _, parameter in module.trained_parameters()]
    with raises(Diverged, step=3):
        scaled(tmp_path, scale=8.0, callbacks=[overflow], max_steps=STEPS).fit(module, datamodule=talk(batch_size=4))
    assert all(
        torch.equal(*pair)
        for pair in zip(before, (parameter for _, parameter in module.trained_parameters()), strict=True)
    )

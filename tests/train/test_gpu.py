"""Trainer(accelerator="gpu"): the client's part and its training on a pretended GPU, in every precision."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.train.callbacks import NewestCheckpoint
from tests.inprocess import in_process_swarm
from tests.parity import remote
from tests.pretend_device import GpuTensor, pretended_gpus, put_on
from tests.train.test_loss_scale import Figures
from tests.train.tiny import save_tiny
from tests.train.together import talk, trainer, tuner

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

STEPS = 6
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Pretended(CPUAccelerator):
    """Lightning's CUDA accelerator asks CUDA for its devices."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == "cuda"


class OnPretended(SingleDeviceStrategy):
    """Lightning's own strategy but for the move, which swaps the memory of tensors."""

    def model_to_device(self) -> None:
        assert self.model is not None
        put_on(self.model)
        self.model._device = self.root_device  # as `LightningModule.to` notes it

    def teardown(self) -> None:
        pass


class Mixed(MixedPrecision):
    """Autocast on both devices: to torch, pretended tensors are a CPU's."""

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        dtype = DTYPES[self.precision]
        with super().forward_context():
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", dtype)
            try:
                yield
            finally:
                torch.set_autocast_enabled("cuda", False)


def fitted(model: Any, folder: Path, precision: str, **options: Any) -> tuple[Any, Figures]:
    """A run with validations, clipping and a checkpoint."""
    figures, plugins = Figures(), []
    if precision in DTYPES:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2) if precision == "16-mixed" else None
        plugins = [Mixed(precision, "cpu", scaler)]  # type: ignore[arg-type]  # one of its two names
    module = tuner(model)
    fitting = trainer(
        folder,
        max_steps=STEPS,
        gradient_clip_val=1.0,
        limit_val_batches=1,
        enable_checkpointing=True,
        callbacks=[figures, NewestCheckpoint(str(folder / "checkpoint.ckpt"))],
        plugins=plugins,
        **options,
    )
    fitting.fit(module, datamodule=talk(batch_size=4))
    return module, figures


@pytest.mark.parametrize(
    "precision", ["16-mixed", *(pytest.param(each, marks=pytest.mark.slow) for each in ("32-true", "bf16-mixed"))]
)
def test_a_run_on_a_gpu_has_the_losses_of_one_on_a_cpu(precision: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    found = {}
    for device in ("cpu", "cuda"):
        card = OnPretended(device=torch.device("cuda:0"), accelerator=Pretended())
        options: dict[str, Any] = {"strategy": card, "accelerator": "auto"} if device == "cuda" else {}
        with (
            in_process_swarm(folder, "0:1", "1:2"),
            remote(AutoDistributedModelForCausalLM, folder) as model,
            pretended_gpus() if device == "cuda" else nullcontext(),
        ):
            module, found[device] = fitted(model, tmp_path, precision, **options)
        kinds = {type(parameter.data) for _, parameter in module.trained_parameters()}
        assert kinds == {GpuTensor if device == "cuda" else torch.Tensor}
        assert {parameter.dtype for _, parameter in module.trained_parameters()} == {torch.float32}
    assert len(found["cpu"].losses) == STEPS
    assert found["cuda"].losses == pytest.approx(found["cpu"].losses, rel=1e-6)
    assert found["cuda"].scales == found["cpu"].scales

"""The LightningModule: parts come built, one step is shared, a checkpoint holds what is trained and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from petals_tune.data.collate import Batch
from petals_tune.errors import ConfigError, Diverged
from petals_tune.train.backbone import Net
from petals_tune.train.objective import Objective, Scores

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeSchedule = Callable[..., LRScheduler]  # called as schedule(optimizer=...), with num_training_steps=N if it takes it

# With the others, weights and hidden states of the client would have another type than what the servers send back.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class FineTuner(LightningModule):
    """Trains the parameters of `net` that require a gradient: a PEFT model's, or whatever the caller left so.

    `optimizer` is called with those parameters, `schedule` with the optimizer and `num_training_steps`. With several
    processes (`strategy="ddp"`) a step learns from all their supervised tokens alike, as one process with the whole
    batch would.
    """

    def __init__(
        self,
        net: Net,
        objective: Objective,
        optimizer: MakeOptimizer,
        schedule: MakeSchedule | None = None,
    ):
        super().__init__()
        self.strict_loading = False  # a checkpoint has no backbone
        self.net = net.train()
        self.objective = objective
        self.split = "val"  # what a validation's metrics are called after
        self.summaries: dict[str, tuple[int, dict[str, float]]] = {}  # split -> (step, its last validation)
        self._make_optimizer = optimizer
        self._make_schedule = schedule
        self._totals: dict[str, MeanMetric] = {}

    def setup(self, stage: str) -> None:
        check_precision(self.trainer)
        # DDP broadcasts what is frozen as well, which would give the weightless blocks memory.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in self.named_buffers())]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        scores = self._scores(batch)
        share = self._share(scores.count)
        for name, value in {"loss": scores.loss, **scores.metrics}.items():
            self.log(f"train/{name}", share * value, batch_size=scores.count, prog_bar=True, sync_dist=True)
        return share * scores.loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for name, parameter in self.trained():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise Diverged(
                    f"the gradient of {name} is not finite at step {self.global_step}; it was not applied: training "
                    "diverged, try a smaller optimizer.lr"
                )

    def on_validation_epoch_start(self) -> None:
        self._totals = {}

    def on_test_epoch_start(self) -> None:
        self._totals = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        scores = self._scores(batch)
        for name, value in {"loss": scores.loss, **scores.metrics}.items():
            if name not in self._totals:
                self._totals[name] = MeanMetric().to(self.device)
                self._totals[name].set_dtype(torch.float64)
            self._totals[name].update(value, weight=scores.count)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._report(self.split)

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        # The totals of several processes are added up by `compute`.
        summary = self.objective.summary({name: total.compute().item() for name, total in self._totals.items()})
        self.summaries[split] = (self.global_step, summary)
        self.log_dict({f"{split}/{name}": value for name, value in summary.items()}, sync_dist=True)
        # Inside a fit Lightning would log under the number of the last batch: one less than the steps that were taken.
        self.log("step", float(self.global_step), sync_dist=True)

    @contextmanager
    def validating_as(self, split: str) -> Iterator[None]:
        """Call the metrics of validations in this block `split/...` instead of `val/...`."""
        before, self.split = self.split, split
        try:
            yield
        finally:
            self.split = before

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [parameter for _, parameter in self.trained()]
        if not trained:
            raise ConfigError("nothing to train: no parameter of the model requires a gradient; choose tuning=prompt")
        optimizer = self._make_optimizer(trained)
        if self._make_schedule is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = scheduled(self._make_schedule, optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of what is trained."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: parameter.detach() for name, parameter in self.trained()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Loading is not strict, so a checkpoint of something else would leave everything as it was without a word.
        saved = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        wanted = {name: tuple(parameter.shape) for name, parameter in self.trained()}
        if saved != wanted:
            raise ConfigError(f"ckpt_path is of another run: it holds {saved}, and this run trains {wanted}")

    def _share(self, count: int) -> float:
        """What this process's mean over `count` tokens weighs against the others', whose gradients DDP will average."""
        if self.trainer.world_size == 1:
            return 1.0
        mean: Any = self.trainer.strategy.reduce(torch.tensor(float(count), device=self.device), reduce_op="mean")
        return count / mean.item()

    def _scores(self, batch: Batch) -> Scores:
        scores = self.objective(self.net, batch)
        if not torch.isfinite(scores.loss):
            raise Diverged(
                f"the loss is {scores.loss.item()} at step {self.global_step}: training diverged or a batch is broken;"
                " try a smaller optimizer.lr"
            )
        return scores


def scheduled(make: MakeSchedule, optimizer: Optimizer, steps: int) -> LRScheduler:
    """transformers' schedules need to know how many steps there will be, torch's have options of their own."""
    known = {"num_training_steps": steps} if "num_training_steps" in inspect.signature(make).parameters else {}
    return make(optimizer=optimizer, **known)


def check_precision(trainer: Trainer) -> None:
    """Raises ConfigError for a precision that changes the type of the client's weights."""
    if trainer.precision not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision={trainer.precision} would change the client's weights, and what is trained, to another "
            f"type than the servers' replies: choose {' or '.join(PRECISIONS)}. What travels is a matter of "
            "swarm.wire_format and swarm.grad_format, what the servers compute with, of swarm.quantization"
        )

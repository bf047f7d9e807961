"""The LightningModule: training and evaluation steps, and checkpoints that hold the trained parameters alone."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from petals_tune.copies import to_host
from petals_tune.data.collate import Batch
from petals_tune.data.module import TextData
from petals_tune.errors import ConfigError, Diverged
from petals_tune.train.backbone import Net, remote_blocks
from petals_tune.train.exported import Exported, best_checkpoint
from petals_tune.train.objective import Objective, Scores
from petals_tune.train.resume import LINE_KEY, SEED_KEY, TrainingPosition, continue_from, seed_step
from petals_tune.train.scoring import score
from petals_tune.train.window import Window

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
ScheduleFactory = Callable[
    ..., LRScheduler
]  # called with optimizer=..., and num_training_steps=N if it has that argument

# The others change the dtype of the client's weights and hidden states, and then those of the servers do not match.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
LEAST_SCALE = 1.0  # of the loss in 16-mixed: a gradient that overflows without being scaled up is the training's fault


class FineTuner(LightningModule):
    """Trains the parameters of `net` that require a gradient, usually those of a PEFT adapter.

    net:        the model, with local or remote blocks
    objective:  the loss and the metrics
    optimizer:  called with the trained parameters
    schedule:   called with the optimizer and, if it has such an argument, `num_training_steps`; None: constant

    All supervised tokens of a step (rows, of a classification) have the same weight, as in one process with one batch
    of the same rows: with several processes (`strategy="ddp"`), and with accumulated batches, also where the last step
    of an epoch has fewer of these. After each batch a gradient is the mean over the step's batches so far, and
    `train/loss` too.
    """

    def __init__(
        self,
        net: Net,
        objective: Objective,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
    ):
        super().__init__()
        self.strict_loading = False  # a checkpoint has no frozen weights
        self.net = net.train()
        self.objective = objective
        self.split = "val"  # prefix of a validation's metrics
        self.summaries: dict[str, tuple[int, dict[str, float]]] = {}  # split -> (step, metrics) of its last evaluation
        self._optimizer_factory = optimizer
        self._schedule_factory = schedule
        self._totals: dict[str, MeanMetric] = {}
        self._resumed_steps = 0
        self._position: TrainingPosition | None = None  # that a resumed run goes on from
        self._seed = 0  # of the random numbers of all steps, where several processes train together
        self._best: Exported | None = None
        self.window = Window()  # the batches since the last optimizer step

    def setup(self, stage: str) -> None:
        check_precision(self.trainer)
        self._resumed_steps, self._position = 0, None
        # DDP would broadcast frozen parameters too, and so allocate memory for remote blocks' placeholder weights.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in self.named_buffers())]

    def on_fit_start(self) -> None:
        self._seed = self.trainer.strategy.broadcast(torch.initial_seed())

    def on_train_start(self) -> None:
        if self._position is not None:
            continue_from(self._position, self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        batches = self.trainer.accumulate_grad_batches
        if batch_idx % batches == 0:  # here Lightning sets the gradients to zero
            self.window = Window()
            if self.trainer.world_size > 1:
                seed_step(self._seed, rank=self.global_rank, step=self.global_step)
        scores = self._score(batch)
        of_gradient, of_loss = self.window.add(scores, self._mean_over_processes(scores.count))
        for name, mean in self.window.means.items():
            self.log(f"train/{name}", mean, batch_size=scores.count, prog_bar=True, sync_dist=True)
        if of_gradient:  # of the window's earlier batches
            for _, parameter in self.trained_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(of_gradient)
        return scores.loss * (of_loss * batches)  # Lightning divides by `batches`, however many the window has

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Raise Diverged for a gradient that is not finite, unless a scaler will leave the step out for it."""
        gradients = {name: p.grad for name, p in self.trained_parameters() if p.grad is not None}
        finite = to_host(*(torch.isfinite(gradient).all() for gradient in gradients.values()))
        bad = next((name for name, good in zip(gradients, finite, strict=True) if not good), None)
        scaler: torch.amp.GradScaler | None = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.log("train/loss_scale", scaler.get_scale())
        if bad is not None and (scaler is None or scaler.get_scale() <= LEAST_SCALE):
            raise Diverged(
                f"the gradient of {bad} is not finite at step {self.global_step}; it was not applied: training "
                "diverged, try a smaller optimizer.lr",
                step=self.global_step,
                parameter=bad,
            )

    def on_train_end(self) -> None:
        # After the callbacks, which have saved the newest checkpoint, and before replies and the last validation.
        if found := best_checkpoint(self.trainer):
            self._best, checkpoint = found
            self.load_state_dict(checkpoint["state_dict"], strict=False)

    @property
    def exported(self) -> Exported:
        """The step that the trained parameters are of."""
        return self._best or Exported(step=self.global_step)

    def on_validation_epoch_start(self) -> None:
        self._totals = {}

    def on_test_epoch_start(self) -> None:
        self._totals = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        scores = self._score(batch)
        for name, value in {"loss": scores.loss, **scores.metrics}.items():
            if name not in self._totals:
                self._totals[name] = MeanMetric().to(self.device)
                self._totals[name].set_dtype(torch.float64)
            self._totals[name].update(value, weight=scores.count)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_summary(self.split)

    def on_test_epoch_end(self) -> None:
        self._log_summary("test")

    def _log_summary(self, split: str) -> None:
        # `compute` adds up the totals of all processes.
        summary = self.objective.summary({name: total.compute().item() for name, total in self._totals.items()})
        self.summaries[split] = (self.global_step, summary)
        self.log_dict({f"{split}/{name}": value for name, value in summary.items()}, sync_dist=True)
        # Within a fit Lightning logs the index of the last step, one less than the number of steps.
        self.log("step", float(self.global_step), sync_dist=True)

    @contextmanager
    def validating_as(self, split: str) -> Iterator[None]:
        """Within the block, name the metrics of validations `split/...` instead of `val/...`."""
        before, self.split = self.split, split
        try:
            yield
        finally:
            self.split = before

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [parameter for _, parameter in self.trained_parameters()]
        if not parameters:
            raise ConfigError(
                "nothing to train: no parameter of the model requires a gradient; choose tuning=prompt", key="tuning"
            )
        optimizer = self._optimizer_factory(parameters)
        optimizer.register_load_state_dict_pre_hook(keep_options)
        if self._schedule_factory is None:
            return optimizer
        schedule = build_schedule(self._schedule_factory, optimizer, planned_steps(self.trainer))
        advance(schedule, self._resumed_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return names and parameters that require a gradient."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: parameter.detach() for name, parameter in self.trained_parameters()}
        checkpoint[SEED_KEY] = self._seed
        if (blocks := remote_blocks(self.net)) is not None:
            checkpoint[LINE_KEY] = blocks.format_choice.slow

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Loading is not strict: without this check a checkpoint of another adapter would change nothing, silently.
        saved = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        expected = {name: tuple(parameter.shape) for name, parameter in self.trained_parameters()}
        if saved != expected:
            raise ConfigError(
                f"ckpt_path is of another run: it holds {saved}, and this run trains {expected}",
                key="ckpt_path",
                seen=saved,
            )
        if self.trainer.state.fn == TrainerFn.FITTING:
            # The options of this run count: its schedule is advanced to the checkpoint's step, not restored.
            self._resumed_steps, checkpoint["lr_schedulers"] = checkpoint["global_step"], []
            self._seed = checkpoint.get(SEED_KEY, self._seed)
            if (blocks := remote_blocks(self.net)) is not None:
                blocks.format_choice.take(checkpoint.get(LINE_KEY))
            self.resume_from(TrainingPosition.from_checkpoint(checkpoint))

    def resume_from(self, position: TrainingPosition) -> None:
        """Go on from `position`; called while a checkpoint is loaded."""
        self._position = position
        data = getattr(self.trainer, "datamodule", None)  # Lightning sets it in fit()
        if isinstance(data, TextData):
            data.resume_at(epoch=position.epoch, batches=position.batches)

    def _mean_over_processes(self, count: int) -> float:
        if self.trainer.world_size == 1:
            return float(count)
        mean: Any = self.trainer.strategy.reduce(torch.tensor(float(count), device=self.device), reduce_op="mean")
        return float(mean.item())

    def _score(self, batch: Batch) -> Scores:
        return score(self.objective, self.net, batch, check=self._check_finite)

    def _check_finite(self, scores: Scores) -> None:
        if not torch.isfinite(scores.loss):
            raise Diverged(
                f"the loss is {scores.loss.item()} at step {self.global_step}: training diverged or a batch is broken;"
                " try a smaller optimizer.lr",
                step=self.global_step,
            )


def build_schedule(factory: ScheduleFactory, optimizer: Optimizer, steps: int | None) -> LRScheduler:
    """Call a schedule's factory: those of transformers need the number of steps, those of torch do not take it.

    steps: of the whole training, None where it ends by time alone
    """
    options = {"num_training_steps": steps} if "num_training_steps" in inspect.signature(factory).parameters else {}
    return factory(optimizer=optimizer, **options)


def planned_steps(trainer: Trainer) -> int | None:
    """Return the number of optimizer steps of a whole fit; None where it ends by time alone."""
    steps = trainer.estimated_stepping_batches
    return None if math.isinf(steps) else int(steps)


def time_limit(trainer: Trainer) -> Timer | None:
    """Return Lightning's timer of a trainer with `max_time`."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it
    return next((callback for callback in callbacks if isinstance(callback, Timer)), None)


def advance(schedule: LRScheduler, steps: int) -> None:
    """Take steps of a schedule without those of its optimizer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before")
        for _ in range(steps):
            schedule.step()


def keep_options(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's saved state with the options of `optimizer`: its learning rate, weight decay and so on."""
    pairs = zip(optimizer.param_groups, state["param_groups"], strict=True)
    return {**state, "param_groups": [{**own, "params": saved["params"]} for own, saved in pairs]}


def check_precision(trainer: Trainer) -> None:
    """Raise ConfigError for a precision that changes the dtype of the client's weights."""
    if trainer.precision not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision={trainer.precision} would change the client's weights, and what is trained, to another "
            f"type than the servers' replies: choose {' or '.join(PRECISIONS)}. What travels is a matter of "
            "swarm.wire_format and swarm.grad_format, what the servers compute with, of swarm.quantization",
            key="trainer.precision",
            seen=trainer.precision,
        )

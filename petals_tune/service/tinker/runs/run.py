"""Training runs: each an adapter and an optimizer of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from petals_tune.errors import ConfigError, Diverged
from petals_tune.files import filling
from petals_tune.losses import LOSSES
from petals_tune.losses.base import Loss
from petals_tune.service.tinker.encryption import encrypt_files
from petals_tune.service.tinker.records import LoRA, RunRecord
from petals_tune.service.tinker.wire import Datum, TrainingRequest

OPTIMIZER_FILE, GRADIENTS_FILE = "optimizer.safetensors", "gradients.safetensors"
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
_STATE = ("exp_avg", "exp_avg_sq", "step")


class TrainedModel(Protocol):
    """The model with its adapters (petals_tune/service/tinker/runs/adapters.py). Thread-safe."""

    def create(self, adapter: str, lora: LoRA) -> None: ...

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """Trained tensors, by names that do not depend on the adapter's."""
        ...

    def score(
        self,
        adapter: str,
        data: Sequence[Datum],
        loss_of: Callable[[int, torch.Tensor], torch.Tensor],
        *,
        backward: bool,
    ) -> list[torch.Tensor]:
        """Return log-probabilities (S,) of the targets of each text.

        With `backward`, adds the gradient of the sum of the losses: `loss_of` is given the number of a text and its
        log-probabilities (S,), and returns its loss ().
        """
        ...

    def save(self, adapter: str, partial: Path) -> None:
        """In PEFT's format, into a folder that is being filled."""
        ...

    def load(self, adapter: str, folder: Path) -> None:
        """Put the tensors of a saved adapter into this one."""
        ...

    def remove(self, adapter: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class AdamOptions:
    """Of one step; Tinker's names and defaults. Source: Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW)."""

    learning_rate: NonNegative = 1e-4
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: NonNegative = 1e-12
    weight_decay: NonNegative = 0.0
    grad_clip_norm: float = 0.0  # 0 or less: gradients are not clipped


class Run:
    """One run. Its methods are called by one thread at a time."""

    def __init__(self, record: RunRecord, model: TrainedModel):
        """Of an adapter that `model` knows by the id of the record."""
        self.record, self.model = record, model
        self.steps = 0
        self._parameters = model.parameters(record.id)
        self._optimizer = torch.optim.AdamW(self._parameters.values())
        self._loss, self._weight = 0.0, 0.0  # of the gradients so far

    def forward(self, request: TrainingRequest) -> tuple[list[torch.Tensor], float]:
        """(Log-probabilities of all targets, sum of the losses); adds to the gradients, unless it is forward only.

        Raises ConfigError for a loss that is not known, or inputs that do not fit it, Diverged for a loss or a gradient
        that is not finite, and what the model raises; then no gradient was added.
        """
        loss = find_loss(request.loss)
        if not request.data:
            raise ConfigError("at least one datum is needed", key="data")
        for datum in request.data:  # before anything is computed
            loss(torch.zeros(len(datum.ids)), datum.inputs, request.options)
        losses = [0.0] * len(request.data)

        def loss_of(row: int, logprobs: torch.Tensor) -> torch.Tensor:
            value = loss(logprobs, request.data[row].inputs, request.options)
            losses[row] = value.item()
            if not math.isfinite(losses[row]):
                raise Diverged(f"{request.loss} of text {row} is {losses[row]}: no gradient was added")
            return value

        if request.forward_only:
            return self.model.score(self.record.id, request.data, loss_of, backward=False), math.fsum(losses)
        with self._adding_gradients():
            logprobs = self.model.score(self.record.id, request.data, loss_of, backward=True)
        total = math.fsum(losses)
        self._loss += total
        self._weight += sum(_counted(datum) for datum in request.data)
        return logprobs, total

    def step(self, options: AdamOptions) -> dict[str, float]:
        """Take a step by the gradients so far, which are 0 afterwards. Raises Diverged where they are not finite.

        Returns their norm before it was clipped, and the mean loss of the tokens that count, by their weights.
        """
        loss, weight, self._loss, self._weight = self._loss, self._weight, 0.0, 0.0
        gradients = [each.grad for each in self._parameters.values() if each.grad is not None]
        norm = torch.stack([each.norm() for each in gradients]).norm() if gradients else torch.zeros(())
        if not bool(norm.isfinite()):
            self._optimizer.zero_grad()
            raise Diverged(f"the gradients have the norm {norm.item()}: they are dropped, and no weight was changed")
        if options.grad_clip_norm > 0 and gradients:
            nn.utils.clip_grad_norm_(self._parameters.values(), options.grad_clip_norm)
        self._optimizer.param_groups[0].update(
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            weight_decay=options.weight_decay,
        )
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps += 1
        return {"grad_norm": norm.item(), **({"loss": loss / weight} if weight else {})}

    @property
    def unfinished(self) -> tuple[float, float]:
        """(Sum of the losses, sum of the weights of tokens) of the gradients so far."""
        return self._loss, self._weight

    @unfinished.setter
    def unfinished(self, values: tuple[float, float]) -> None:
        self._loss, self._weight = values

    def save(
        self, folder: Path, *, with_optimizer: bool, with_gradients: bool = False, recipients: Sequence[Any] = ()
    ) -> int:
        """Save a checkpoint, whole or not at all, encrypted where there are `recipients`; returns its bytes."""
        with filling(folder) as partial:
            self.model.save(self.record.id, partial)
            if with_optimizer:
                save_file(self._optimizer_tensors(), partial / OPTIMIZER_FILE)
            if with_gradients:
                grads = {name: each.grad for name, each in self._parameters.items() if each.grad is not None}
                save_file(grads, partial / GRADIENTS_FILE)
            if recipients:
                encrypt_files(partial, recipients)
        return sum(file.stat().st_size for file in folder.iterdir())

    def load(self, folder: Path, *, with_optimizer: bool) -> None:
        """Go on from a checkpoint, with the gradients in it.

        Raises ConfigError where it is damaged, or has no optimizer and one is wanted; then nothing was changed.
        """
        optimizer = _tensors(folder / OPTIMIZER_FILE) if with_optimizer else {}
        gradients = _tensors(folder / GRADIENTS_FILE) if (folder / GRADIENTS_FILE).exists() else {}
        self.model.load(self.record.id, folder)
        self._optimizer = torch.optim.AdamW(self._parameters.values())
        for name, parameter in self._parameters.items():
            if f"{name}:step" in optimizer:
                self._optimizer.state[parameter] = {part: optimizer[f"{name}:{part}"] for part in _STATE}
            parameter.grad = gradients.get(name)
        self._loss, self._weight = 0.0, 0.0

    @contextmanager
    def _adding_gradients(self) -> Iterator[None]:
        """Add the gradients of the block to those before, all of them or, where it raises, none."""
        before = {name: each.grad for name, each in self._parameters.items()}
        try:
            self._optimizer.zero_grad()
            yield
            if not all(bool(each.grad.isfinite().all()) for each in self._parameters.values() if each.grad is not None):
                raise Diverged("gradients are not finite: none was added")
        except BaseException:
            for name, each in self._parameters.items():
                each.grad = before[name]
            raise
        for name, each in self._parameters.items():
            if (earlier := before[name]) is not None:
                each.grad = earlier if each.grad is None else each.grad + earlier

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}:{part}": self._optimizer.state[parameter][part]
            for name, parameter in self._parameters.items()
            for part in _STATE
            if parameter in self._optimizer.state
        }


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file.name} of this checkpoint cannot be read: {error}", key="path") from None


def find_loss(name: str) -> Loss:
    """Return the loss of this name. Raises ConfigError where there is none, with what to use instead."""
    if name in LOSSES:
        return LOSSES[name]
    instead = "forward_backward_custom takes any loss"
    if name == "stable_reinforce":
        instead = "its formula is not public; use importance_sampling, ppo, cispo or gspo"
    raise ConfigError(
        f"the loss {name!r} is not computed here ({', '.join(LOSSES)} are): {instead}", key="loss_fn", seen=name
    )


def _counted(datum: Datum) -> float:
    """By how much the tokens of a text count: the sum of their weights, or those with an advantage that is not 0.

    Weights of custom losses are gradients of either sign.
    """
    if (weights := datum.inputs.get("weights")) is not None:
        return float(weights.abs().sum())
    if (advantages := datum.inputs.get("advantages")) is not None:
        return float((advantages != 0).sum())
    return float(len(datum.ids))

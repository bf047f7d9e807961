"""Training runs: each an adapter and an optimizer of its own, whose requests are done in their order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from petals_tune.errors import ConfigError, Diverged
from petals_tune.files import filling
from petals_tune.losses import LOSSES
from petals_tune.service.tinker.encryption import encrypt_files
from petals_tune.service.tinker.store import LoRA, RunRecord
from petals_tune.service.tinker.wire import Datum, TrainingRequest

OPTIMIZER_FILE = "optimizer.safetensors"
_STATE = ("exp_avg", "exp_avg_sq", "step")


class TrainedModel(Protocol):
    """The model with its adapters. Thread-safe."""

    def create(self, adapter: str, lora: LoRA) -> None: ...

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """Trained tensors by names that do not depend on the adapter's."""
        ...

    def logprobs(self, adapter: str, data: Sequence[Datum]) -> list[torch.Tensor]:
        """Log-probabilities (S,) of the targets of each text, differentiable in the adapter."""
        ...

    def save(self, adapter: str, folder: Path) -> None:
        """In PEFT's format."""
        ...

    def load(self, adapter: str, folder: Path) -> None:
        """Put the tensors of a saved adapter into this one."""
        ...

    def remove(self, adapter: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class AdamOptions:
    """Of one step; Tinker's names and defaults. Source: Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW)."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0  # 0: gradients are not clipped


class Turns:
    """Lets requests through in the order of their numbers, from 1 on, in whatever order they come."""

    def __init__(self, done: int = 0) -> None:
        self._next = done + 1
        self._waiting: dict[int, asyncio.Event] = {}

    @asynccontextmanager
    async def turn(self, number: int) -> AsyncIterator[None]:
        """Wait for the turn of request `number`. Raises ConfigError for one whose turn is over."""
        if number < self._next:
            raise ConfigError(
                f"request {number} of this model was done already: the next one is {self._next}",
                key="seq_id",
                seen=number,
            )
        if number > self._next:
            await self._waiting.setdefault(number, asyncio.Event()).wait()
        try:
            yield
        finally:
            self._next = number + 1
            if event := self._waiting.pop(self._next, None):
                event.set()


@dataclass(eq=False)
class Run:
    """One run. Its methods that compute are called by one thread at a time, under `turns`."""

    record: RunRecord
    model: TrainedModel
    turns: Turns = field(default_factory=Turns)

    def __post_init__(self) -> None:
        self._parameters = self.model.parameters(self.record.id)
        self._optimizer = torch.optim.AdamW(self._parameters.values())
        self.steps = 0
        self._loss, self._tokens = 0.0, 0  # of the gradients so far

    def forward(self, request: TrainingRequest) -> tuple[list[torch.Tensor], float]:
        """(Log-probabilities of all targets, sum of the losses); adds to the gradients, unless it is forward only.

        Raises ConfigError for a loss that is not known, or inputs that do not fit it, and Diverged for a loss that is
        not finite; then no gradient was added.
        """
        loss = LOSSES.get(request.loss)
        if loss is None:
            known = ", ".join(LOSSES)
            raise ConfigError(
                f"the loss {request.loss!r} is not computed here: {known}, or forward_backward_custom",
                key="loss_fn",
                seen=request.loss,
            )
        if not request.data:
            raise ConfigError("at least one datum is needed", key="data")
        with torch.set_grad_enabled(not request.forward_only):
            logprobs = self.model.logprobs(self.record.id, request.data)
            terms = [
                loss(each, datum.inputs, request.options) for each, datum in zip(logprobs, request.data, strict=True)
            ]
            total = torch.stack(terms).sum()
        if not bool(total.isfinite()):
            raise Diverged(f"the sum of {request.loss} over {len(terms)} texts is {total.item()}")
        if not request.forward_only:
            total.backward()
            self._loss += total.item()
            self._tokens += sum(_counted(datum) for datum in request.data)
        return [each.detach() for each in logprobs], total.item()

    def step(self, options: AdamOptions) -> dict[str, float]:
        """Take a step by the gradients so far, which are 0 afterwards. Raises Diverged where they are not finite.

        Returns their norm before it was clipped, and the loss for each token of theirs that counts, if there is one.
        """
        loss, tokens, self._loss, self._tokens = self._loss, self._tokens, 0.0, 0
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
        return {"grad_norm": norm.item(), **({"loss": loss / tokens} if tokens else {})}

    def save(self, folder: Path, *, with_optimizer: bool, recipients: Sequence[Any] = ()) -> int:
        """Save a checkpoint, whole or not at all, encrypted where there are `recipients`; returns its bytes."""
        with filling(folder) as partial:
            self.model.save(self.record.id, partial)
            if with_optimizer:
                save_file(self._optimizer_tensors(), partial / OPTIMIZER_FILE)
            if recipients:
                encrypt_files(partial, recipients)
        return sum(file.stat().st_size for file in folder.iterdir())

    def load(self, folder: Path, *, with_optimizer: bool) -> None:
        """Go on from a checkpoint. Raises ConfigError where it is damaged, or has no optimizer and one is wanted."""
        self.model.load(self.record.id, folder)
        self._optimizer = torch.optim.AdamW(self._parameters.values())
        if with_optimizer:
            self._load_optimizer(folder / OPTIMIZER_FILE)

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}:{part}": self._optimizer.state[parameter][part]
            for name, parameter in self._parameters.items()
            for part in _STATE
            if parameter in self._optimizer.state
        }

    def _load_optimizer(self, file: Path) -> None:
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"the optimizer of this checkpoint cannot be read: {error}", key="path") from None
        for name, parameter in self._parameters.items():
            if f"{name}:step" in tensors:
                self._optimizer.state[parameter] = {part: tensors[f"{name}:{part}"] for part in _STATE}


def _counted(datum: Datum) -> int:
    """Tokens with a weight or an advantage that is not 0."""
    given = next((datum.inputs[name] for name in ("weights", "advantages") if name in datum.inputs), None)
    return len(datum.ids) if given is None else int((given != 0).sum())


async def in_thread(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run `work` in a thread, to its end also where who waits is cancelled: a run stays whole."""
    return await asyncio.shield(asyncio.to_thread(work, *args, **options))

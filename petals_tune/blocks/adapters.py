"""Clients' adapters on the server's blocks: LoRA on linears and prompts at block inputs, by hooks.

A hook reads the plan of the current call, never state of its module, so it does not care how a weight is stored, and
clients with different adapters share the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from petals_tune.errors import RequestRefused
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.span import BlockSpan

SEED_STEP = 1_000_003  # blocks draw their dropout from seeds far apart, so that any cut into spans draws the same


@dataclass(frozen=True)
class Adapter:
    """What a client sent for some blocks, as leaves that gradients are taken at."""

    parts: tuple[AdapterPart, ...]

    def on(self, span: BlockSpan) -> Adapter:
        return Adapter(tuple(part for part in self.parts if part.block in span))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """What the hooks do during one call."""

    lora: dict[tuple[int, str], list[AdapterPart]]  # several where several adapters are active
    prompts: dict[int, torch.Tensor]
    train: bool
    seed: int

    @classmethod
    def of(cls, adapter: Adapter | None, *, train: bool, seed: int) -> CallPlan:
        parts = adapter.parts if adapter is not None else ()
        lora: dict[tuple[int, str], list[AdapterPart]] = {}
        for part in parts:
            if part.method == "lora":
                lora.setdefault((part.block, part.module), []).append(part)
        return cls(
            lora=lora,
            prompts={part.block: part.tensors[0] for part in parts if part.method == "prompt"},
            train=train,
            seed=seed,
        )


class AdapterHooks:
    """The hooks on a list of blocks, numbered from `first_block`. `plan` is that of the call that runs now."""

    def __init__(self, blocks: Sequence[nn.Module], first_block: int):
        self._plan: CallPlan | None = None
        self._blocks = dict(enumerate(blocks, first_block))
        self._modules: dict[tuple[int, str], nn.Module] = {}
        for block, module in self._blocks.items():
            for path, inner in module.named_modules():
                if isinstance(inner, nn.Linear) or type(inner).__name__ == "Conv1D":
                    self._modules[block, path] = inner
        self._hooked: set[int | tuple[int, str]] = set()

    @property
    def plan(self) -> CallPlan | None:
        return self._plan

    @plan.setter
    def plan(self, plan: CallPlan | None) -> None:
        self._plan = plan
        if plan is not None:
            self._hook(plan)

    def _hook(self, plan: CallPlan) -> None:
        """Add the hooks that `plan` is the first to need: one that has nothing to do costs a token 1 % of its time."""
        for name in plan.lora.keys() - self._hooked:
            self._modules[name].register_forward_hook(self._at_linear(name))
            self._hooked.add(name)
        if plan.train or plan.prompts:
            for block in self._blocks.keys() - self._hooked:
                self._blocks[block].register_forward_pre_hook(self._at_block(block))
                self._hooked.add(block)

    def check(self, parts: Sequence[AdapterPart], hidden_size: int) -> None:
        """Raises RequestRefused for a part that does not fit these blocks."""
        prompted: set[int] = set()
        for part in parts:
            where = f"adapter on block {part.block} {part.module}".rstrip()
            shapes = [tuple(tensor.shape) for tensor in part.tensors]
            if any(not t.is_floating_point() or not torch.isfinite(t).all() for t in part.tensors):
                raise RequestRefused(f"{where}: its tensors are not finite floats")
            if not math.isfinite(part.scaling):
                raise RequestRefused(f"{where}: its scaling is {part.scaling}")
            if part.method == "prompt":
                if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] != hidden_size:
                    raise RequestRefused(f"{where}: prompts are one tensor (P, {hidden_size}), not {shapes}")
                if part.block in prompted:
                    raise RequestRefused(f"{where}: prompts twice")
                prompted.add(part.block)
                continue
            linear = self._modules.get((part.block, part.module))
            if part.method != "lora" or linear is None:
                raise RequestRefused(f"{where}: there is no linear for a {part.method!r} there")
            wide = _features(linear)
            fits = len(shapes) == 2 and shapes[0][1:] == wide[:1] and shapes[1] == (wide[1], shapes[0][0])
            if not fits or not shapes[0][0]:
                raise RequestRefused(
                    f"{where}: LoRA on {wide} needs A (r, {wide[0]}) and B ({wide[1]}, r), not {shapes}"
                )

    def _at_block(self, block: int) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            plan = self.plan
            if plan is None:
                return None
            if plan.train:
                _seed(args[0].device, (plan.seed + SEED_STEP * block) % 2**63)
            prompt = plan.prompts.get(block)
            if prompt is None:
                return None
            hidden = args[0]
            padding = (0, 0, 0, hidden.shape[1] - prompt.shape[0])
            return (hidden + F.pad(prompt, padding).to(hidden.dtype), *args[1:])

        return hook

    def _at_linear(self, name: tuple[int, str]) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            plan = self.plan
            if plan is None or name not in plan.lora:
                return None
            for part in plan.lora[name]:
                a, b = part.tensors
                inside = F.dropout(args[0].to(a.dtype), part.dropout, training=plan.train)
                output = output + (F.linear(F.linear(inside, a), b) * part.scaling).to(output.dtype)
            return output

        return hook


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generator of `device` alone: torch.manual_seed asks every backend, 1 ms on a machine without CUDA."""
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    generator.manual_seed(seed)


def _features(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear, quantized or not, or of GPT-2's Conv1D."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    wide_in, wide_out = linear.get_parameter("weight").shape
    return wide_in, wide_out

"""Clients' adapters on shared blocks, applied by hooks.

A hook reads the plan of the current call, never state of its module: it does not matter how a weight is stored, and
clients with different adapters share the blocks. What a method computes is in `petals_tune.adapters`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from petals_tune.adapters import METHODS, AdapterMethod
from petals_tune.adapters.base import linear_features, refusal
from petals_tune.blocks.experts.stack import ExpertStack
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.span import BlockSpan

MAX_PARTS_A_MODULE = 8  # of one adapter; PEFT sends one for each adapter that is active, and each keeps its own tensors
SEED_STEP = 1_000_003  # blocks draw their dropout from seeds far apart, so that any cut into spans draws the same

Place = tuple[int, str]  # a block's number, and the path of a module inside it; "": the block itself
Parts = Mapping[Place, Sequence[tuple[AdapterMethod, AdapterPart]]]


@dataclass(frozen=True)
class Adapter:
    """What a client sent for some blocks, as leaves that gradients are taken at."""

    parts: tuple[AdapterPart, ...]

    def on(self, span: BlockSpan) -> Adapter:
        return Adapter(tuple(part for part in self.parts if part.block in span))

    @cached_property
    def after_first_step(self) -> Adapter:
        """What remains of it in a generation session once the first positions are in the caches."""
        return Adapter(tuple(part for part in self.parts if not METHODS[part.method].first_step_only))

    def check_positions(self, positions: int) -> None:
        """Raises RequestRefused for a sequence that is too short for a part."""
        for part in self.parts:
            if (least := METHODS[part.method].least_positions(part)) > positions:
                raise refusal(
                    part,
                    f"a {part.method} of {least} positions in a sequence of {positions}; a session's first step has "
                    f"to hold the whole {part.method}",
                )

    @cached_property
    def by_place(self) -> tuple[Parts, Parts]:
        """The parts at inputs and the parts at outputs, by their places; made once for all steps of a session."""
        at_input: dict[Place, list[tuple[AdapterMethod, AdapterPart]]] = {}
        at_output: dict[Place, list[tuple[AdapterMethod, AdapterPart]]] = {}
        for part in self.parts:
            method = METHODS[part.method]
            parts = at_input if method.is_at_input(part) else at_output
            parts.setdefault((part.block, part.module), []).append((method, part))
        return at_input, at_output

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """What the hooks do during one call. A place has several parts where several adapters are active."""

    at_input: Parts
    at_output: Parts
    train: bool
    seed: int
    of_experts: dict[int, Sequence[Any]] = field(default_factory=dict)  # by part: what it has for each expert

    @classmethod
    def of(cls, adapter: Adapter | None, *, train: bool, seed: int) -> CallPlan:
        at_input, at_output = ({}, {}) if adapter is None else adapter.by_place
        return cls(at_input=at_input, at_output=at_output, train=train, seed=seed)


class AdapterHooks:
    """The hooks on a list of blocks, numbered from `first_block`. `plan` is that of the call that runs now."""

    def __init__(self, blocks: Sequence[nn.Module], first_block: int):
        self._plan: CallPlan | None = None
        self._blocks: list[Place] = [(number, "") for number in range(first_block, first_block + len(blocks))]
        self._modules: dict[Place, nn.Module] = {
            (number, path): module
            for number, block in enumerate(blocks, first_block)
            for path, module in block.named_modules()
            if path == "" or linear_features(module) is not None or isinstance(module, ExpertStack)
        }
        self._with_input_hook: set[Place] = set()
        self._with_output_hook: set[Place] = set()

    @property
    def plan(self) -> CallPlan | None:
        return self._plan

    @plan.setter
    def plan(self, plan: CallPlan | None) -> None:
        self._plan = plan
        if plan is not None:
            self._add_hooks(plan)

    def _add_hooks(self, plan: CallPlan) -> None:
        """Add the hooks that `plan` is the first to need: one that has nothing to do costs a token 1 % of its time."""
        for place in plan.at_output.keys() - self._with_output_hook:
            module = self._modules[place]
            hook = self._expert_hook(place) if isinstance(module, ExpertStack) else self._output_hook(place)
            module.register_forward_hook(hook)
            self._with_output_hook.add(place)
        at_input = {*plan.at_input, *self._blocks} if plan.train else set(plan.at_input)
        for place in at_input - self._with_input_hook:
            self._modules[place].register_forward_pre_hook(self._input_hook(place))
            self._with_input_hook.add(place)

    def check_places(self, parts: Sequence[AdapterPart]) -> None:
        """Raises RequestRefused for a part that has no place on these blocks, by its names alone: takes no memory."""
        at_place: Counter[Place] = Counter()
        seen: set[tuple[str, Place]] = set()
        for part in parts:
            method, place = METHODS.get(part.method), (part.block, part.module)
            if method is None:
                raise refusal(part, f"{part.method!r} is not one of {', '.join(METHODS)}, which this server knows")
            if place not in self._modules:
                raise refusal(part, f"there is nothing for a {part.method!r} there")
            if method.once_a_module and (part.method, place) in seen:
                raise refusal(part, f"a {part.method} twice")
            seen.add((part.method, place))
            at_place[place] += 1
            if at_place[place] > MAX_PARTS_A_MODULE:
                raise refusal(
                    part, f"more than {MAX_PARTS_A_MODULE} parts on one module; merge adapters before training"
                )

    def check(self, parts: Sequence[AdapterPart], hidden_size: int) -> None:
        """Raises RequestRefused for a part that does not fit these blocks."""
        self.check_places(parts)
        for part in parts:
            if any(not tensor.is_floating_point() or not torch.isfinite(tensor).all() for tensor in part.tensors):
                raise refusal(part, "its tensors are not finite floats")
            if not math.isfinite(part.scaling):
                raise refusal(part, f"its scaling is {part.scaling}")
            METHODS[part.method].check(part, self._modules[part.block, part.module], hidden_size)

    def _input_hook(self, place: Place) -> Callable[..., tuple[Any, ...] | None]:
        block, path = place

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            plan = self.plan
            if plan is None:
                return None
            if plan.train and path == "":
                _seed(args[0].device, (plan.seed + SEED_STEP * block) % 2**63)
            if place not in plan.at_input:
                return None
            x = args[0]
            for method, part in plan.at_input[place]:
                x = method.change_input(part, x, training=plan.train)
            return (x, *args[1:])

        return hook

    def _output_hook(self, place: Place) -> Callable[..., torch.Tensor | None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            plan = self.plan
            if plan is None or place not in plan.at_output:
                return None
            for method, part in plan.at_output[place]:
                output = method.change_output(part, args[0], output, training=plan.train)
            return output

        return hook

    def _expert_hook(self, place: Place) -> Callable[..., torch.Tensor | None]:
        def hook(stack: ExpertStack, args: tuple[torch.Tensor, int], output: torch.Tensor) -> torch.Tensor | None:
            plan = self.plan
            if plan is None or place not in plan.at_output:
                return None
            x, expert = args
            for method, part in plan.at_output[place]:
                if id(part) not in plan.of_experts:
                    plan.of_experts[id(part)] = method.split(part, stack.for_adapters)
                output = method.change_product(part, plan.of_experts[id(part)][expert], x, output)
            return output

        return hook


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generator of `device` alone: torch.manual_seed asks every backend, 1 ms on a machine without CUDA."""
    if device.type == "mps":
        torch.mps.manual_seed(seed)
        return
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    generator.manual_seed(seed)

"""Clients' adapters on shared blocks, applied by hooks.

A hook reads the plan of the current call, never state of its module: it does not matter how a weight is stored, and
clients with different adapters share the blocks. What a method computes is in `petals_tune.adapters`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from petals_tune.adapters import METHODS, AdapterMethod
from petals_tune.adapters.base import PositionBytes, linear_features, refusal
from petals_tune.blocks.adapter_stacks import AdapterStacks, Group, Layout, Parts, Place
from petals_tune.blocks.experts.stack import ExpertStack
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.span import BlockSpan

MAX_PARTS_A_MODULE = 8  # of one adapter; PEFT sends one for each adapter that is active, and each keeps its own tensors
SEED_STEP = 1_000_003  # blocks draw their dropout from seeds far apart, so that any cut into spans draws the same

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Adapter:
    """What a client sent for some blocks, as leaves that gradients are taken at."""

    parts: tuple[AdapterPart, ...]
    _position_bytes: dict[tuple[int, bool], PositionBytes] = field(default_factory=dict, compare=False, repr=False)

    def on(self, span: BlockSpan) -> Adapter:
        return Adapter(tuple(part for part in self.parts if part.block in span))

    @property
    def after_first_step(self) -> Adapter:
        """What remains of it in a generation session once the first positions are in the caches."""
        return self._rest or self

    @cached_property
    def _rest(self) -> Adapter | None:
        """What remains after the first step, where that is not all: one that held itself would outlive its session."""
        parts = tuple(part for part in self.parts if not METHODS[part.method].first_step_only)
        return None if len(parts) == len(self.parts) else Adapter(parts)

    def check_positions(self, positions: int) -> None:
        """Raises RequestRefused for a sequence that is too short for a part."""
        for part in self.parts:
            if (least := METHODS[part.method].least_positions(part)) > positions:
                raise refusal(
                    part,
                    f"a {part.method} of {least} positions in a sequence of {positions}; a session's first step has "
                    f"to hold the whole {part.method}",
                )

    def position_bytes(self, expert_rows: int, *, training: bool) -> PositionBytes:
        """What all its parts keep for each position of a row, and the most beside that while one of them is applied.

        `expert_rows`: how many rows experts multiply for a position. Found once: batches ask at each step.
        """
        key = expert_rows, training
        if key not in self._position_bytes:
            kept, working = 0, 0
            for part in self.parts:
                method = METHODS[part.method]
                each, rows = method.position_bytes(part, training=training), expert_rows if method.on_experts else 1
                kept, working = kept + rows * each.kept, max(working, rows * each.working)
            self._position_bytes[key] = PositionBytes(kept, working)
        return self._position_bytes[key]

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

    @cached_property
    def number(self) -> int:
        """A number that no other adapter of this process has, now or later."""
        return next(_numbers)

    @cached_property
    def identity(self) -> tuple[int, ...]:
        """Which parts it has, whatever they hold: equal for what several sessions were given of one upload."""
        return tuple(map(id, self.parts))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors]

    @cached_property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """What the hooks do during one call. A place has several parts where several adapters are active.

    Where sessions with different adapters share the call, `sessions` has the plan of each, `groups` those of neighbours
    with the same adapter as one, and the hooks give it a `layout`; `at_input` and `at_output` are of one adapter alone.
    """

    at_input: Parts = field(default_factory=dict)
    at_output: Parts = field(default_factory=dict)
    train: bool = False
    seed: int = 0
    of_experts: dict[int, Sequence[Any]] = field(default_factory=dict)  # by part: what it has for each expert
    sessions: Sequence[CallPlan] = ()
    groups: Sequence[Group] = ()
    layout: Layout | None = None

    @classmethod
    def of(cls, adapter: Adapter | None, *, train: bool, seed: int) -> CallPlan:
        at_input, at_output = ({}, {}) if adapter is None else adapter.by_place
        return cls(at_input=at_input, at_output=at_output, train=train, seed=seed)

    @classmethod
    def of_sessions(cls, sessions: Sequence[tuple[Adapter | None, int]]) -> CallPlan:
        """The plan of a generation step that several sessions share: the adapter of each, and how many rows it has."""
        plans: list[CallPlan] = []
        groups: list[Group] = []
        last: tuple[int, ...] | None = None
        for adapter, rows in sessions:
            identity = () if adapter is None else adapter.identity
            if identity == last:
                plans.append(plans[-1])
                groups[-1] = groups[-1]._replace(rows=groups[-1].rows + rows)
            else:
                plans.append(cls.of(adapter, train=False, seed=0))
                groups.append(Group(plans[-1], adapter, 0 if adapter is None else adapter.number, rows))
            last = identity
        return plans[0] if len(groups) == 1 else cls(sessions=plans, groups=groups)

    def changes_input(self, place: Place) -> bool:
        return place in (self.at_input if self.layout is None else self.layout.at_input)

    def changes_output(self, place: Place) -> bool:
        return place in (self.at_output if self.layout is None else self.layout.at_output)

    def change_input(self, place: Place, x: torch.Tensor) -> torch.Tensor:
        """The input to use instead of `x` (B, ..., in)."""
        if self.layout is not None:
            return self.layout.change_input(self.groups, place, x)
        for method, part in self.at_input[place]:
            x = method.change_input(part, x, training=self.train)
        return x

    def change_output(self, place: Place, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output to use instead of `output` (B, ..., out), which the module computed from `x` (B, ..., in)."""
        if self.layout is not None:
            return self.layout.change_output(self.groups, place, x, output)
        for method, part in self.at_output[place]:
            output = method.change_output(part, x, output, training=self.train)
        return output

    def change_product(
        self, place: Place, stack: ExpertStack, expert: int, x: torch.Tensor, product: torch.Tensor
    ) -> torch.Tensor:
        """The product to use instead of that of rows `x` with one expert's matrix.

        Raises RuntimeError where rows of several sessions are routed together: nobody knows whose each is.
        """
        if self.layout is not None:
            raise RuntimeError(f"experts at {place} compute rows of several sessions at once")
        for method, part in self.at_output[place]:
            if id(part) not in self.of_experts:
                self.of_experts[id(part)] = method.split(part, stack.for_adapters)
            product = method.change_product(part, self.of_experts[id(part)][expert], x, product)
        return product


class AdapterHooks:
    """The hooks on a list of blocks, numbered from `first_block`. `plan` is that of the call that runs now."""

    def __init__(self, blocks: Sequence[nn.Module], first_block: int):
        self.stacks = AdapterStacks()
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
        if plan is not None and plan.groups:
            plan = replace(plan, layout=self.stacks.layout(plan.groups))
        self._plan = plan
        if plan is not None:
            self._add_hooks(plan)

    @contextmanager
    def alone(self, session: int) -> Iterator[None]:
        """Within the block, modules compute rows of this one of the plan's sessions and of no other."""
        plan = self._plan
        if plan is not None and plan.sessions:
            self._plan = plan.sessions[session]
        try:
            yield
        finally:
            self._plan = plan

    def _add_hooks(self, plan: CallPlan) -> None:
        """Add the hooks that `plan` is the first to need: one that has nothing to do costs a token 1 % of its time."""
        at_input, at_output = set(plan.at_input), set(plan.at_output)
        if plan.layout is not None:
            at_input, at_output = plan.layout.at_input, plan.layout.at_output
        for place in at_output - self._with_output_hook:
            module = self._modules[place]
            hook = self._expert_hook(place) if isinstance(module, ExpertStack) else self._output_hook(place)
            module.register_forward_hook(hook)
            self._with_output_hook.add(place)
        if plan.train:
            at_input = at_input.union(self._blocks)
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
            return (plan.change_input(place, args[0]), *args[1:]) if plan.changes_input(place) else None

        return hook

    def _output_hook(self, place: Place) -> Callable[..., torch.Tensor | None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            plan = self.plan
            if plan is None or not plan.changes_output(place):
                return None
            return plan.change_output(place, args[0], output)

        return hook

    def _expert_hook(self, place: Place) -> Callable[..., torch.Tensor | None]:
        def hook(stack: ExpertStack, args: tuple[torch.Tensor, int], output: torch.Tensor) -> torch.Tensor | None:
            plan = self.plan
            if plan is None or not plan.changes_output(place):
                return None
            x, expert = args
            return plan.change_product(place, stack, expert, x, output)

        return hook


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generator of `device` alone: torch.manual_seed asks every backend, 1 ms on a machine without CUDA."""
    if device.type == "mps":
        torch.mps.manual_seed(seed)
        return
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    generator.manual_seed(seed)

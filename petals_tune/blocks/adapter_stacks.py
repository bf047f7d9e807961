"""Adapters of several sessions in one pass: parts of one shape on one module lie in shared tensors, for one product.

A loop over the sessions takes several operations for each of them in every module, and an operation costs more than
what it computes for one row. So a part is copied, once, into a slot of its module's stack, and rows of all sessions are
multiplied by a batched product, each by its own slot. Nothing of a slot reaches another session's row, whatever is in
it. What cannot be stacked is applied to the rows of its own session.

Source: the idea is that of Punica (Chen et al. 2023, arXiv:2310.18547) and S-LoRA (Sheng et al. 2023,
arXiv:2311.03285). Shapes: B rows of a call, P positions, G slots.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from petals_tune.adapters import AdapterMethod
from petals_tune.wire.adapter import AdapterPart

Place = tuple[int, str]  # a block's number, and the path of a module inside it; "": the block itself
Parts = Mapping[Place, Sequence[tuple[AdapterMethod, AdapterPart]]]

MAX_STACKED_BYTES = 2**28
_MOST_LAYOUTS = 64  # of batches, that are remembered
_IDLE_STEPS = 64  # an adapter that was in none of the last shared steps gives its slots to others
SLOTS_A_ROW = 2  # computed at the most: the others are of sessions that are not in the batch


class RowPlan(Protocol):
    """What one adapter does (blocks/adapters.py: CallPlan)."""

    @property
    def at_input(self) -> Parts: ...
    @property
    def at_output(self) -> Parts: ...
    def change_input(self, place: Place, x: torch.Tensor) -> torch.Tensor: ...
    def change_output(self, place: Place, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor: ...


class Group(NamedTuple):
    """Neighbouring rows of a call that have the same adapter, of one session or several."""

    plan: RowPlan
    adapter: object  # kept alive by its session; None: these rows have none
    number: int  # the adapter's, which no other has; 0: none
    rows: int


@dataclass(kw_only=True)
class _Stack:
    """Parts of one shape on one module, each in its slot."""

    tensors: Sequence[torch.Tensor]  # (G, ...)
    slots: dict[int, int | None] = field(default_factory=dict)  # by number of the adapter; None: its part fits in none

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class _Product(NamedTuple):
    """How rows of a call are changed by one stack. Without indices, row i is changed by slot i."""

    method: AdapterMethod
    tensors: Sequence[torch.Tensor]
    of_slots: torch.Tensor | None  # (G,): the row for each slot; any row where the slot's session is not in the batch
    rows: torch.Tensor | None  # the rows that are changed, and
    slots: torch.Tensor | None  # the slot of each

    def apply(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """`output` (B, P, out) with the rows of this stack changed; `x` is (B, P, in)."""
        if self.of_slots is None or self.rows is None or self.slots is None:
            return self.method.change_rows(self.tensors, x, output)
        changed = self.method.change_rows(self.tensors, x[self.of_slots], output[self.of_slots])
        return output.index_copy(0, self.rows, changed[self.slots])


class _Prepared(NamedTuple):
    products: Sequence[_Product]
    alone: Sequence[int]  # groups whose parts are applied to their own rows


class Layout:
    """Which slots and rows a batch with these adapters uses in each module; found where a module is first called."""

    def __init__(self, stacks: AdapterStacks, groups: Sequence[Group]):
        self._stacks = stacks
        self.numbers = {group.number for group in groups}
        self._sizes = [group.rows for group in groups]
        self._rows = sum(self._sizes)
        self.at_input = {place for group in groups for place in group.plan.at_input}
        self.at_output = {place for group in groups for place in group.plan.at_output}
        self._prepared: dict[tuple[bool, Place], _Prepared] = {}

    def change_input(self, groups: Sequence[Group], place: Place, x: torch.Tensor) -> torch.Tensor:
        """The input to use instead of `x` (B, ..., in)."""
        by_row = self._by_row(x)
        prepared, changed = self._prepare(groups, place, at_input=True, device=x.device), by_row
        for product in prepared.products:
            changed = product.apply(by_row, changed)
        if prepared.alone:
            pieces = list(changed.split(self._sizes))
            for number in prepared.alone:
                pieces[number] = groups[number].plan.change_input(place, pieces[number])
            changed = torch.cat(pieces)
        return changed.reshape(x.shape)

    def change_output(
        self, groups: Sequence[Group], place: Place, x: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """The output to use instead of `output` (B, ..., out), which the module computed from `x` (B, ..., in)."""
        by_row, changed = self._by_row(x), self._by_row(output)
        prepared = self._prepare(groups, place, at_input=False, device=output.device)
        for product in prepared.products:
            changed = product.apply(by_row, changed)
        if prepared.alone:
            inputs, pieces = by_row.split(self._sizes), list(changed.split(self._sizes))
            for number in prepared.alone:
                pieces[number] = groups[number].plan.change_output(place, inputs[number], pieces[number])
            changed = torch.cat(pieces)
        return changed.reshape(output.shape)

    def _by_row(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, P, features) of a module's input or output, which may have rows and positions in one dimension.

        Raises RuntimeError where it has other rows than the call.
        """
        if not len(tensor) or len(tensor) % self._rows:
            raise RuntimeError(f"{len(tensor)} rows in a module, and {self._rows} in the call")
        return tensor.reshape(self._rows, -1, tensor.shape[-1])

    def _prepare(self, groups: Sequence[Group], place: Place, *, at_input: bool, device: torch.device) -> _Prepared:
        if (found := self._prepared.get((at_input, place))) is not None:
            return found
        alike: dict[Hashable, list[tuple[int, int]]] = {}  # by kind of part: groups of one row, and which row it is
        alone, row = [], 0
        for number, group in enumerate(groups):
            parts = _parts(group, place, at_input=at_input)
            if group.rows == len(parts) == 1 and (kind := kind_of(*parts[0])) is not None:
                alike.setdefault(kind, []).append((number, row))
            elif parts:
                alone.append(number)
            row += group.rows
        products = []
        for kind, members in alike.items():
            used: list[tuple[int, int, int]] = []  # group, row, slot
            stack: _Stack | None = None
            for number, at_row in members if len(members) > 1 else ():
                ((method, part),) = _parts(groups[number], place, at_input=at_input)
                at = self._stacks.slot((place, kind), groups[number].number, method, part, self.numbers)
                if at is not None:
                    stack, slot = at  # which is another one where it had to be enlarged
                    used.append((number, at_row, slot))
            count = max((slot for *_, slot in used), default=0) + 1
            if stack is None or len(used) < 2 or count > SLOTS_A_ROW * len(used):
                used = []
            else:
                products.append(self._product(method, stack, count, used, device))
            alone += {number for number, _ in members} - {number for number, *_ in used}
        self._prepared[at_input, place] = _Prepared(products, sorted(alone))
        return self._prepared[at_input, place]

    def _product(
        self,
        method: AdapterMethod,
        stack: _Stack,
        count: int,
        used: Sequence[tuple[int, int, int]],
        device: torch.device,
    ) -> _Product:
        tensors, (_, rows, slots) = [each[:count] for each in stack.tensors], zip(*used, strict=True)
        if rows == slots == tuple(range(self._rows)):
            return _Product(method, tensors, None, None, None)
        of_slots = [0] * count
        for row, slot in zip(rows, slots, strict=True):
            of_slots[slot] = row
        indices = (torch.tensor(each, device=device) for each in (of_slots, rows, slots))
        return _Product(method, tensors, *indices)


def _parts(group: Group, place: Place, *, at_input: bool) -> Sequence[tuple[AdapterMethod, AdapterPart]]:
    return (group.plan.at_input if at_input else group.plan.at_output).get(place, ())


def kind_of(method: AdapterMethod, part: AdapterPart) -> Hashable | None:
    """Parts of equal kinds at one place can be in one stack; None: those of this kind go alone."""
    shape = method.stack_kind(part)
    return None if shape is None else (method.name, shape)


class AdapterStacks:
    """The stacks of a model's modules, and the layouts of the last batches. Used by the computing thread alone.

    They hold copies: an adapter that its session gave up is not kept alive.
    """

    def __init__(self, max_bytes: int = MAX_STACKED_BYTES):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._stacks: dict[tuple[Place, Hashable], _Stack] = {}
        self._layouts: dict[tuple[tuple[int, int], ...], Layout] = {}  # the latest last
        self._step = self._looked = 0
        self._last: dict[int, tuple[int, weakref.ref[object]]] = {}  # by number: last shared step, and the adapter

    def layout(self, groups: Sequence[Group]) -> Layout:
        """The layout of a batch's next step."""
        self._step += 1
        for group in groups:
            if group.number:
                self._last[group.number] = self._step, weakref.ref(group.adapter)
        key = tuple((group.number, group.rows) for group in groups)
        layout = self._layouts.pop(key, None)
        if layout is None:
            layout = Layout(self, groups)
            self._last = {number: last for number, last in self._last.items() if not self._is_idle(number)}
            if len(self._layouts) == _MOST_LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
        self._layouts[key] = layout  # as the latest
        return layout

    def slot(
        self, key: tuple[Place, Hashable], number: int, method: AdapterMethod, part: AdapterPart, present: set[int]
    ) -> tuple[_Stack, int] | None:
        """The stack of a place and kind, and the slot of adapter `number` there, with a copy of `part` in it.

        None where there is no room, or the part does not fit. Slots of the adapters `present` are in use.
        """
        stack = self._stacks.get(key)
        if stack is None or number not in stack.slots:
            stack, slot = self._free_slot(key, stack, method, part, present)
            if stack is None:
                return None
            stack.slots[number] = slot if method.put(stack.tensors, slot, part) else None
        at = stack.slots[number]
        return None if at is None else (stack, at)

    def _free_slot(
        self,
        key: tuple[Place, Hashable],
        stack: _Stack | None,
        method: AdapterMethod,
        part: AdapterPart,
        present: set[int],
    ) -> tuple[_Stack | None, int]:
        """The lowest slot that nobody uses, in a stack that is made or enlarged where it has none."""
        if stack is not None:
            idle = [number for number in stack.slots if number not in present and self._is_idle(number)]
            for number in idle:
                del stack.slots[number]
            if idle:
                self._layouts = {k: each for k, each in self._layouts.items() if each.numbers.isdisjoint(idle)}
            taken = set(stack.slots.values())
            free = next((slot for slot in range(len(stack.tensors[0])) if slot not in taken), None)
            if free is not None:
                return stack, free
        had = 0 if stack is None else len(stack.tensors[0])
        larger = _Stack(tensors=method.empty_stack(part, max(2 * had, 2)), slots={} if stack is None else stack.slots)
        if self.bytes + larger.bytes > self.max_bytes:
            self._drop_idle()
            if self.bytes + larger.bytes > self.max_bytes:
                return None, 0
        if stack is not None:
            for new, old in zip(larger.tensors, stack.tensors, strict=True):
                new[:had] = old
            self.bytes -= stack.bytes
            self._layouts.clear()  # they hold the old tensors
        self.bytes += larger.bytes
        self._stacks[key] = larger
        return larger, had

    def _is_idle(self, number: int) -> bool:
        step, adapter = self._last.get(number, (0, None))
        return adapter is None or adapter() is None or step < self._step - _IDLE_STEPS

    def _drop_idle(self) -> None:
        """Drop the stacks that no adapter uses any more; looked for once a step."""
        if self._looked == self._step:
            return
        self._looked = self._step
        used = {number for number in self._last if not self._is_idle(number)} | {0}
        self._stacks = {key: each for key, each in self._stacks.items() if not used.isdisjoint(each.slots)}
        self._layouts = {key: each for key, each in self._layouts.items() if each.numbers <= used}
        self.bytes = sum(stack.bytes for stack in self._stacks.values())

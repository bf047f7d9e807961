"""Stacks of adapters' parts: which slot has which adapter, what they take, and when they are given up."""

import gc
import weakref
from typing import Any

import pytest
import torch

from petals_tune.blocks.adapter_stacks import AdapterStacks
from petals_tune.blocks.adapters import Adapter, CallPlan
from petals_tune.wire.adapter import AdapterPart

PLACE = (0, "linear")
INPUTS, OUTPUTS = 6, 5


def lora(seed: int, rank: int = 2, **fields: Any) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rank, INPUTS, generator=generator), torch.randn(OUTPUTS, rank, generator=generator)]
    values = {"block": 0, "module": "linear", "method": "lora", "scaling": 0.5, "tensors": tensors, **fields}
    return Adapter((AdapterPart(**values),))


def expected(adapter: Adapter | None, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    if adapter is None:
        return output
    (part,) = adapter.parts
    a, b = (tensor.double() for tensor in part.tensors)
    return output + part.scaling * (x.double() @ a.t() @ b.t())


def step(stacks: AdapterStacks, *adapters: Adapter | None, positions: int = 1) -> int:
    """A step of sessions with these adapters through one linear; its rows are right. Returns how many go alone."""
    plan = CallPlan.of_sessions([(adapter, 1) for adapter in adapters])
    layout = stacks.layout(plan.groups)
    x, output = torch.randn(len(adapters), positions, INPUTS), torch.randn(len(adapters), positions, OUTPUTS)
    found = layout.change_output(plan.groups, PLACE, x.flatten(0, 1), output.flatten(0, 1)).view_as(output)
    for row, adapter in enumerate(adapters):
        torch.testing.assert_close(
            found[row].double(), expected(adapter, x[row], output[row]).double(), rtol=1e-5, atol=1e-5
        )
    return len(layout._prepared[False, PLACE].alone)


def slots(stacks: AdapterStacks, rank: int = 2) -> dict[int, int | None]:
    return stacks._stacks[PLACE, ("lora", rank)].slots


def test_rows_are_changed_by_their_own_slots_in_any_order_and_beside_rows_without_adapters():
    stacks, (a, b, c, d) = AdapterStacks(), [lora(seed) for seed in range(4)]
    for adapters in ([a, b], [b, a], [None, c, a, None, b, d], [d, c, b, a], [c, None, d]):
        assert step(stacks, *adapters) == 0
        assert step(stacks, *adapters, positions=3) == 0
    assert slots(stacks) == {a.number: 0, b.number: 1, c.number: 2, d.number: 3}


def test_ranks_that_are_alike_are_filled_up_and_others_have_stacks_of_their_own():
    stacks = AdapterStacks()
    assert step(stacks, lora(1, 3), lora(2, 4), lora(3, 64), lora(4, 33), lora(5, 1)) == 1, (
        "rank 1 has nobody beside it"
    )
    assert {kind for _, kind in stacks._stacks} == {("lora", 4), ("lora", 64)}


def test_few_sessions_do_not_compute_the_slots_of_many():
    stacks, many = AdapterStacks(), [lora(seed) for seed in range(8)]
    assert step(stacks, *many) == 0
    assert step(stacks, many[0], many[3]) == 0
    assert step(stacks, many[0], many[7]) == 2


def test_slots_of_sessions_that_have_ended_or_paused_are_used_again(monkeypatch):
    stacks, pause = AdapterStacks(), 5
    monkeypatch.setattr("petals_tune.blocks.adapter_stacks._IDLE_STEPS", pause)
    first, second, third = (lora(seed) for seed in range(3))
    step(stacks, first, second)
    ended = first.number
    del first
    gc.collect()
    step(stacks, second, third)
    assert slots(stacks) == {third.number: 0, second.number: 1}
    assert ended not in slots(stacks)
    others = [lora(seed) for seed in range(3, 5)]
    for _ in range(pause + 1):
        step(stacks, *others)  # enlarged: the others pause only
    assert len(slots(stacks)) == 4
    late = lora(5)
    step(stacks, others[0], late)
    assert third.number not in slots(stacks)
    assert slots(stacks)[late.number] == 0
    assert step(stacks, second, third, late) == 0, "a session that goes on has a slot again"


def test_where_there_is_no_room_parts_go_alone_and_stacks_of_ended_sessions_make_room():
    one = 4 * 2 * (INPUTS + OUTPUTS)
    stacks, adapters = AdapterStacks(max_bytes=2 * one), [lora(seed) for seed in range(3)]
    assert step(stacks, *adapters[:2]) == 0
    assert stacks.bytes == 2 * one
    for _ in range(2):
        assert step(stacks, *adapters) == 1
        (layout,) = (each for each in stacks._layouts.values() if len(each.numbers) == 3)
        assert stacks.layout(CallPlan.of_sessions([(each, 1) for each in adapters]).groups) is layout, "found once"
    assert step(stacks, lora(7, 1), lora(8, 1)) == 2, "another stack"
    del adapters
    gc.collect()
    assert step(stacks, lora(7, 1), lora(8, 1)) == 0
    assert stacks.bytes == one, "rank 1"


def test_an_adapter_is_not_kept_alive():
    stacks, adapters = AdapterStacks(), [lora(1), lora(2)]
    step(stacks, *adapters)
    left = [weakref.ref(tensor) for adapter in adapters for tensor in adapter.tensors]
    del adapters
    gc.collect()
    assert [ref() for ref in left] == [None] * 4


@pytest.mark.parametrize(
    "odd",
    [
        lora(9, scaling=3.3e38),
        lora(9, tensors=[tensor.bfloat16() for tensor in lora(9).tensors]),
        Adapter((*lora(3).parts, *lora(4).parts)),
    ],
    ids=["scaled beyond float32", "bfloat16", "two parts"],
)
def test_what_does_not_fit_a_slot_goes_alone(odd):
    stacks, others = AdapterStacks(), [lora(1), lora(2)]
    plan = CallPlan.of_sessions([(others[0], 1), (odd, 1), (others[1], 1)])
    layout = stacks.layout(plan.groups)
    x, output = torch.randn(3, 1, INPUTS), torch.randn(3, 1, OUTPUTS)
    found = layout.change_output(plan.groups, PLACE, x, output)
    alone = CallPlan.of(odd, train=False, seed=0).change_output(PLACE, x[1:2], output[1:2])
    assert torch.equal(found[1:2], alone)
    torch.testing.assert_close(found[2].double(), expected(others[1], x[2], output[2]).double(), rtol=1e-5, atol=1e-5)
    assert list(layout._prepared[False, PLACE].alone) == [1]


def test_rows_that_are_not_those_of_the_call_are_an_error():
    plan = CallPlan.of_sessions([(lora(1), 1), (None, 2)])
    layout = AdapterStacks().layout(plan.groups)
    for rows in (1, 4):
        with pytest.raises(RuntimeError):
            layout.change_output(plan.groups, PLACE, torch.zeros(rows, INPUTS), torch.zeros(rows, OUTPUTS))

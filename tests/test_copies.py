"""Copies between host memory and a pretended GPU, and how often a request makes the host wait for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from petals_tune.copies import finite_flags, to_device, to_host
from petals_tune.wire.messages import Backward
from tests.blocks.device_requests import LENGTH, ROWS, SPAN, noise, uploaded
from tests.models import masks
from tests.pretend_device import GpuEngine, GpuTensor, counted_waits, pretended_gpus
from tests.servers.parts import forward, load
from tests.servers.steps import outputs, session, step

CUDA = torch.device("cuda:0")
MASKS_OF_TRANSFORMERS = (
    2  # it asks whether a mask hides anything, at the beginning of a forward, where nothing runs yet
)


def test_a_copy_to_a_gpu_does_not_wait_and_casts_there():
    numbers = noise(2, 3, seed=1)
    with pretended_gpus(), counted_waits() as waits:
        there = to_device(numbers, CUDA, torch.float64)
    assert isinstance(there, GpuTensor)
    assert torch.equal(there.values, numbers.double())
    assert waits == []


def test_all_that_comes_back_from_a_gpu_is_waited_for_once():
    numbers = [noise(2, 3, seed=seed).requires_grad_() for seed in range(3)]
    with pretended_gpus():
        there = [to_device(each, CUDA) for each in numbers]
        with counted_waits() as waits:
            back = to_host(*there)
    assert len(waits) == 1
    for each, expected in zip(back, numbers, strict=True):
        assert not isinstance(each, GpuTensor)
        assert not each.requires_grad
        assert torch.equal(each, expected)


def test_two_gpus_are_waited_for_one_after_the_other_and_have_a_flag_each():
    with pretended_gpus():
        there = [to_device(noise(2, 3, seed=0), torch.device("cuda", card)) for card in (0, 1, 1)]
        there[2].values[1, 2] = torch.inf
        flags = finite_flags(there)
        assert [str(flag.device) for flag in flags] == ["cuda:0", "cuda:1"]
        with counted_waits() as waits:
            found = to_host(*flags)
    assert [bool(flag) for flag in found] == [True, False]
    assert len(waits) == 2


def test_where_there_is_no_gpu_nothing_is_copied():
    numbers = noise(2, 3, seed=1)
    assert to_device(numbers, torch.device("cpu")) is numbers
    assert to_host(numbers)[0].data_ptr() == numbers.data_ptr()


@pytest.mark.parametrize("padding", ["none", "left"])
def test_every_request_waits_for_a_gpu_once(model_folder, padding):
    gpu, cpu_mask = GpuEngine(load(model_folder("llama"), SPAN)), masks(ROWS, LENGTH)[padding].bool()
    adapter, grad = uploaded(gpu, "llama"), noise(ROWS, LENGTH, 32, seed=2)
    request = forward(SPAN, noise(ROWS, LENGTH, 32, seed=1), padding=cpu_mask, adapter="version", train=True)
    kept = forward(SPAN, request.hidden, padding=cpu_mask, adapter="version", keep=True)
    graph = gpu.forward(kept, adapter).graph
    assert len(adapter.tensors) > 3
    assert graph is not None
    sessions = [session(2, adapter=adapter, version="version"), session(), session()]

    def prompts() -> None:
        for each in sessions:
            outputs(gpu, (each, step(noise(each.rows, 4, 32, seed=3), 0)))

    def token(*several: int) -> Callable[[], Sequence[torch.Tensor]]:
        chosen = [sessions[number] for number in several]
        return lambda: outputs(gpu, *[(each, step(noise(each.rows, 1, 32, seed=4), 4)) for each in chosen])

    once: dict[str, Callable[[], object]] = {
        "forward": lambda: gpu.forward(request, adapter),
        "forward with a lease": lambda: gpu.forward(kept, adapter),
        "backward of a lease": lambda: gpu.backward(Backward(lease=1, grad=grad), graph, adapter),
        "backward that recomputes": lambda: gpu.backward(Backward(again=request, grad=grad), None, adapter),
        "token": token(0),
        "token of two sessions": token(1, 2),
    }
    prompts()
    for what, work in once.items():
        with counted_waits() as waits:
            work()
        ours = [wait for wait in waits if "/transformers/" not in wait]
        assert len(ours) == 1, (what, ours)
        assert len(waits) <= 1 + MASKS_OF_TRANSFORMERS, (what, waits)

"""The engine on a GPU: every kind of request, on a device that refuses what CUDA refuses, with a CPU's numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch

from petals_tune.blocks import memory
from petals_tune.blocks.engine import Engine
from petals_tune.wire.messages import Backward
from tests.blocks import device_requests as requests
from tests.blocks.device_requests import LENGTH, LINEARS, ROWS, SPAN, noise
from tests.models import masks, relative_error
from tests.pretend_device import GpuEngine, GpuTensor, pretended_gpus
from tests.servers.parts import forward, load
from tests.servers.steps import outputs, session, step


class Pair(NamedTuple):
    family: str
    gpu: Engine
    cpu: Engine


QUICK = "llama"  # a family for every run of the tests; the others are slow together
FAMILIES = [family if family == QUICK else pytest.param(family, marks=pytest.mark.slow) for family in LINEARS]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, model_folder) -> Pair:
    folder = model_folder(request.param)
    return Pair(request.param, GpuEngine(load(folder, SPAN)), Engine(load(folder, SPAN)))


def assert_close(gpu: Iterable[torch.Tensor], cpu: Iterable[torch.Tensor]) -> None:
    for ours, expected in zip(gpu, cpu, strict=True):
        assert not isinstance(ours, GpuTensor), "results are in host memory, where the event loop encodes them"
        assert relative_error(ours, expected) <= 1e-6


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("padding", masks(ROWS, LENGTH))
def test_a_forward_its_lease_and_its_recomputation_with_adapters(pair, padding, train):
    gpu, cpu = (requests.training(engine, pair.family, padding, train=train) for engine in (pair.gpu, pair.cpu))
    assert gpu.keys() == cpu.keys()
    assert_close(gpu.values(), cpu.values())


def test_a_lease_stays_on_the_gpu(pair):
    request = forward(SPAN, noise(ROWS, LENGTH, 32, seed=1), keep=True)
    assert isinstance(pair.gpu.forward(request, None).graph.output, GpuTensor)


def test_a_forward_at_given_positions_without_a_graph(pair):
    assert_close([requests.placed(pair.gpu)], [requests.placed(pair.cpu)])


def test_steps_of_sessions_in_a_batch_with_padding_and_beams(pair):
    assert_close(requests.batched_steps(pair.gpu), requests.batched_steps(pair.cpu))


def test_steps_with_an_adapter(pair):
    assert_close(requests.adapted_steps(pair.gpu, pair.family), requests.adapted_steps(pair.cpu, pair.family))


def test_the_bytes_of_a_position_and_the_speed_are_measured(pair):
    assert pair.gpu.cache_sizes == pair.cpu.cache_sizes
    with pretended_gpus():
        assert memory.device_name("cuda:1") == "cuda:1, pretended GPU"


@pytest.mark.parametrize("quantization", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [QUICK, pytest.param("gpt2", marks=pytest.mark.slow)])
def test_quantized_blocks(model_folder, family, quantization):
    found = []
    for kind in (GpuEngine, Engine):
        engine = kind(load(model_folder(family), SPAN, quantization))
        request, grad = forward(SPAN, noise(ROWS, LENGTH, 32, seed=1), keep=True), noise(ROWS, LENGTH, 32, seed=2)
        result = engine.forward(request, None)
        hidden, _ = engine.backward(Backward(lease=1, grad=grad), result.graph, None)
        found.append([result.output, hidden, *outputs(engine, (session(1), step(noise(1, 3, 32, seed=3), 0)))])
    assert_close(*found)


def test_tensors_of_two_pretended_devices_do_not_mix():
    with pretended_gpus():
        first, second, plain = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1"), torch.ones(2)
        for other in (second, plain):
            with pytest.raises(RuntimeError, match="same device"):
                first + other
        assert (first + second.to("cuda:0")).cpu().tolist() == [2, 2]

"""The engine on a GPU: every kind of request, on a device that refuses what CUDA refuses, with a CPU's numbers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.footprint import Pass
from petals_tune.wire.messages import Backward
from petals_tune.wire.span import BlockSpan
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


TWO_CARDS = ["cuda:0", "cuda:0", "cuda:1"]  # of blocks 1 to 3
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


@pytest.fixture(params=LINEARS)
def cards(request, model_folder) -> Pair:
    """Blocks 1 and 2 on one card and block 3 on the other, beside a CPU."""
    folder = model_folder(request.param)
    engine = GpuEngine(load(folder, SPAN), TWO_CARDS)
    return Pair(request.param, engine, Engine(load(folder, SPAN)))


def test_blocks_on_two_cards_compute_what_they_compute_on_one(cards):
    """Forward, lease, recomputation, adapters on both cards, dropout, padding, positions; steps, batches, beams."""
    gpu, cpu = (requests.training(engine, cards.family, "left", train=True) for engine in (cards.gpu, cards.cpu))
    copies = gpu.pop("bytes") - cpu.pop("bytes")
    assert 0 <= copies <= 2 * ROWS * LENGTH * 32 * 4, "the rotary tables of the second card are counted, and not more"
    assert_close(gpu.values(), cpu.values())
    for run in (requests.batched_steps, lambda engine: [requests.placed(engine)]):
        assert_close(run(cards.gpu), run(cards.cpu))
    assert_close(*(requests.adapted_steps(engine, cards.family) for engine in (cards.gpu, cards.cpu)))


def test_what_is_of_a_block_is_on_its_card(model_folder):
    engine = GpuEngine(load(model_folder(QUICK), SPAN), ["cuda:0", "cuda:1", "cuda:1"])
    assert engine.spans_by_device == {"cuda:0": BlockSpan(1, 2), "cuda:1": BlockSpan(2, 4)}
    adapter, own = requests.uploaded(engine, QUICK), session(2)
    assert {part.block: str(part.tensors[0].device) for part in adapter.parts} == {
        1: "cuda:0",
        2: "cuda:1",
        3: "cuda:1",
    }
    outputs(engine, (own, step(noise(2, 4, 32, seed=1), 0)))
    assert [str(tail.keys.device) for _, tail in sorted(own.memory.tails.items())] == ["cuda:0", "cuda:1", "cuda:1"]
    graph = engine.forward(forward(SPAN, noise(ROWS, LENGTH, 32, seed=1), keep=True), adapter).graph
    assert (str(graph.hidden.device), str(graph.output.device)) == ("cuda:0", "cuda:1")


def test_blocks_of_one_of_two_cards_and_the_memory_that_they_take(model_folder):
    gpu = GpuEngine(load(model_folder(QUICK), SPAN), TWO_CARDS)
    cpu = Engine(load(model_folder(QUICK), SPAN))
    mask, grad = masks(ROWS, 20)["left"].bool(), noise(ROWS, 20, 32, seed=2)
    for span in ("1:2", "3:4", "2:4"):
        request = forward(span, noise(ROWS, 20, 32, seed=1), padding=mask, keep=True)
        results, gradients = [engine.forward(request, None) for engine in (gpu, cpu)], []
        assert_close(*([result.output] for result in results))
        kept = gpu.footprint.kept_bytes(Pass(span=request.span), ROWS, 20)
        assert results[0].graph_bytes <= kept <= 2 * results[0].graph_bytes
        for engine, result in zip((gpu, cpu), results, strict=True):
            gradients.append(engine.backward(Backward(lease=1, grad=grad), result.graph, None)[0])
        assert_close(gradients[:1], gradients[1:])


@pytest.mark.parametrize("quantization", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "mixtral", "gpt_oss"))]
)
def test_quantized_blocks_on_two_cards(model_folder, family, quantization):
    found = []
    for kind in (partial(GpuEngine, devices=TWO_CARDS), Engine):
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

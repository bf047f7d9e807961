"""The engine on a GPU: every kind of request, on a device that refuses what CUDA refuses, with a CPU's numbers."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward
from servers.membership import throughput
from tests.models import masks, relative_error
from tests.pretend_device import GpuEngine, GpuTensor
from tests.servers.parts import forward, load
from tests.servers.steps import outputs, session, step

FAMILIES = {  # a linear of each, with its features
    "bloom": ("self_attention.query_key_value", 32, 96),
    "llama": ("mlp.gate_proj", 32, 48),
    "gemma3_text": ("self_attn.q_proj", 32, 32),
    "gpt2": ("mlp.c_fc", 32, 128),
    "mixtral": ("self_attn.o_proj", 32, 32),
}
ROWS, LENGTH, PROMPT = 3, 7, 2
SPAN = "1:4"  # of the blocks 1:4 of a server; steps.SPAN


class Pair(NamedTuple):
    family: str
    gpu: Engine
    cpu: Engine


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, model_folder) -> Pair:
    folder = model_folder(request.param)
    return Pair(request.param, GpuEngine(load(folder, SPAN)), Engine(load(folder, SPAN)))


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uploaded(engine: Engine, family: str) -> Adapter:
    """LoRA, a prompt and (IA)3 as a server keeps them."""
    module, wide_in, wide_out = FAMILIES[family]
    parts = [
        AdapterPart(block=1, method="prompt", tensors=[noise(PROMPT, 32, seed=3)]),
        AdapterPart(
            block=2,
            method="lora",
            module=module,
            dropout=0.3,
            tensors=[noise(4, wide_in, seed=4), noise(wide_out, 4, seed=5)],
        ),
        AdapterPart(block=3, method="ia3", module=module, tensors=[noise(wide_out, 1, seed=6)]),
    ]
    adapter = Adapter(tuple(engine.prepare_adapter(parts)))
    for tensor in adapter.tensors:
        tensor.requires_grad_(True)
    return adapter


def assert_close(gpu: torch.Tensor | None, cpu: torch.Tensor | None) -> None:
    assert gpu is not None
    assert cpu is not None
    assert not isinstance(gpu, GpuTensor), "results are in host memory, where the event loop encodes them"
    assert relative_error(gpu, cpu) <= 1e-6


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("padding", masks(ROWS, LENGTH))
def test_a_forward_its_lease_and_its_recomputation(pair, padding, train):
    """With an adapter of every method, padding on both sides, and dropout."""
    mask, grad = masks(ROWS, LENGTH)[padding].bool(), noise(ROWS, LENGTH, 32, seed=2)
    found = []
    for engine in (pair.gpu, pair.cpu):
        adapter = uploaded(engine, pair.family)
        request = forward(
            SPAN, noise(ROWS, LENGTH, 32, seed=1), padding=mask, keep=True, train=train, seed=9, adapter="version"
        )
        kept = engine.forward(request, adapter)
        assert isinstance(kept.graph.output, GpuTensor) == (engine is pair.gpu), "a lease stays on the GPU"
        leased = engine.backward(Backward(lease=1, grad=grad), kept.graph, adapter)
        again = engine.backward(Backward(again=request, grad=grad), None, adapter)
        found.append([kept.output, leased[0], *leased[1], again[0], *again[1], torch.tensor(kept.graph_bytes)])
    for gpu, cpu in zip(*found, strict=True):
        assert_close(gpu, cpu)


def test_a_forward_at_given_positions_without_a_graph(pair):
    gpu, cpu = (
        engine.forward(forward(SPAN, noise(ROWS, LENGTH, 32, seed=1), positions=torch.arange(LENGTH)[None] + 3), None)
        for engine in (pair.gpu, pair.cpu)
    )
    assert_close(gpu.output, cpu.output)


def test_steps_of_sessions_in_a_batch_with_padding_and_beams(pair):
    """Two sessions at different positions, one of them padded, with rows that change places, and one step again."""
    found = []
    for engine in (pair.gpu, pair.cpu):
        padded, plain = session(2), session(1)
        padding = torch.tensor([[False, False, True, True], [True] * 4])
        made = outputs(engine, (padded, step(noise(2, 4, 32, seed=1), 0, padding=padding)))
        made += outputs(engine, (plain, step(noise(1, 4, 32, seed=2), 0)))
        order = torch.tensor([1, 0])
        if not engine.loaded.family.windowed:
            made += outputs(engine, (plain, step(noise(1, 1, 32, seed=3), 4)))
            plain.position = 5
        now = plain.position
        made += outputs(
            engine,
            (padded, step(noise(2, 1, 32, seed=4), 4, order=order)),
            (plain, step(noise(1, 1, 32, seed=5), now)),
        )
        made += outputs(engine, (padded, step(noise(2, 1, 32, seed=6), 4, positions=torch.tensor([[2], [4]]))))
        found.append(made)
    for gpu, cpu in zip(*found, strict=True):
        assert_close(gpu, cpu)


def test_a_step_with_an_adapter(pair):
    found = []
    for engine in (pair.gpu, pair.cpu):
        own = session(2, adapter=uploaded(engine, pair.family), version="version")
        made = outputs(engine, (own, step(noise(2, 4, 32, seed=1), 0)))
        found.append([*made, *outputs(engine, (own, step(noise(2, 1, 32, seed=2), 4)))])
    for gpu, cpu in zip(*found, strict=True):
        assert_close(gpu, cpu)


def test_the_bytes_of_a_position_and_the_speed_are_measured(pair):
    assert pair.gpu.measure_token_bytes() == pair.cpu.measure_token_bytes()
    first = forward("1:2", noise(1, 4, 32, seed=1), keep=True)
    assert pair.gpu.forward(first, None).compute_s > 0
    assert throughput._device_name("cpu").startswith("cpu")


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantized_blocks(model_folder, family, quantization):
    found = []
    for kind in (GpuEngine, Engine):
        engine = kind(load(model_folder(family), SPAN, quantization))
        request, grad = forward(SPAN, noise(ROWS, LENGTH, 32, seed=1), keep=True), noise(ROWS, LENGTH, 32, seed=2)
        result = engine.forward(request, None)
        hidden, _ = engine.backward(Backward(lease=1, grad=grad), result.graph, None)
        found.append([result.output, hidden, *outputs(engine, (session(1), step(noise(1, 3, 32, seed=3), 0)))])
    for gpu, cpu in zip(*found, strict=True):
        assert_close(gpu, cpu)

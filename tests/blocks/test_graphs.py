import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.graphs import Graph, KeptMemory
from petals_tune.wire.messages import Backward
from tests.models import relative_error
from tests.servers.parts import forward, load
from tests.servers.steps import lora


def test_gradients_are_those_at_the_input_and_the_adapter():
    hidden, factor = torch.ones(1, 2, 3, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    kept = Graph(output=hidden * factor, hidden=hidden, adapter=[factor])
    at_input, (at_factor,) = kept.gradients(torch.full((1, 2, 3), 2.0))
    assert torch.equal(at_input, torch.full((1, 2, 3), 6.0))
    assert at_factor == 12.0
    assert hidden.grad is None, "returned, not gathered"
    alone = Graph(output=hidden.detach() * factor, hidden=None, adapter=[factor])
    assert alone.gradients(torch.ones(1, 2, 3)) == (None, [torch.tensor(6.0)])


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e5, 1e30])
def test_gradients_of_blocks_in_float16_are_exact_whatever_their_size(model_folder, size):
    drawn = torch.Generator().manual_seed(0)
    hidden, grad = (torch.randn(2, 5, 32, generator=drawn) for _ in range(2))
    found = {}
    for dtype in (torch.float16, torch.float32):
        engine = Engine(load(model_folder("llama"), "1:4", dtype=dtype))
        adapter = lora("llama", 1)
        for tensor in adapter.tensors:
            tensor.requires_grad_(True)
        request = forward("1:4", hidden, keep=True, input_grad=True, adapter="v")
        result = engine.forward(request, adapter)
        at_input, at_adapter = engine.backward(Backward(lease=1, grad=size * grad), result.graph, adapter)
        assert at_input is not None
        found[dtype] = [at_input, *at_adapter]
    for ours, exact in zip(found[torch.float16], found[torch.float32], strict=True):
        assert relative_error(ours, exact) < 0.01


def test_a_gradient_of_zero_and_one_that_is_not_finite_stay_so_in_float16():
    hidden = torch.ones(1, 1, 2, dtype=torch.float16, requires_grad=True)
    for grad in (torch.zeros(1, 1, 2), torch.tensor([[[1.0, torch.inf]]])):
        at_input, _ = Graph(output=hidden * 1, hidden=hidden, adapter=[]).gradients(grad)
        assert torch.equal(at_input, grad)


def counted(module: nn.Module, x: torch.Tensor, weights: frozenset[int] = frozenset()) -> int:
    memory = KeptMemory(weights=weights)
    int8 = [inner for inner in module.modules() if type(inner).__name__ == "Linear8bitLt"]
    with memory.counting(int8):
        module(x)
    return memory.bytes


FLOAT_BYTES = 4


def test_kept_bytes_are_those_counted_by_hand():
    x = torch.randn(5, 8, requires_grad=True)
    values = 5 * 8 * FLOAT_BYTES
    assert counted(nn.Tanh(), x) == values, "its output"
    assert counted(nn.Sigmoid(), x) == values, "its output"
    assert counted(nn.GELU(), x) == values, "its input"
    assert counted(nn.Sequential(nn.Tanh(), nn.GELU()), x) == values, "the same storage twice, counted once"
    assert counted(nn.Sequential(nn.GELU(), nn.Tanh()), x) == 2 * values
    assert counted(nn.Flatten(0), x) == 0
    assert counted(nn.Softmax(-1), x[:, :4]) == values // 2
    half_seen = torch.randn(5, 16, requires_grad=True)
    assert counted(nn.GELU(), half_seen[:, :8]) == 2 * values, "a view keeps its whole storage"


def test_weights_are_not_counted():
    linear = nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    weights = frozenset(parameter.untyped_storage().data_ptr() for parameter in linear.parameters())
    assert counted(linear, x, weights) == 0
    assert counted(linear, x) == 8 * 8 * FLOAT_BYTES, "what the backward needs is the weight alone"


def test_what_the_int8_linear_hides_from_autograd_is_counted():
    import bitsandbytes as bnb

    linear = bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False, threshold=0.0).to("cpu").train()
    x = torch.randn(5, 8, requires_grad=True)
    seen: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.numel()) or t, lambda t: t):
        alive = linear(x * 2)
    assert 40 not in seen, "autograd's own hooks do not see it: the trap is still there"
    del alive
    assert counted(linear, x * 2) >= 5 * 8 * FLOAT_BYTES


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_the_count_of_a_real_forward_is_the_memory_that_it_takes(model_folder, family, quantization):
    """Against torch's own account of what was allocated and not freed while the graph lives."""
    engine = Engine(load(model_folder(family, hidden_size=128), "0:4", quantization))
    hidden = torch.randn(4, 32, 128)
    request = forward("0:4", hidden, keep=True)
    engine.forward(forward("0:4", hidden, keep=True), None)  # what is made once is made now
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = engine.forward(request, None)
    events = profiled.key_averages()
    kept_bytes = sum(event.self_cpu_memory_usage for event in events) + hidden.untyped_storage().nbytes()
    assert result.graph is not None
    assert result.graph_bytes == pytest.approx(kept_bytes, rel=0.1)

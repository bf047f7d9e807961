import gc
import weakref

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.graphs import Graph, KeptMemory
from petals_tune.errors import LeaseLost
from servers.stores.leases import LeaseStore
from tests.raising import raises
from tests.servers.parts import forward, load


def graph() -> Graph:
    hidden = torch.ones(1, 2, 3, requires_grad=True)
    return Graph(output=hidden * 2, hidden=hidden, adapter=[])


def store(*, max_bytes: int = 100, max_age_s: float = 60) -> LeaseStore:
    return LeaseStore(max_bytes=max_bytes, max_age_s=max_age_s)


def test_a_lease_gives_its_graph_once_to_the_client_that_left_it():
    leases, kept = store(), graph()
    lease = leases.keep("me", kept, 40, now_s=0)
    assert leases.used_bytes == 40
    with raises(LeaseLost):
        leases.take("another", lease, now_s=1)
    assert leases.take("me", lease, now_s=1) is kept
    assert leases.used_bytes == 0
    with raises(LeaseLost):
        leases.take("me", lease, now_s=1)


def test_what_does_not_fit_is_not_kept_and_what_is_there_stays():
    leases = store(max_bytes=100)
    first = leases.keep("me", graph(), 60, now_s=0)
    assert leases.keep("me", graph(), 41, now_s=1) is None
    assert leases.keep("another", graph(), 51, now_s=1) is None, "more than its share"
    second = leases.keep("another", graph(), 40, now_s=1)
    assert leases.used_bytes == 100
    leases.take("me", first, now_s=2)
    leases.take("another", second, now_s=2)
    assert (leases.used_bytes, len(leases)) == (0, 0)


def test_one_greedy_client_neither_keeps_the_others_out_nor_evicts_them():
    leases = store(max_bytes=100)
    greedy = [leases.keep("greedy", graph(), 10, now_s=0) for _ in range(12)]
    assert greedy[10:] == [None, None]
    shy = [leases.keep("shy", graph(), 10, now_s=1) for _ in range(5)]
    assert None not in shy
    assert leases.keep("shy", graph(), 10, now_s=1) is None, "beyond its half, and nobody else is"
    for _ in range(20):
        assert leases.keep("greedy", graph(), 10, now_s=1) is None
    for lease in shy:
        leases.take("shy", lease, now_s=2)
    for lease in greedy[:5]:
        leases.take("greedy", lease, now_s=2)  # the oldest are needed soonest
    for lease in greedy[5:10]:
        with raises(LeaseLost):
            leases.take("greedy", lease, now_s=2)


def test_of_eight_micro_batches_in_a_budget_for_three_three_find_their_graphs():
    """Forwards 0 to 7, then backwards 0 to 7. A store that made room for the newest would find none."""
    leases = store(max_bytes=3 * 30 + 10)
    kept = [leases.keep("me", graph(), 30, now_s=number) for number in range(8)]
    assert [lease is not None for lease in kept] == [True] * 3 + [False] * 5
    for lease in kept[:3]:
        leases.take("me", lease, now_s=10)
    assert leases.used_bytes == 0


def test_a_lease_ends_when_it_is_old():
    leases = store(max_age_s=60)
    old, young = leases.keep("me", graph(), 40, now_s=0), leases.keep("me", graph(), 40, now_s=30)
    with raises(LeaseLost):
        leases.take("me", old, now_s=60.1)
    assert leases.used_bytes == 40
    leases.take("me", young, now_s=90)


def test_old_leases_make_room():
    leases = store(max_bytes=100, max_age_s=60)
    leases.keep("gone", graph(), 100, now_s=0)
    assert leases.keep("me", graph(), 100, now_s=60) is None
    assert leases.keep("me", graph(), 100, now_s=60.1) is not None


def test_leases_are_given_back_by_their_client_alone():
    leases = store()
    mine, other = leases.keep("me", graph(), 10, now_s=0), leases.keep("another", graph(), 10, now_s=0)
    leases.release("me", [mine, other, 999])
    assert leases.used_bytes == 10
    leases.take("another", other, now_s=0)


def test_a_client_that_leaves_takes_its_leases_along():
    leases = store()
    for _ in range(3):
        leases.keep("me", graph(), 10, now_s=0)
    other = leases.keep("another", graph(), 10, now_s=0)
    leases.drop_client("me")
    assert (leases.used_bytes, len(leases)) == (10, 1)
    leases.take("another", other, now_s=0)


def test_a_lease_that_ended_frees_its_graph():
    leases, kept = store(), graph()
    alive = weakref.ref(kept.output)
    lease = leases.keep("me", kept, 10, now_s=0)
    del kept
    gc.collect()
    assert alive() is not None
    leases.release("me", [lease])
    gc.collect()
    assert alive() is None


def test_gradients_are_those_at_the_input_and_the_adapter():
    hidden, factor = torch.ones(1, 2, 3, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    kept = Graph(output=hidden * factor, hidden=hidden, adapter=[factor])
    at_input, (at_factor,) = kept.gradients(torch.full((1, 2, 3), 2.0))
    assert torch.equal(at_input, torch.full((1, 2, 3), 6.0))
    assert at_factor == 12.0
    assert hidden.grad is None, "returned, not gathered"
    alone = Graph(output=hidden.detach() * factor, hidden=None, adapter=[factor])
    assert alone.gradients(torch.ones(1, 2, 3)) == (None, [torch.tensor(6.0)])


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

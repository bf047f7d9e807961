"""Forward and backward through a chain of servers give the numbers of one engine with all blocks."""

import dataclasses

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.swarm import loop
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.sums import AdapterSums
from petals_tune.swarm.trace import CallContext, Trace
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward
from petals_tune.wire.span import BlockSpan
from tests.faults.network import Network
from tests.faults.step import WHOLE, WIDTH, adapter
from tests.models import relative_error
from tests.servers.parts import forward

ROWS, LENGTH, TOLERANCE = 2, 5, 1e-6


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


HIDDEN, GRAD = drawn(1), drawn(2)
PADDING = torch.tensor([[True] * LENGTH, [False] * 2 + [True] * (LENGTH - 2)])


def gone(chain: Chain, context: CallContext, hidden: torch.Tensor = HIDDEN, *, input_grad: bool = True) -> Trace:
    return loop.run(chain.forward(hidden, context, WHOLE, keep=True, input_grad=input_grad))


def of_one_engine(
    network: Network, parts: tuple[AdapterPart, ...] = (), hidden: torch.Tensor = HIDDEN
) -> tuple[torch.Tensor, torch.Tensor, dict[int, list[torch.Tensor]]]:
    """The output, the gradient at the input, and the adapter's gradients by block."""
    own = Adapter(
        tuple(
            AdapterPart(
                block=part.block,
                method=part.method,
                module=part.module,
                tensors=[tensor.clone().requires_grad_() for tensor in part.tensors],
            )
            for part in parts
        )
    )
    request = forward("0:6", hidden, padding=PADDING, keep=True)
    result = network.engine("0:6").forward(request, own)
    at_input, gradients = network.engine("0:6").backward(Backward(lease=1, grad=GRAD), result.graph, own)
    assert at_input is not None
    by_block: dict[int, list[torch.Tensor]] = {}
    for block, gradient in zip((part.block for part in own.parts for _ in part.tensors), gradients, strict=True):
        by_block.setdefault(block, []).append(gradient)
    return result.output, at_input, by_block


def check_gradients(found: dict[int, list[torch.Tensor]], expected: dict[int, list[torch.Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for block, gradients in expected.items():
        assert all(relative_error(*pair) <= TOLERANCE for pair in zip(found[block], gradients, strict=True)), block


def test_output_and_gradients_are_those_of_one_engine(network):
    chain, context = network.chain(), CallContext(padding=PADDING, adapter=adapter())
    output, at_input, at_adapter = of_one_engine(network, adapter().parts)
    trace = gone(chain, context)
    assert relative_error(trace.hidden, output) <= TOLERANCE
    found = loop.run(chain.backward(trace, GRAD))
    assert relative_error(found.hidden, at_input) <= TOLERANCE
    check_gradients(found.adapter, at_adapter)
    assert chain.client.stats.recomputations == 0


def test_a_trace_has_the_input_of_each_server_and_the_graph_that_it_keeps(network):
    chain, context = network.chain(), CallContext()
    first_half = network.engine("0:3").forward(forward("0:3", HIDDEN), None).output
    for keep in (False, True):
        trace = loop.run(chain.forward(HIDDEN, context, WHOLE, keep=keep, input_grad=True))
        assert [leg.hop.span for leg in trace.legs] == [BlockSpan(0, 3), BlockSpan(3, 6)]
        assert torch.equal(trace.legs[0].hidden, HIDDEN)
        assert relative_error(trace.legs[1].hidden, first_half) <= TOLERANCE
        assert [leg.lease is not None for leg in trace.legs] == [keep, keep]


def test_a_part_of_the_blocks_is_asked_of_those_who_hold_it(network):
    part = BlockSpan(1, 3)
    trace = loop.run(network.chain().forward(HIDDEN, CallContext(), part, keep=False, input_grad=False))
    expected = network.engine("0:6").forward(forward("1:3", HIDDEN), None).output
    assert relative_error(trace.hidden, expected) <= TOLERANCE
    assert dict(network.calls) == {("a", "Forward"): 1}


def test_a_backward_ends_where_nothing_in_front_needs_a_gradient(network):
    late = dataclasses.replace(adapter(), parts=tuple(part for part in adapter().parts if part.block >= 4))
    chain, context = network.chain(), CallContext(padding=PADDING, adapter=late)
    trace = gone(chain, context, input_grad=False)
    assert [leg.lease is not None for leg in trace.legs] == [False, True]
    found = loop.run(chain.backward(trace, GRAD))
    assert found.hidden is None
    check_gradients(found.adapter, of_one_engine(network, late.parts)[2])
    assert not network.calls["a", "Backward"]


def test_a_graph_that_was_not_kept_is_computed_again(network):
    chain, context = network.chain(), CallContext(padding=PADDING)
    trace = gone(chain, context)
    trace = dataclasses.replace(trace, legs=tuple(dataclasses.replace(leg, lease=None) for leg in trace.legs))
    found = loop.run(chain.backward(trace, GRAD))
    assert relative_error(found.hidden, of_one_engine(network)[1]) <= TOLERANCE
    assert chain.client.stats.recomputations == len(trace.legs)


def test_servers_add_an_adapters_gradients_up_and_are_asked_once_for_them(network):
    chain, context, sums = network.chain(), CallContext(padding=PADDING, adapter=adapter()), AdapterSums()
    inputs = [drawn(seed) for seed in (1, 3, 4)]
    for number, hidden in enumerate(inputs):
        found = loop.run(chain.backward(gone(chain, context, hidden), GRAD, sums=sums, term=number))
        assert not found.adapter
    collected = loop.run(chain.collect(sums))
    assert network.calls["a", "CollectSum"] == network.calls["b", "CollectSum"] == 1
    each = [of_one_engine(network, adapter().parts, hidden)[2] for hidden in inputs]
    expected = {
        block: [sum(same) for same in zip(*(one[block] for one in each), strict=True)] for block in range(len(WHOLE))
    }
    check_gradients({block: own for part in collected for block, own in part.adapter.items()}, expected)


def test_a_sum_that_is_not_ours_is_computed_again(network):
    """A server added a backward whose answer never came."""
    chain, context, sums = network.chain(), CallContext(padding=PADDING, adapter=adapter()), AdapterSums()
    for number, hidden in enumerate((drawn(3), HIDDEN)):
        loop.run(chain.backward(gone(chain, context, hidden), GRAD, sums=sums, term=number))
    for partial in sums.in_order():
        del partial.terms[0]
    collected = loop.run(chain.collect(sums))
    found = {block: own for part in collected for block, own in part.adapter.items()}
    check_gradients(found, of_one_engine(network, adapter().parts)[2])


def test_a_trace_that_is_given_up_gives_its_leases_back(network):
    chain = network.chain()
    trace = gone(chain, CallContext())
    leases = [server.handler.stores.leases for server in network.servers.values()]
    assert [len(each) for each in leases] == [1, 1]
    loop.run(chain.release([trace]))
    loop.run(chain.forward(HIDDEN, CallContext(), WHOLE, keep=False, input_grad=False))  # behind it, on each stream
    assert [len(each) for each in leases] == [0, 0]

import torch

from petals_tune.swarm.routes.route import Hop
from petals_tune.swarm.trace import CallContext, stages_of
from petals_tune.wire.adapter import AdapterPart, AdapterVersion
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan


def hop(start: int, stop: int) -> Hop:
    span = BlockSpan(start, stop)
    record = ServerRecord(
        peer=f"{span}",
        addresses=(),
        model="m",
        model_name="tiny",
        blocks=span,
        total_blocks=6,
        quantization="none",
        dtype="float32",
    )
    return Hop(record, span)


ROUTE = (hop(0, 2), hop(2, 4), hop(4, 6))


def adapter_on(*blocks: int) -> CallContext:
    parts = tuple(AdapterPart(block=block, method="prompt", tensors=[torch.zeros(1, 2)]) for block in blocks)
    return CallContext(adapter=AdapterVersion(version="v", parts=parts))


def test_a_graph_is_kept_from_the_first_block_on_that_has_something_to_train():
    stages = stages_of(ROUTE, adapter_on(3), keep=True, input_grad=False)
    assert [stage.keep for stage in stages] == [False, True, True]
    assert [stage.input_grad for stage in stages] == [False, False, True]
    assert [stage.output_grad for stage in stages] == [False, True, True]
    assert [stage.adapter for stage in stages] == [None, "v", None]


def test_with_a_gradient_at_the_input_every_graph_is_kept():
    stages = stages_of(ROUTE, CallContext(), keep=True, input_grad=True)
    assert all(stage.keep and stage.input_grad and stage.output_grad for stage in stages)


def test_without_a_backward_no_graph_is_kept():
    stages = stages_of(ROUTE, adapter_on(0), keep=False, input_grad=True)
    assert not any(stage.keep for stage in stages)


def test_a_context_is_cut_by_rows_and_each_cut_draws_its_own_dropout():
    padding = torch.tensor([[True, False], [True, True], [False, True]])
    context = CallContext(padding=padding, positions=torch.arange(6).view(3, 2), seed=7)
    cut = context.rows(1, 3)
    assert cut.padding.tolist() == [[True, True], [False, True]]
    assert cut.positions.tolist() == [[2, 3], [4, 5]]
    assert cut.seed == 8
    shared = CallContext(positions=torch.arange(2).view(1, 2)).rows(1, 3)
    assert shared.positions.tolist() == [[0, 1]]

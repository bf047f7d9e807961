"""The engine by direct calls: no network, no thread."""

import pytest
import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.positions import PositionLimits
from petals_tune.errors import BlocksNotHere, RequestRefused
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward
from petals_tune.wire.span import BlockSpan
from tests.models import FAMILIES as EVERY
from tests.models import masks, relative_error
from tests.raising import raises
from tests.servers.parts import forward, load
from tests.servers.steps import hidden, outputs, session, step

FAMILIES = ["bloom", "llama", "gpt2"]
LINEAR = {
    "bloom": ("self_attention.query_key_value", 32, 96),
    "llama": ("mlp.gate_proj", 32, 48),
    "gpt2": ("mlp.c_fc", 32, 128),
}
DROPOUT = {
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "llama": {"attention_dropout": 0.3},
    "gpt2": {"resid_pdrop": 0.3, "attn_pdrop": 0.3},
}


def hidden_states(rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(1))


def out_gradient(rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(2))


def lora(family: str, *blocks: int, dropout: float = 0.0) -> Adapter:
    module, wide_in, wide_out = LINEAR[family]
    generator = torch.Generator().manual_seed(3)
    parts = tuple(
        AdapterPart(
            block=block,
            method="lora",
            module=module,
            scaling=2.0,
            dropout=dropout,
            tensors=[
                torch.randn(4, wide_in, generator=generator).mul(0.3).requires_grad_(),
                torch.randn(wide_out, 4, generator=generator).mul(0.3).requires_grad_(),
            ],
        )
        for block in blocks
    )
    return Adapter(parts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_any_cut_into_spans_gives_the_same(model_folder, family, padding):
    engine = Engine(load(model_folder(family), "0:6"))
    mask = masks(3, 7)[padding].bool()
    whole = engine.forward(forward("0:6", hidden_states(), padding=mask), None).output
    for cuts in (["0:3", "3:6"], ["0:1", "1:5", "5:6"], [f"{n}:{n + 1}" for n in range(6)]):
        current = hidden_states()
        for span in cuts:
            current = engine.forward(forward(span, current, padding=mask), None).output
        assert relative_error(current[mask], whole[mask]) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_span_of_a_server_is_that_of_the_whole_model(model_folder, family):
    part = Engine(load(model_folder(family), "2:5"))
    whole = Engine(load(model_folder(family), "0:6"))
    for span in ("2:5", "2:3", "4:5", "3:5"):
        given = part.forward(forward(span, hidden_states()), None).output
        assert torch.equal(given, whole.forward(forward(span, hidden_states()), None).output)


def test_positions_are_used_where_they_are_given(model_folder):
    engine = Engine(load(model_folder("llama"), "0:6"))
    counted = engine.forward(forward("0:6", hidden_states()), None).output
    given = engine.forward(forward("0:6", hidden_states(), positions=torch.arange(7)[None]), None).output
    stretched = engine.forward(forward("0:6", hidden_states(), positions=2 * torch.arange(7)[None]), None).output
    assert torch.equal(given, counted)
    assert relative_error(stretched, counted) > 1e-2


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", [False, True])
def test_a_backward_from_a_lease_equals_the_forward_run_again(model_folder, family, quantization, train):
    """The outputs too, with dropout in the blocks and in the adapter."""
    engine = Engine(load(model_folder(family, **DROPOUT[family]), "1:5", quantization))
    adapter = lora(family, 1, 3, dropout=0.5)
    request = forward("1:5", hidden_states(), keep=True, train=train, seed=7, adapter="version")
    result = engine.forward(request, adapter)
    kept_hidden, kept_adapter = engine.backward(Backward(lease=1, grad=out_gradient()), result.graph, adapter)
    engine.forward(forward("1:3", hidden_states(), train=True, seed=99), None)  # whoever draws numbers meanwhile
    again = Backward(again=request, grad=out_gradient())
    hidden, gradients = engine.backward(again, None, adapter)
    assert torch.equal(hidden, kept_hidden)
    assert len(gradients) == len(kept_adapter) == 4
    assert all(torch.equal(one, other) for one, other in zip(gradients, kept_adapter, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_draws_the_same_for_any_cut_into_spans_and_servers(model_folder, family):
    folder = model_folder(family, **DROPOUT[family])
    adapter = lora(family, 0, 3, dropout=0.5)
    servers = {span: Engine(load(folder, span)) for span in ("0:6", "0:2", "2:6")}
    options = {"train": True, "seed": 7}
    whole = servers["0:6"].forward(forward("0:6", hidden_states(), **options), adapter).output
    for route in (["0:2", "2:6"], ["0:6/0:4", "0:6/4:6"], ["0:2", "2:6/2:3", "0:6/3:6"]):
        current = hidden_states()
        for hop in route:
            server, _, span = hop.partition("/")
            on_span = adapter.on(BlockSpan.parse(span or server))
            current = servers[server].forward(forward(span or server, current, **options), on_span).output
        assert relative_error(current, whole) <= 1e-6
    other = servers["0:6"].forward(forward("0:6", hidden_states(), train=True, seed=8), adapter).output
    assert relative_error(other, whole) > 1e-2, "another seed, other numbers"
    evaluated = servers["0:6"].forward(forward("0:6", hidden_states(), seed=7), adapter).output
    assert relative_error(evaluated, whole) > 1e-2, "no dropout in evaluation"


def test_a_seed_may_be_any_that_a_client_sends(model_folder):
    engine = Engine(load(model_folder("gpt2", **DROPOUT["gpt2"]), "0:6"))
    for seed in (0, 2**62 - 1, 2**62 + 7):
        assert torch.isfinite(engine.forward(forward("0:6", hidden_states(), train=True, seed=seed), None).output).all()


def test_only_the_gradients_that_were_asked_for_are_made(model_folder):
    engine = Engine(load(model_folder("llama"), "0:6"))
    adapter = lora("llama", 5)
    request = forward("0:6", hidden_states(), keep=True, input_grad=False)
    result = engine.forward(request, adapter)
    full = engine.forward(forward("0:6", hidden_states(), keep=True), adapter)
    assert result.graph_bytes < full.graph_bytes / 2, "nothing below block 5 is kept"
    hidden, gradients = engine.backward(Backward(lease=1, grad=out_gradient()), result.graph, adapter)
    assert hidden is None
    wanted = engine.backward(Backward(lease=1, grad=out_gradient()), full.graph, adapter)[1]
    assert all(torch.equal(one, other) for one, other in zip(gradients, wanted, strict=True))


def test_without_keep_there_is_no_graph(model_folder):
    result = Engine(load(model_folder("llama"), "0:6")).forward(forward("0:6", hidden_states()), lora("llama", 0))
    assert (result.graph, result.graph_bytes) == (None, 0)
    assert not result.output.requires_grad


@pytest.mark.parametrize(
    ("request_", "kind", "fields"),
    [
        (forward("0:3", hidden_states()), BlocksNotHere, {}),
        (forward("3:6", hidden_states()), BlocksNotHere, {}),
        (forward("2:5", torch.zeros(1, 2, 33)), RequestRefused, {"reason": "hidden size"}),
        (forward("3:5", torch.full((1, 2, 32), float("nan"))), RequestRefused, {"block": 3}),
        (forward("2:5", torch.full((1, 2, 32), float("inf"))), RequestRefused, {"block": 2}),
    ],
    ids=["before", "after", "width", "nan", "inf"],
)
def test_what_these_blocks_cannot_do_is_refused_forward_and_backward(model_folder, request_, kind, fields):
    engine = Engine(load(model_folder("llama"), "2:5"))
    with raises(kind, **fields):
        engine.forward(request_, None)
    with raises(kind, **fields):
        engine.backward(Backward(again=request_, grad=torch.ones_like(request_.hidden)), None, None)


def test_a_gradient_that_does_not_fit_is_refused(model_folder):
    engine = Engine(load(model_folder("llama"), "2:5"))
    again = forward("2:5", hidden_states())
    with raises(RequestRefused, reason="gradient shape"):
        engine.backward(Backward(again=again, grad=out_gradient(length=6)), None, None)


def test_where_torch_fails_on_a_batch_only_the_step_at_fault_fails(model_folder):
    """A position beyond GPT-J's table, as if nobody had looked at it before."""
    engine = Engine(load(model_folder("gptj"), "1:4"))
    engine.passes.positions = PositionLimits(given=None, table=None, length=None)
    good, other, bad = session(), session(2), session()
    for each in (good, other, bad):
        outputs(engine, (each, step(hidden(each.rows, 2, 0), 0)))
    far = torch.tensor([[2**20]])
    found, beside, failed = engine.step(
        [
            (good, step(hidden(1, 1, 1), 2)),
            (other, step(hidden(2, 1, 2), 2, order=torch.tensor([1, 0]))),
            (bad, step(hidden(1, 1, 1), 2, positions=far)),
        ]
    )
    assert isinstance(failed, RuntimeError)
    alone = session()
    outputs(engine, (alone, step(hidden(1, 2, 0), 0)))
    assert torch.equal(found, outputs(engine, (alone, step(hidden(1, 1, 1), 2)))[0])
    assert isinstance(beside, torch.Tensor)
    assert (good.position, other.position, bad.position) == (3, 3, 2)
    assert torch.equal(outputs(engine, (bad, step(hidden(1, 1, 1), 2)))[0], found), "its session goes on"


@pytest.mark.parametrize(
    "family", [each if each == "llama" else pytest.param(each, marks=pytest.mark.slow) for each in EVERY]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_what_leaves_is_in_the_dtype_of_the_computation(model_folder, family, dtype):
    """So nothing is lost where it travels in that dtype (swarm/formats.py): outputs, gradients and steps."""
    engine = Engine(load(model_folder(family), "0:2", dtype=dtype))
    result = engine.forward(forward("0:2", hidden_states(), keep=True), None)
    at_input, _ = engine.backward(Backward(lease=1, grad=out_gradient()), result.graph, None)
    own = Session.probe(BlockSpan(0, 2))
    (stepped,) = engine.step([(own, step(hidden_states(rows=1, length=1), 0))])
    assert {each.dtype for each in (result.output, stepped)} == {dtype}
    # In float16 a gradient is scaled while it is computed (tests/blocks/test_graphs.py).
    assert at_input.dtype is (torch.float32 if dtype is torch.float16 else dtype)

"""Adapters on the blocks of a server: what its hooks add, and which parts it refuses."""

import pytest
import torch

from petals_tune.blocks.adapters import Adapter, AdapterHooks, CallPlan
from petals_tune.blocks.engine import Engine
from petals_tune.errors import RequestRefused
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward
from petals_tune.wire.span import BlockSpan
from tests.models import relative_error
from tests.raising import raises
from tests.servers.parts import forward, load
from tests.servers.steps import hidden

WIDTH, INNER = 32, 48  # of the small Llama


def hidden_states(rows: int = 3, length: int = 7) -> torch.Tensor:
    return hidden(rows, length, 1)


def out_gradient(rows: int = 3, length: int = 7) -> torch.Tensor:
    return hidden(rows, length, 2)


def lora(block: int, **fields) -> AdapterPart:
    a, b = torch.randn(4, WIDTH), torch.randn(INNER, 4)
    return AdapterPart(**{"block": block, "method": "lora", "module": "mlp.gate_proj", "tensors": [a, b], **fields})


def ia3(block: int, **fields) -> AdapterPart:
    factors = torch.rand(INNER, 1)
    return AdapterPart(**{"block": block, "method": "ia3", "module": "mlp.up_proj", "tensors": [factors], **fields})


def prompts(*blocks: int) -> Adapter:
    generator = torch.Generator().manual_seed(4)
    return Adapter(
        tuple(
            AdapterPart(
                block=block, method="prompt", tensors=[torch.randn(3, 32, generator=generator).requires_grad_()]
            )
            for block in blocks
        )
    )


def test_prompts_are_added_to_the_first_positions_at_their_blocks(model_folder):
    engine = Engine(load(model_folder("llama"), "0:6"))
    adapter = prompts(0, 4)
    given = engine.forward(forward("0:6", hidden_states()), adapter).output
    current = hidden_states()
    for span, part in zip(("0:4", "4:6"), adapter.parts, strict=True):
        current = current.clone()
        current[:, :3] += part.tensors[0].detach()
        current = engine.forward(forward(span, current), None).output
    assert relative_error(given, current) <= 1e-6


def test_the_gradient_of_a_prompt_is_summed_over_the_rows(model_folder):
    engine = Engine(load(model_folder("llama"), "0:6"))
    adapter = prompts(0)
    result = engine.forward(forward("0:6", hidden_states(), keep=True), adapter)
    hidden, (prompt,) = engine.backward(Backward(lease=1, grad=out_gradient()), result.graph, adapter)
    assert relative_error(prompt, hidden[:, :3].sum(0)) <= 1e-5


def test_nothing_is_left_of_an_adapter_after_its_call(model_folder):
    engine = Engine(load(model_folder("llama"), "0:6"))
    before = engine.forward(forward("0:6", hidden_states()), None).output
    adapted = engine.forward(forward("0:6", hidden_states()), Adapter((lora(0), lora(1)))).output
    assert relative_error(adapted, before) > 1e-2
    assert torch.equal(engine.forward(forward("0:6", hidden_states()), None).output, before)


def test_a_prompt_longer_than_the_sequence_is_refused(model_folder):
    engine = Engine(load(model_folder("llama"), "0:6"))
    with raises(RequestRefused, block=0):
        engine.forward(forward("0:6", hidden_states(length=2)), prompts(0))


def test_an_adapter_tells_what_is_in_a_span_and_what_remains_after_a_first_step():
    prompt = AdapterPart(block=4, method="prompt", tensors=[torch.zeros(5, WIDTH)])
    adapter = Adapter((lora(3), ia3(3), prompt, lora(4)))
    assert [part.block for part in adapter.on(BlockSpan(4, 6)).parts] == [4, 4]
    assert [part.method for part in adapter.after_first_step.parts] == ["lora", "ia3", "lora"]
    assert adapter.bytes == 4 * (2 * 4 * (WIDTH + INNER) + INNER + 5 * WIDTH)
    adapter.check_positions(5)
    with raises(RequestRefused, block=4):
        adapter.check_positions(4)


@pytest.mark.parametrize(
    "part",
    [lora(1), ia3(1), ia3(1, tensors=[torch.rand(1, WIDTH)])],
    ids=["lora", "ia3 on the output", "ia3 on the input"],
)
def test_hooks_are_where_a_plan_needs_them_and_nowhere_else(model_folder, part):
    loaded = load(model_folder("llama"), "0:3")
    hooks = AdapterHooks(loaded.blocks, 0)

    def hooked() -> set[str]:
        return {
            path for path, module in loaded.blocks.named_modules() if module._forward_hooks or module._forward_pre_hooks
        }

    assert not hooked()
    hooks.plan = CallPlan.of(None, train=False, seed=0)
    assert not hooked()
    for _ in range(2):
        hooks.plan = CallPlan.of(Adapter((part,)), train=False, seed=0)
    assert hooked() == {f"1.{part.module}"}
    hooks.plan = CallPlan.of(None, train=True, seed=0)
    assert hooked() == {f"1.{part.module}", "0", "1", "2"}, "blocks are seeded in training"


@pytest.mark.parametrize(
    "parts",
    [
        [lora(1, method="vera")],
        [lora(9)],
        [lora(1, module="mlp")],
        [lora(1, module="")],
        [ia3(1, module="input_layernorm")],
        [lora(1, scaling=float("nan"))],
        [lora(1, tensors=[torch.full((4, WIDTH), float("inf")), torch.zeros(INNER, 4)])],
        [lora(1, tensors=[torch.zeros(4, WIDTH, dtype=torch.int32), torch.zeros(INNER, 4, dtype=torch.int32)])],
        [AdapterPart(block=1, method="prompt", tensors=[torch.zeros(2, WIDTH)])] * 2,
    ],
    ids=[
        "unknown method",
        "unknown block",
        "not a linear",
        "a block",
        "a norm",
        "scaling",
        "infinite",
        "integers",
        "prompts twice",
    ],
)
def test_parts_that_do_not_fit_the_blocks_are_refused(model_folder, parts):
    hooks = AdapterHooks(load(model_folder("llama"), "0:3").blocks, 0)
    with raises(RequestRefused, block=parts[0].block, module=parts[0].module):
        hooks.check(parts, WIDTH)
    hooks.check(
        [lora(0), lora(0), ia3(0), AdapterPart(block=0, method="prompt", tensors=[torch.zeros(2, WIDTH)])], WIDTH
    )

"""Adapters on the blocks of a server: what its hooks add, and which parts it refuses."""

import msgspec
import pytest
import torch

from petals_tune.adapters.base import linear_features
from petals_tune.blocks.adapters import Adapter, AdapterHooks, CallPlan
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.experts.stack import ExpertStack
from petals_tune.blocks.generation.session import Session
from petals_tune.errors import NotFinite, RequestRefused
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward, Step
from petals_tune.wire.span import BlockSpan
from tests.models import FAMILIES, STATE_FAMILIES, relative_error
from tests.raising import raises
from tests.servers.parts import forward, load
from tests.servers.steps import SPAN, hidden, outputs, session, step

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
    whole = Adapter((lora(3), ia3(3)))
    assert whole.after_first_step is whole
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


LINEARS = {  # of the small Llama: (inputs, outputs)
    "self_attn.q_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, INNER),
    "mlp.up_proj": (WIDTH, INNER),
    "mlp.down_proj": (INNER, WIDTH),
}


def loras(rank: int, *modules: str, blocks: range = range(1, 4), seed: int = 0, **fields) -> list[AdapterPart]:
    """LoRA of one rank on linears of some blocks; what it adds is about as large as what the linear gives."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for block in blocks:
        for module in modules:
            inputs, wide = LINEARS[module]
            tensors = [torch.randn(rank, inputs, generator=generator), torch.randn(wide, rank, generator=generator)]
            scaling = 0.05 / rank**0.5
            parts.append(
                AdapterPart(
                    **{"block": block, "method": "lora", "module": module, "scaling": scaling, "tensors": tensors}
                    | fields
                )
            )
    return parts


def factors(module: str, *, of_inputs: bool = False, seed: int = 0) -> list[AdapterPart]:
    generator, (inputs, wide) = torch.Generator().manual_seed(seed), LINEARS[module]
    shape = (1, inputs) if of_inputs else (wide, 1)
    return [
        AdapterPart(block=block, method="ia3", module=module, tensors=[0.5 + torch.rand(shape, generator=generator)])
        for block in range(SPAN.start, SPAN.stop)
    ]


def adapters_of_all_kinds() -> list[tuple[Adapter | None, int]]:
    """Adapters, and how many rows the session of each has."""
    gate, up, down, query = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"
    shared = Adapter(tuple(loras(4, query, gate, seed=1)))
    return [
        (Adapter(tuple(loras(1, gate, seed=2))), 1),
        (None, 1),
        (Adapter(tuple(loras(64, query, down, seed=3))), 2),
        (shared, 1),
        (Adapter((*factors(gate, seed=4), *factors(down, of_inputs=True, seed=5))), 3),
        (Adapter((*loras(3, gate, seed=6), *factors(gate, seed=7), *loras(2, gate, up, seed=8))), 1),
        (None, 2),
        (shared, 2),
        (Adapter(tuple(loras(8, gate, blocks=range(2, 3), seed=9, scaling=0.5))), 1),
    ]


def started(
    engine: Engine, adapters: list[tuple[Adapter | None, int]], *, equal_lengths: bool = False
) -> list[tuple[Session, Step]]:
    """Sessions behind their first steps, of different lengths, and the next step of each."""
    pairs = []
    for number, (adapter, rows) in enumerate(adapters):
        length = 2 if equal_lengths else 2 + number % 3
        own = session(rows, adapter=adapter, version=None if adapter is None else str(number))
        outputs(engine, (own, step(hidden(rows, length, number), 0)))
        pairs.append((own, step(hidden(rows, 1, 50 + number), length)))
    return pairs


def alone_and_together(
    engine: Engine, adapters: list[tuple[Adapter | None, int]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    alone = [outputs(engine, pair)[0] for pair in started(engine, adapters)]
    return alone, outputs(engine, *started(engine, adapters))


SLOW = [("none", torch.bfloat16), ("int8", torch.float32), ("nf4", torch.float32), ("nf4", torch.bfloat16)]


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        ("none", torch.float32),
        ("int8", torch.bfloat16),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW),
    ],
)
def test_sessions_with_different_adapters_share_a_pass_and_get_their_own_numbers(
    model_folder, monkeypatch, quantization, dtype
):
    engine = Engine(load(model_folder("llama"), str(SPAN), quantization, dtype))
    adapters = adapters_of_all_kinds()
    alone, together = alone_and_together(engine, adapters)
    for found, expected in zip(together, alone, strict=True):
        assert relative_error(found, expected) <= 1e-6
    plain = [outputs(engine, pair)[0] for pair in started(engine, [(None, rows) for _, rows in adapters])]
    for (adapter, _), own, without in zip(adapters, alone, plain, strict=True):
        assert adapter is None or relative_error(own, without) > 1e-2

    passes: list[int] = []
    run = engine._model.forward
    monkeypatch.setattr(
        engine._model, "forward", lambda **given: passes.append(len(given["inputs_embeds"])) or run(**given)
    )
    pairs = started(engine, adapters)
    passes.clear()
    outputs(engine, *pairs)
    assert passes == [sum(rows for _, rows in adapters)]


@pytest.mark.parametrize("factor", [1e15, 5e37])
def test_what_the_adapters_of_mates_hold_changes_no_bit_of_a_session(model_folder, factor):
    """Large numbers, and numbers whose products are not finite."""
    engine, adapters = Engine(load(model_folder("llama"), str(SPAN))), adapters_of_all_kinds()
    honest = outputs(engine, *started(engine, adapters))
    infinite = []
    for hostile in (0, 2, 4, 5):  # LoRA, (IA)3, both
        adapter, rows = adapters[hostile]
        assert adapter is not None
        larger = [
            msgspec.structs.replace(part, tensors=[part.tensors[0] * factor, *part.tensors[1:]])
            for part in adapter.parts
        ]
        mates = [*adapters[:hostile], (Adapter(tuple(larger)), rows), *adapters[hostile + 1 :]]
        pairs = started(engine, adapters)
        for (own, _), (changed, _) in zip(pairs, mates, strict=True):
            own.adapter = changed  # once its session has begun
        found = engine.step(pairs)
        if isinstance(output := found.pop(hostile), NotFinite):
            infinite.append(hostile)
        else:
            assert relative_error(output, honest[hostile]) > 1e3
        for own, expected in zip(found, [*honest[:hostile], *honest[hostile + 1 :]], strict=True):
            assert torch.equal(own, expected)
    assert infinite or factor < 1e30


def test_experts_apply_the_adapter_of_the_session_whose_rows_they_compute(model_folder):
    engine = Engine(load(model_folder("mixtral"), str(SPAN)))
    stacks = {path: each for path, each in engine.block(1).named_modules() if isinstance(each, ExpertStack)}
    assert stacks

    def on_experts(rank: int, seed: int) -> Adapter:
        generator, parts = torch.Generator().manual_seed(seed), loras(2, "self_attn.q_proj", seed=seed)
        for path, stack in stacks.items():
            experts, inputs, wide, _ = stack.for_adapters
            shapes = (experts * rank, inputs), (wide, experts * rank)
            tensors = [torch.randn(shape, generator=generator) for shape in shapes]
            parts.append(AdapterPart(block=2, method="expert_lora", module=path, scaling=0.1, tensors=tensors))
        return Adapter(tuple(parts))

    adapters = [(on_experts(2, 1), 1), (None, 2), (on_experts(3, 2), 2), (None, 1)]
    alone, together = alone_and_together(engine, adapters)
    for found, expected in zip(together, alone, strict=True):
        assert relative_error(found, expected) <= 1e-6
    plain = [outputs(engine, pair)[0] for pair in started(engine, [(None, rows) for _, rows in adapters])]
    assert relative_error(plain[0], alone[0]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *STATE_FAMILIES])
def test_every_linear_of_every_family_knows_whose_its_rows_are(model_folder, family):
    engine = Engine(load(model_folder(family), str(SPAN)))

    def everywhere(seed: int, rank: int | None) -> Adapter:
        generator, parts = torch.Generator().manual_seed(seed), []
        for (block, path), module in engine.hooks._modules.items():
            if (features := linear_features(module)) is not None:
                inputs, wide = features
                sizes = [(wide, 1)] if rank is None else [(rank, inputs), (wide, rank)]
                tensors = [torch.randn(size, generator=generator) for size in sizes]
                method = "ia3" if rank is None else "lora"
                parts.append(AdapterPart(block=block, method=method, module=path, scaling=0.02, tensors=tensors))
        return Adapter(tuple(parts))

    adapters = [
        (everywhere(1, 2), 1),
        (None, 1),
        (everywhere(2, 2), 1),
        (everywhere(3, None), 1),
        (everywhere(4, 3), 2),
    ]
    alone = [outputs(engine, pair)[0] for pair in started(engine, adapters, equal_lengths=True)]
    together = outputs(engine, *started(engine, adapters, equal_lengths=True))
    for found, expected in zip(together, alone, strict=True):
        assert relative_error(found, expected) <= 3e-6

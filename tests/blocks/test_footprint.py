"""What requests will take in memory, against torch's own account of what they allocate while they are computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from petals_tune.adapters.base import linear_features
from petals_tune.blocks.adapters import MAX_PARTS_A_MODULE, Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.experts.stack import expert_stacks
from petals_tune.blocks.footprint import Footprint, Pass
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward, Forward
from petals_tune.wire.span import BlockSpan
from tests.models import FAMILIES, STATE_FAMILIES
from tests.pretend_device import GpuEngine
from tests.servers.parts import forward, load
from tests.servers.steps import session, step

SPAN = "1:4"
FACTOR = 2  # what an estimate may be above what is taken; it is never below
LESS = 0.01  # but for what a graph keeps for each expert that zeros do not reach; `BudgetedStore.fill` counts it
QUICK = ("bloom", "gpt2", "llama")  # BLOOM's attention is written out, GPT-2 has dropout, Llama takes torch's kernels
WIDE = {"hidden_size": 128}  # so that what kernels hide does not decide
Engines = Callable[..., Engine]


@pytest.fixture(scope="module")
def engine_of(model_folder: Callable[..., Path]) -> Engines:
    @functools.cache
    def made(family: str, quantization: str = "none") -> Engine:
        changes = {"n_embd": 128} if family.startswith("gpt2") else WIDE
        return Engine(load(model_folder(family, **changes), SPAN, quantization))

    return made


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that `run` has allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def adapter_of(engine: Engine, kind: str, dropout: float = 0.1) -> Adapter | None:
    """`lora` and `ia3` on every linear of the blocks, `expert_lora` on every matrix of experts, or a prompt.

    `many` has as many parts on one linear as are taken.
    """
    parts = []
    for block in range(1, 4):
        linears = {path: linear_features(module) for path, module in engine.block(block).named_modules()}
        linears = {path: features for path, features in linears.items() if features is not None}
        where = {"lora": list(linears), "ia3": list(linears), "many": [next(iter(linears))] * MAX_PARTS_A_MODULE}
        for path in where.get(kind, []):
            inputs, outputs = linears[path]
            tensors = [torch.zeros(outputs, 1)] if kind == "ia3" else [torch.zeros(4, inputs), torch.zeros(outputs, 4)]
            method = "ia3" if kind == "ia3" else "lora"
            parts.append(AdapterPart(block=block, method=method, module=path, dropout=dropout, tensors=tensors))
        for path, stack in expert_stacks(engine.block(block)).items() if kind == "expert_lora" else ():
            experts, inputs, outputs, _ = stack.for_adapters
            tensors = [torch.zeros(4 * experts, inputs), torch.zeros(outputs, 4 * experts)]
            parts.append(AdapterPart(block=block, method=kind, module=path, tensors=tensors))
        if kind == "prompt":
            parts.append(AdapterPart(block=block, method="prompt", tensors=[torch.zeros(3, engine.hidden_size)]))
    if not parts:
        return None
    adapter = Adapter(tuple(engine.prepare_adapter(parts)))
    for tensor in adapter.tensors:
        tensor.requires_grad_(True)
    return adapter


def taken(
    engine: Engine, request: Callable[..., Forward], adapter: Adapter | None, *, per_block: bool = False
) -> tuple[int, int, int]:
    """(most during a forward without a graph, bytes of the graph, most during a forward with it and its backward)."""
    kept = 0

    def train() -> None:
        nonlocal kept
        result = engine.forward(request(keep=True), adapter, per_block=per_block)
        kept = result.graph_bytes
        grad = torch.zeros_like(result.output)
        engine.backward(Backward(lease=1, grad=grad), result.graph, adapter)

    train()  # what is made once is made now
    with_graph = peak_bytes(train)
    return peak_bytes(lambda: engine.forward(request(), adapter)), kept, with_graph


def estimated(footprint: Footprint, one: Pass, rows: int, length: int) -> tuple[int, int, int]:
    return tuple(  # type: ignore[return-value]
        estimate(one, rows, length)
        for estimate in (footprint.forward_bytes, footprint.kept_bytes, footprint.training_bytes)
    )


def assert_bounds(
    engine: Engine,
    rows: int,
    length: int,
    *,
    padded: bool,
    train: bool,
    kind: str = "none",
    per_block: bool = False,
) -> None:
    padding, adapter = None, adapter_of(engine, kind)
    if padded:
        padding = torch.ones(rows, length, dtype=torch.bool)
        padding[0, :3] = False

    def request(**fields: bool) -> Forward:
        hidden = torch.randn(rows, length, engine.hidden_size)
        return forward(SPAN, hidden, padding=padding, train=train, **fields)

    real = taken(engine, request, adapter, per_block=per_block)
    one = Pass(span=request().span, adapter=adapter, train=train, padded=padded, per_block=per_block)
    guessed = estimated(engine.footprint, one, rows, length)
    for name, most, estimate in zip(("forward", "kept", "training"), real, guessed, strict=True):
        hidden_bytes = 0 if name == "kept" else engine.footprint.hidden_by_kernels
        least = (1 - LESS) * most if name == "kept" else most
        # Without dropout, parts on one linear share its input, which counts for each of them.
        factor = 2.5 if kind == "many" else FACTOR
        assert least <= estimate <= factor * most + hidden_bytes, (name, most, estimate)


@pytest.mark.parametrize("family", QUICK)
def test_estimates_are_bounds_and_no_wild_ones(engine_of, family):
    engine = engine_of(family)
    assert_bounds(engine, 3, 60, padded=False, train=False)
    assert_bounds(engine, 1, 250, padded=True, train=True)
    assert_bounds(engine, 1, 250, padded=True, train=True, per_block=True)


def test_a_long_text_without_padding_takes_no_memory_for_pairs_of_positions(engine_of):
    """Masks and scores of 1,000 positions would take as much as all the rest."""
    for per_block in (False, True):
        assert_bounds(engine_of("llama"), 1, 1000, padded=False, train=False, kind="lora", per_block=per_block)
    one, footprint = Pass(span=forward(SPAN, torch.zeros(1, 1, 1)).span, padded=False), engine_of("llama").footprint
    for estimate in (footprint.forward_bytes, footprint.kept_bytes, footprint.training_bytes):
        short, long, longer = (estimate(one, 1, positions) for positions in (1000, 2000, 4000))
        assert longer - long == 2 * (long - short)


def test_attention_with_a_window_takes_a_mask_beyond_it(engine_of):
    footprint = engine_of("mistral").footprint
    padded, unpadded = (Pass(span=forward(SPAN, torch.zeros(1, 1, 1)).span, padded=each) for each in (True, False))
    assert footprint.forward_bytes(unpadded, 1, 100) == footprint.forward_bytes(padded, 1, 100), "a window of 4"
    assert_bounds(engine_of("mistral"), 1, 250, padded=False, train=False)


@pytest.mark.parametrize("kind", ["lora", "many", "ia3", "prompt"])
def test_estimates_with_an_adapter(engine_of, kind):
    assert_bounds(engine_of("llama"), 2, 120, padded=False, train=True, kind=kind)
    assert_bounds(engine_of("llama"), 2, 120, padded=False, train=True, kind=kind, per_block=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_estimates_with_an_adapter_on_experts(engine_of, family):
    assert_bounds(engine_of(family, "int8"), 2, 120, padded=False, train=True, kind="expert_lora")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_estimates_of_every_family(engine_of, family, quantization):
    engine = engine_of(family, quantization)
    for rows, length in ((1, 13), (3, 40), (2, 60)):
        for padded in (False, True):
            for train in (False, True):
                for per_block in (False, engine.footprint.computes_single_blocks(BlockSpan.parse(SPAN))):
                    assert_bounds(engine, rows, length, padded=padded, train=train, per_block=per_block)


@pytest.mark.parametrize(
    "family", [name if name == "qwen3_next" else pytest.param(name, marks=pytest.mark.slow) for name in STATE_FAMILIES]
)
def test_estimates_of_blocks_with_a_state(model_folder, family):
    """Chunks of linear attention are filled up, and their length is found by the family: bounds are wider."""
    heads = {"mamba_n_heads": 16, "mamba_d_ssm": 256}
    fitting = {name: value for name, value in heads.items() if name in STATE_FAMILIES[family]}
    engine = Engine(load(model_folder(family, **WIDE, **fitting), SPAN))
    for rows, length in ((1, 13), (3, 40), (2, 150)):
        padding = torch.arange(length)[None] >= torch.arange(rows)[:, None]

        def request(rows=rows, length=length, padding=padding, **fields: bool) -> Forward:
            return forward(SPAN, torch.randn(rows, length, engine.hidden_size), padding=padding, **fields)

        real = taken(engine, request, None)
        guessed = estimated(engine.footprint, Pass(span=request().span), rows, length)
        for name, most, estimate in zip(("forward", "kept", "training"), real, guessed, strict=True):
            hidden_bytes = 0 if name == "kept" else engine.footprint.hidden_by_kernels
            least = 0.95 * most if name == "kept" else most
            assert least <= estimate <= 3 * most + hidden_bytes, (name, most, estimate)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "many", "ia3", "prompt"])
@pytest.mark.parametrize("family", ["bloom", "gpt2", "llama", "mixtral"])
def test_estimates_of_every_adapter(engine_of, family, kind):
    for train in (False, True):
        assert_bounds(engine_of(family), 2, 120, padded=True, train=train, kind=kind)


@pytest.mark.parametrize("family", QUICK)
@pytest.mark.parametrize(("rows", "before", "new"), [(2, 200, 40), (4, 255, 1)])
def test_estimates_of_steps(engine_of, family, rows, before, new):
    engine = engine_of(family)
    own = session(rows)
    own.max_length = before + new

    def run(first: int, count: int) -> None:
        (output,) = engine.step([(own, step(torch.randn(rows, count, engine.hidden_size), first))])
        assert isinstance(output, torch.Tensor), output

    run(0, before)
    run(before, new)
    most = peak_bytes(lambda: run(before, new))
    estimate = engine.footprint.step_bytes(Pass(span=own.span), rows, new, before + new)
    # A single position, which needs less, is counted as several: the caches of one block may be copied for these.
    copies = 4 * engine.footprint.token_bytes * rows * (before + new)
    assert most <= estimate <= FACTOR * most + engine.footprint.hidden_by_kernels + copies


def test_the_estimate_of_a_step_that_sessions_with_adapters_share(engine_of):
    engine = engine_of("llama")
    adapters = [adapter_of(engine, kind) for kind in ("lora", "ia3", "many", "none") * 2]
    sessions = [session(adapter=adapter, version=str(number)) for number, adapter in enumerate(adapters)]
    position = 0

    def run() -> None:
        nonlocal position
        made = engine.step([(own, step(torch.randn(1, 1, engine.hidden_size), position)) for own in sessions])
        assert all(isinstance(output, torch.Tensor) for output in made), made
        position += 1

    for _ in range(3):
        run()
    most = peak_bytes(run)
    mates = [adapter for adapter in adapters if adapter is not None]
    estimate = engine.footprint.step_bytes(Pass(span=sessions[0].span, mates=mates), len(sessions), 1, position)
    alone = engine.footprint.step_bytes(Pass(span=sessions[0].span), len(sessions), 1, position)
    assert max(most, alone) < estimate <= 2 * alone


def test_a_part_of_the_blocks_takes_its_part(engine_of):
    """Of three equal blocks one keeps a third, and what is kept once for all."""
    footprint = engine_of("llama").footprint
    one, two, three = (
        footprint.kept_bytes(Pass(span=forward(span, torch.zeros(1, 1, 1)).span), 2, 50)
        for span in ("3:4", "2:4", "1:4")
    )
    assert three - two == two - one
    assert one < two < 2 * one


def test_of_blocks_that_are_computed_again_their_inputs_are_kept(engine_of):
    engine = engine_of("llama")
    whole, single = (Pass(span=BlockSpan.parse(SPAN), padded=False, per_block=each) for each in (False, True))
    head_dim = 128 // 4
    hidden_states, rotary_tables = 3 * 4 * 2 * 50 * 128, 2 * 4 * 50 * head_dim
    kept = engine.footprint.kept_bytes(single, 2, 50)
    assert hidden_states + rotary_tables <= kept <= 1.2 * (hidden_states + rotary_tables)
    assert 6 * kept < engine.footprint.kept_bytes(whole, 2, 50)
    assert engine.footprint.training_bytes(single, 2, 50) < 0.75 * engine.footprint.training_bytes(whole, 2, 50)


def test_memory_of_a_gpu_is_estimated_likewise(model_folder):
    folder = model_folder("llama", **WIDE)
    gpu, cpu = GpuEngine(load(folder, SPAN)).footprint, Engine(load(folder, SPAN)).footprint
    one = Pass(span=forward(SPAN, torch.zeros(1, 1, 1)).span)
    assert gpu.kept_bytes(one, 2, 50) >= cpu.kept_bytes(one, 2, 50)

"""Blocks that are computed once more in the backward give the gradients of a whole graph, bit for bit."""

from __future__ import annotations

import pytest
import torch

from petals_tune.adapters.base import linear_features
from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.experts.stack import expert_stacks
from petals_tune.errors import RequestRefused
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward, Forward
from petals_tune.wire.span import BlockSpan
from tests.models import FAMILIES, MORE_FAMILIES, STATE_FAMILIES
from tests.raising import raises
from tests.servers.parts import forward, load

SPAN = "1:4"
ROWS, LENGTH = 2, 23
QUICK = ("llama", "granite", "bloom", "mixtral")  # Granite's model changes what its first block gets
DROPOUT = {"llama": {"attention_dropout": 0.3}, "gpt2": {"resid_pdrop": 0.3, "attn_pdrop": 0.3}}
NOT_SINGLE = {"gemma4_text"}  # blocks share a dictionary of keys and values
SLOW = sorted({*FAMILIES, *MORE_FAMILIES, *STATE_FAMILIES} - {*QUICK})


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter_of(engine: Engine, *, blocks: tuple[int, ...] = (2, 3), dropout: float = 0.3) -> Adapter:
    """LoRA on every linear and every matrix of experts of `blocks`, and a prompt at the first of them."""
    parts = []
    for block in blocks:
        module = engine.block(block)
        linears = [(path, linear_features(inner)) for path, inner in module.named_modules() if "router" not in path]
        sizes = [(path, *features, "lora", 1) for path, features in linears if features is not None]
        for path, stack in expert_stacks(module).items():
            experts, inputs, outputs, _ = stack.for_adapters
            sizes.append((path, inputs, outputs, "expert_lora", experts))
        for number, (path, inputs, outputs, method, experts) in enumerate(sizes):
            pair = [drawn(2 * experts, inputs, seed=number) * 0.3, drawn(outputs, 2 * experts, seed=number + 100) * 0.3]
            dropped = dropout if method == "lora" else 0.0
            parts.append(AdapterPart(block=block, method=method, module=path, dropout=dropped, tensors=pair))
    parts.append(AdapterPart(block=blocks[0], method="prompt", tensors=[drawn(3, engine.hidden_size, seed=7)]))
    adapter = Adapter(tuple(engine.prepare_adapter(parts)))
    for tensor in adapter.tensors:
        tensor.requires_grad_()
    return adapter


def gradients(
    engine: Engine, request: Forward, adapter: Adapter | None, *, per_block: bool, lease: bool = True
) -> list[torch.Tensor]:
    """The output, the gradient at the input where there is one, and the adapter's."""
    grad = drawn(*request.hidden.shape, seed=2)
    result = engine.forward(request, adapter, per_block=per_block)
    asked = Backward(lease=1, grad=grad) if lease else Backward(again=request, grad=grad)
    graph = result.graph if lease else None
    at_input, at_adapter = engine.backward(asked, graph, adapter, per_block=per_block)
    return [result.output, *([] if at_input is None else [at_input]), *at_adapter]


def assert_equal(engine: Engine, adapter: Adapter | None, **fields: object) -> None:
    padding = torch.arange(LENGTH)[None] >= torch.tensor([[0], [3]])
    hidden = drawn(ROWS, LENGTH, engine.hidden_size, seed=1)

    def request() -> Forward:
        return forward(SPAN, hidden, **{"keep": True, "padding": padding, "seed": 5, **fields})

    whole = gradients(engine, request(), adapter, per_block=False)
    assert sum(not each.any() for each in whole) <= len(whole) // 4, "of experts to which no row goes, but no more"
    for lease in (True, False):
        found = gradients(engine, request(), adapter, per_block=True, lease=lease)
        assert len(found) == len(whole)
        assert all(torch.equal(mine, its) for mine, its in zip(found, whole, strict=True))


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_gradients_are_those_of_a_whole_graph(model_folder, family):
    engine = Engine(load(model_folder(family, **DROPOUT.get(family, {})), SPAN))
    if family in NOT_SINGLE:
        with raises(RequestRefused, reason="no single blocks"):
            assert_equal(engine, adapter_of(engine), train=True)
        assert not engine.footprint.computes_single_blocks(BlockSpan.parse(SPAN))
        return
    assert_equal(engine, adapter_of(engine), train=True)

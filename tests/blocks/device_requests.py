"""Every kind of request that an engine answers, for engines on two devices to be compared."""

from __future__ import annotations

import torch

from petals_tune.blocks.adapters import Adapter
from petals_tune.blocks.engine import Engine
from petals_tune.wire.adapter import AdapterPart
from petals_tune.wire.messages import Backward
from tests.models import masks
from tests.servers.parts import forward
from tests.servers.steps import outputs, session, step

SPAN = "1:4"  # the blocks of the server; steps.SPAN
LINEARS = {  # of each family, one with its features
    "bloom": ("self_attention.query_key_value", 32, 96),
    "llama": ("mlp.gate_proj", 32, 48),
    "gemma3_text": ("self_attn.q_proj", 32, 32),
    "gpt2": ("mlp.c_fc", 32, 128),
    "mixtral": ("self_attn.o_proj", 32, 32),
}
ROWS, LENGTH, PROMPT = 3, 7, 2


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uploaded(engine: Engine, family: str) -> Adapter:
    """LoRA with dropout, on experts where there are some, prompts and (IA)3, as a server keeps them."""
    module, wide_in, wide_out = LINEARS[family]
    lora = [noise(4, wide_in, seed=4), noise(wide_out, 4, seed=5)]
    parts = [
        AdapterPart(block=1, method="prompt", tensors=[noise(PROMPT, 32, seed=3)]),
        AdapterPart(block=2, method="lora", module=module, dropout=0.3, tensors=lora),
        AdapterPart(block=3, method="ia3", module=module, tensors=[noise(wide_out, 1, seed=6)]),
        AdapterPart(block=3, method="prompt", tensors=[noise(PROMPT, 32, seed=7)]),
    ]
    if family == "mixtral":
        tensors = [noise(2 * 4, 32, seed=8), noise(96, 2 * 4, seed=9)]  # r=2 on four experts
        parts.append(AdapterPart(block=2, method="expert_lora", module="mlp.experts.gate_up_proj", tensors=tensors))
    adapter = Adapter(tuple(engine.prepare_adapter(parts)))
    for tensor in adapter.tensors:
        tensor.requires_grad_(True)
    return adapter


def training(engine: Engine, family: str, padding: str, *, train: bool) -> dict[str, torch.Tensor]:
    """The output of a forward, its bytes, and the gradients by its lease ("kept") and by another forward ("again")."""
    mask, grad = masks(ROWS, LENGTH)[padding].bool(), noise(ROWS, LENGTH, 32, seed=2)
    adapter, hidden = uploaded(engine, family), noise(ROWS, LENGTH, 32, seed=1)
    request = forward(SPAN, hidden, padding=mask, keep=True, train=train, seed=9, adapter="version")
    result = engine.forward(request, adapter)
    found = {"output": result.output, "bytes": torch.tensor(result.graph_bytes)}
    leased = Backward(lease=1, grad=grad), result.graph
    again = Backward(again=request, grad=grad), None
    for name, (backward, graph) in {"kept": leased, "again": again}.items():
        at_input, at_adapter = engine.backward(backward, graph, adapter)
        assert at_input is not None
        found |= {f"{name} input": at_input}
        found |= {f"{name} {number}": gradient for number, gradient in enumerate(at_adapter)}
    return found


def placed(engine: Engine) -> torch.Tensor:
    """The output at given positions, without a graph."""
    request = forward(SPAN, noise(ROWS, LENGTH, 32, seed=1), positions=torch.arange(LENGTH)[None] + 3)
    return engine.forward(request, None).output


def batched_steps(engine: Engine) -> list[torch.Tensor]:
    """Two sessions, one of them padded: apart, in a batch, with rows that change places, and at given positions."""
    padded, plain = session(2), session(1)
    padding = torch.tensor([[False, False, True, True], [True] * 4])
    made = outputs(engine, (padded, step(noise(2, 4, 32, seed=1), 0, padding=padding)))
    made += outputs(engine, (plain, step(noise(1, 4, 32, seed=2), 0)))
    if (
        engine.attention.apart or not engine.loaded.family.windowed
    ):  # steps of others share a batch at different positions
        made += outputs(engine, (plain, step(noise(1, 1, 32, seed=3), 4)))
    now = step(noise(2, 1, 32, seed=4), 4, order=torch.tensor([1, 0]))
    made += outputs(engine, (padded, now), (plain, step(noise(1, 1, 32, seed=5), plain.position)))
    return made + outputs(engine, (padded, step(noise(2, 1, 32, seed=6), 4, positions=torch.tensor([[2], [4]]))))


def adapted_steps(engine: Engine, family: str) -> list[torch.Tensor]:
    own = session(2, adapter=uploaded(engine, family), version="version")
    first = outputs(engine, (own, step(noise(2, 4, 32, seed=1), 0)))
    return first + outputs(engine, (own, step(noise(2, 1, 32, seed=2), 4)))

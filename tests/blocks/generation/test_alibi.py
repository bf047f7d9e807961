"""BLOOM's steps of one position have the numbers of transformers' own attention, which a forward takes."""

import pytest
import torch

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.alibi import ApartBloomAttention
from tests.models import relative_error
from tests.servers.parts import forward, load
from tests.servers.steps import SPAN, hidden, outputs, session, step

LENGTH = 24


def padding(kind: str) -> torch.Tensor | None:
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    if kind == "left":
        mask[0, :3] = False
    if kind == "hole":
        mask[1, 5:8] = False
    return None if kind == "none" else mask


@pytest.mark.parametrize(("kind", "heads"), [("none", 12), ("left", 4), ("hole", 4)])  # 12: slopes of two kinds
def test_a_step_beside_another_has_the_numbers_of_a_forward(model_folder, kind, heads):
    folder = model_folder("bloom", num_attention_heads=heads, hidden_size=8 * heads)
    engine, width = Engine(load(folder, str(SPAN))), 8 * heads
    assert engine.attention.apart
    assert isinstance(engine.block(1).self_attention, ApartBloomAttention)
    mask = padding(kind)
    text = torch.randn(2, LENGTH, width, generator=torch.Generator().manual_seed(0))
    expected = engine.forward(forward(str(SPAN), text, padding=mask), None).output
    kept, other, at = session(2), session(1), 12
    outputs(engine, (kept, step(text[:, :at], 0, padding=None if mask is None else mask[:, :at])))
    outputs(engine, (other, step(text[:1, :20], 0)))
    for position in range(at, LENGTH):
        now = step(text[:, position : position + 1], position)
        found, _ = outputs(engine, (kept, now), (other, step(text[:1, :1], 20 + position - at)))
        assert relative_error(found, expected[:, position : position + 1]) < 1e-6


def test_the_training_half_keeps_transformers_own(model_folder):
    engine = Engine(load(model_folder("bloom"), str(SPAN)))
    text = hidden(2, 6, 0)
    before = engine.forward(forward(str(SPAN), text, keep=True), None).output
    outputs(engine, (session(2), step(text, 0)))
    assert torch.equal(engine.forward(forward(str(SPAN), text, keep=True), None).output, before)

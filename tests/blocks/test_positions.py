"""Positions beyond what a model's blocks can compute are refused, and what plain transformers computes is not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, GPTNeoConfig, PretrainedConfig

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.positions import PositionLimits
from petals_tune.errors import RequestRefused
from petals_tune.model.families import family_of
from petals_tune.wire.messages import Backward
from tests.models import FAMILIES, PHI3_LONGROPE, ROPE_TYPES, config_of
from tests.raising import raises
from tests.servers.parts import forward, load
from tests.servers.steps import SPAN, hidden, outputs, session, step


def limits_of(config: PretrainedConfig) -> PositionLimits:
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return PositionLimits.of(model, family_of(model).blocks_of(model))


@pytest.mark.parametrize(
    ("config", "given", "table", "length"),
    [
        (config_of("llama"), 64, None, None),
        (config_of("llama", **ROPE_TYPES["linear"]), 128, None, None),  # 32, stretched by 4
        (config_of("llama", **ROPE_TYPES["dynamic"]), 32, None, None),  # 8, by 4
        (config_of("llama", **ROPE_TYPES["yarn"]), 32, None, None),  # 8, by 4: the stretched number is the config's
        (config_of("llama", **ROPE_TYPES["llama3"]), 64, None, None),  # 8, by 8
        (config_of("phi3", **PHI3_LONGROPE), 32, None, None),
        (config_of("gptj"), 64, 64, None),
        (config_of("gpt2"), 64, None, None),
        (config_of("mpt"), None, None, 64),
        (config_of("bloom"), None, None, None),
        (GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]], max_position_embeddings=9), 9, None, 9),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_limits_are_found_in_config_and_blocks(config, given, table, length):
    assert limits_of(config) == PositionLimits(given=given, table=table, length=length)


@pytest.mark.slow
def test_most_families_have_no_table_that_ends():
    limited = {name for name in FAMILIES if (found := limits_of(config_of(name))).table or found.length}
    assert limited == {"gptj", "mpt"}


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_given_positions_are_bounded_forward_and_again_and_in_steps(model_folder, family):
    engine = Engine(load(model_folder(family), str(SPAN)))
    beyond, last = torch.tensor([[64]]), torch.tensor([[63]])
    request = forward(str(SPAN), hidden(1, 1, 0), positions=beyond)
    with raises(RequestRefused, reason="positions", max_position=63):
        engine.forward(request, None)
    with raises(RequestRefused, reason="positions", max_position=63):
        engine.backward(Backward(again=request, grad=hidden(1, 1, 1)), None, None)
    good, bad = session(), session()
    kept = step(hidden(1, 1, 0), 0)
    found, refused = engine.step([(good, kept), (bad, step(hidden(1, 1, 0), 0, positions=beyond))])
    assert (type(refused), refused.reason, refused.max_position) == (RequestRefused, "positions", 63)
    assert torch.equal(found, outputs(engine, (session(), kept))[0])
    assert (good.position, bad.position) == (1, 0)
    engine.forward(forward(str(SPAN), hidden(1, 1, 0), positions=last), None)
    outputs(engine, (bad, step(hidden(1, 1, 0), 0, positions=last)))


def test_a_rotary_text_may_grow_beyond_the_config_as_in_transformers(model_folder):
    """Counted positions, and given ones that stay inside the text."""
    engine = Engine(load(model_folder("llama", max_position_embeddings=8), str(SPAN)))
    engine.forward(forward(str(SPAN), hidden(1, 12, 0)), None)
    positions = torch.arange(12)[None]
    engine.forward(forward(str(SPAN), hidden(1, 12, 0), positions=positions), None)
    with raises(RequestRefused, reason="positions", max_position=11):
        engine.forward(forward(str(SPAN), hidden(1, 12, 0), positions=positions + 1), None)
    grown = session()
    outputs(
        engine,
        (grown, step(hidden(1, 12, 0), 0)),
    )
    outputs(engine, (grown, step(hidden(1, 1, 0), 12, positions=torch.tensor([[12]]))))


@pytest.mark.parametrize(("family", "changes"), [("gptj", {"n_positions": 8}), ("mpt", {"max_seq_len": 8})])
def test_no_text_is_longer_than_a_table(model_folder, family, changes):
    """A step behind the table's end would fail inside torch, and all that share its batch with it."""
    engine = Engine(load(model_folder(family, **changes), str(SPAN)))
    with raises(RequestRefused, reason="positions", max_position=7):
        engine.forward(forward(str(SPAN), hidden(1, 9, 0)), None)
    full, good = session(), session()
    for each in (full, good):
        outputs(engine, (each, step(hidden(1, 8, 0), 0)))
    found, refused = engine.step([(good, step(hidden(1, 1, 1), 7)), (full, step(hidden(1, 1, 1), 8))])
    assert isinstance(found, torch.Tensor)
    assert (type(refused), refused.max_position) == (RequestRefused, 7)

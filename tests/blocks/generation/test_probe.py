"""What blocks keep in the caches of sessions, against their sizes."""

import pytest
import torch
from torch import nn

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.sizes import CacheSizes
from petals_tune.blocks.generation.states import MOST_INPUTS, MOST_SNAPSHOTS
from petals_tune.errors import UnsupportedModel
from petals_tune.wire.span import BlockSpan
from tests.models import config_of
from tests.raising import raises
from tests.servers.parts import load
from tests.servers.steps import SPAN, hidden, outputs, session, step

FLOAT = 4  # bytes


def test_keys_values_and_states_are_measured_by_block(model_folder):
    """Blocks 1:4 of bamba are attention, Mamba and Mamba."""
    engine, config = Engine(load(model_folder("bamba"), str(SPAN))), config_of("bamba")
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    inner = config.mamba_n_heads * config.mamba_d_head
    convolution = (inner + 2 * config.mamba_n_groups * config.mamba_d_state) * config.mamba_d_conv
    state = (convolution + inner * config.mamba_d_state) * FLOAT
    sizes = engine.cache_sizes
    assert (sizes.start, list(sizes.positions), list(sizes.states)) == (
        1,
        [2 * heads * width * FLOAT, 0, 0],
        [0, state, state],
    )
    assert (engine.state_blocks.all, engine.state_blocks.one_by_one) == ({2, 3}, set())


def test_a_session_takes_no_more_than_its_size(model_folder):
    engine = Engine(load(model_folder("bamba"), str(SPAN)))
    kept = session(2)
    for at in range(20):
        outputs(engine, (kept, step(hidden(2, 1, at), at)))
    for at in (20, 24, 28):
        outputs(engine, (kept, step(hidden(2, 4, at), at)))
    tensors = [*kept.states.current.values()]
    tensors += [tensor for _, states in kept.states._snapshots for tensor in states.values()]
    tensors += [each.hidden for each in kept.states._inputs]
    taken = kept.memory.tail_bytes + sum(tensor.nbytes for tensor in tensors)
    assert taken <= engine.cache_sizes.bytes(SPAN, 2, kept.max_length)


@pytest.mark.parametrize(("family", "one_by_one"), [("jamba", {2, 3}), ("qwen3_next", set()), ("lfm2", set())])
def test_blocks_that_do_not_go_on_with_several_positions_are_found(model_folder, family, one_by_one):
    assert Engine(load(model_folder(family), str(SPAN))).state_blocks.one_by_one == one_by_one


def test_a_block_that_keeps_its_state_in_itself_is_refused(model_folder):
    engine = Engine(load(model_folder("lfm2"), str(SPAN)))
    engine.block(2).conv = _Stateless()
    with raises(UnsupportedModel, reason="state"):
        _ = engine.cache_sizes


class _Stateless(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        return hidden_states


SIZES = CacheSizes(start=2, positions=[10, 0, 0], states=[0, 100, 50], inputs=4)


@pytest.mark.parametrize("length", [1, 7, MOST_INPUTS, MOST_INPUTS + 1, 5000])
@pytest.mark.parametrize(
    ("span", "each", "once"), [("2:5", 10, 150), ("2:3", 10, 0), ("3:5", 1, 150), ("2:4", 10, 100)]
)
def test_the_size_of_a_session_and_the_longest_that_fits(span, each, once, length):
    span = BlockSpan.parse(span)
    inputs = 4 * min(length, MOST_INPUTS) if once else 0
    size = 3 * (each * length + once * (1 + MOST_SNAPSHOTS) + inputs)
    assert SIZES.bytes(span, 3, length) == size
    assert SIZES.longest(span, 3, size) == length
    assert SIZES.longest(span, 3, size - 1) == length - 1
    assert SIZES.longest(span, 3, 0) == 0

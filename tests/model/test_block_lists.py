"""Number and kinds of blocks are set for a part of the blocks, whether a config stores or computes them."""

import copy

import pytest
from transformers import PretrainedConfig

from petals_tune.model.block_lists import kinds_of_blocks, restore_class, set_blocks
from tests.models import config_of

KINDS = {
    "llama": None,
    "gemma3_text": ["sliding_attention", "sliding_attention", "full_attention"] * 2,  # stored
    "jamba": ["linear_attention", "full_attention", "linear_attention"] * 2,  # from a period
    "bamba": ["linear_attention", "full_attention", *["linear_attention"] * 2, "full_attention", "linear_attention"],
}


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest) -> PretrainedConfig:
    return config_of(request.param)


def test_kinds_are_read_and_a_part_of_them_is_set(config):
    kinds = kinds_of_blocks(config)
    assert kinds == KINDS[config.model_type]
    set_blocks(config, 2)
    if kinds is not None:
        config.layer_types = kinds[1:3]
    assert config.num_hidden_layers == 2
    assert kinds_of_blocks(config) == (None if kinds is None else kinds[1:3])
    set_blocks(config, 0)
    assert config.num_hidden_layers == 0
    assert kinds_of_blocks(copy.deepcopy(config)) == (None if kinds is None else kinds[1:3])


def test_a_config_computes_again_what_was_set(config):
    own, before = type(config), config.to_dict()
    set_blocks(config, 0)
    assert isinstance(config, own)
    restore_class(config)
    assert type(config) is own
    config.num_hidden_layers = 6
    assert config.to_dict() == before
    assert kinds_of_blocks(config) == KINDS[config.model_type]


def test_a_number_that_follows_from_the_kinds_can_be_set():
    config = config_of("nemotron_h")
    kinds = kinds_of_blocks(config)
    set_blocks(config, 2)
    config.layer_types = kinds[2:4]
    assert (config.num_hidden_layers, kinds_of_blocks(config)) == (2, ["full_attention", "linear_attention"])
    set_blocks(config, 0)
    assert config.num_hidden_layers == 0
    whole = config_of("nemotron_h")
    set_blocks(whole, 0)
    restore_class(whole)
    assert (whole.num_hidden_layers, kinds_of_blocks(whole)) == (6, kinds)

"""Fields of the config: the client's may be changed, those of the blocks not, neither at the beginning nor later."""

import pytest
import torch
from transformers import PretrainedConfig

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ConfigError
from petals_tune.remote.config import BlocksConfig, with_changes
from tests.models import FAMILIES, config_of
from tests.raising import raises

# (family, field, another value)
OF_BLOCKS = [
    ("llama", "rms_norm_eps", 1e-2),
    ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
    ("gemma2", "attn_logit_softcapping", 5.0),
    ("gemma2", "sliding_window", 2),
    ("bloom", "layer_norm_epsilon", 1e-2),
    ("gpt2", "resid_pdrop", 0.5),
    ("mpt", "attn_config", {"clip_qkv": 1.0}),
]


@pytest.mark.parametrize(("family", "field", "value"), OF_BLOCKS)
def test_a_field_of_the_blocks_is_refused_unless_it_stays(family, field, value):
    config = config_of(family)
    with_changes(config, {field: getattr(config, field)})
    with raises(ConfigError, key=field, seen=value):
        with_changes(config, {field: value})


@pytest.mark.parametrize(("family", "field", "value"), OF_BLOCKS)
def test_a_field_of_the_blocks_that_is_changed_later_is_found(family, field, value):
    config = config_of(family)
    blocks = BlocksConfig(config)
    blocks.check(config)
    setattr(config, field, value)
    with raises(ConfigError, key=field):
        blocks.check(config)


def test_the_old_name_of_dtype_is_not_taken_for_a_field():
    with raises(ConfigError, key="torch_dtype"):
        with_changes(config_of("llama"), {"torch_dtype": "bfloat16"})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_training_loops_change_is_the_clients(family):
    config: PretrainedConfig = config_of(family)
    blocks = BlocksConfig(config)
    changes = {"use_cache": False, "pad_token_id": 5, "eos_token_id": [2, 7], "num_labels": 3, "vocab_size": 200}
    assert {name: getattr(with_changes(config, changes), name) for name in changes} == changes
    for name, value in changes.items():
        setattr(config, name, value)
    config.something_of_yours = 1
    blocks.check(config)


def test_a_changed_config_is_refused_by_the_next_call(folder, model):
    ids = torch.tensor([[5, 6, 7]])
    with raises(ConfigError, key="layer_norm_epsilon"):
        AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=[], layer_norm_epsilon=0.1)
    model.config.layer_norm_epsilon = 0.1
    with raises(ConfigError, key="layer_norm_epsilon"):
        model(input_ids=ids)
    with raises(ConfigError, key="layer_norm_epsilon"):
        model.generate(ids, max_new_tokens=2)

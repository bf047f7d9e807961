"""Which matrices LoRA trains, family by family."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from petals_tune.errors import ConfigError
from petals_tune.model.families import family_of
from petals_tune.service.tinker.records import LoRA
from petals_tune.service.tinker.runs.targets import lora_config
from tests.models import config_of
from tests.raising import raises

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
GATED = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
# Of each family: of attention, of MLPs, of experts, and the head.
EXPECTED = {
    "llama": (ATTENTION, GATED, set(), "lm_head"),
    "bloom": (
        {"self_attention.query_key_value", "self_attention.dense"},
        {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        set(),
        "lm_head",
    ),
    "gpt2": ({"attn.c_attn", "attn.c_proj"}, {"mlp.c_fc", "mlp.c_proj"}, set(), "lm_head"),
    "opt": (
        {f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")},
        {"fc1", "fc2"},
        set(),
        "lm_head",
    ),
    "gpt_neox": (
        {"attention.query_key_value", "attention.dense"},
        {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        set(),
        "lm_head",
    ),
    "qwen2_moe": (
        ATTENTION,
        GATED | {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")},
        {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
        "lm_head",
    ),
    "jamba": (
        ATTENTION,
        {f"feed_forward.{name}_proj" for name in ("gate", "up", "down")},
        {"feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"},
        "lm_head",
    ),
    "nemotron_h": (
        {f"mixer.{name}_proj" for name in "qkvo"},
        {f"mixer.{place}{name}_proj" for place in ("", "shared_experts.") for name in ("up", "down")},
        {"mixer.experts.up_proj", "mixer.experts.down_proj"},
        "lm_head",
    ),
}


def model_of(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(family))
    model.remote_blocks = nn.ModuleList(family_of(model).blocks_of(model))
    return model


@pytest.mark.parametrize("family", EXPECTED)
def test_what_is_trained_of_a_family(family):
    attention, mlp, experts, head = EXPECTED[family]
    model = model_of(family)

    def chosen(**parts):
        off = {"train_attn": False, "train_mlp": False, "train_unembed": False}
        config = lora_config(model, LoRA(rank=8, **{**off, **parts}))
        assert (config.r, config.lora_alpha) == (8, 32)
        return set(config.target_modules), set(config.target_parameters or ())

    assert chosen(train_attn=True) == (attention, set())
    assert chosen(train_mlp=True) == (mlp, experts)
    assert chosen(train_unembed=True) == ({head}, set())
    assert chosen(train_attn=True, train_mlp=True, train_unembed=True) == ({*attention, *mlp, head}, experts)


def test_nothing_to_train_is_refused():
    model = SimpleNamespace(remote_blocks=nn.ModuleList([nn.Module()]), get_output_embeddings=lambda: None)
    with raises(ConfigError, key="lora_config"):
        lora_config(model, LoRA(rank=8))

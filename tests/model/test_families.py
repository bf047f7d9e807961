"""Splitting a model: where its blocks are, and which models have none that can be split off."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from petals_tune.errors import UnsupportedModel
from petals_tune.model.families import (
    empty_the_rest,
    family_of,
    learned_positions,
    load_part,
    placeholder_model,
    trimmed_class,
    trimmed_config,
    without_blocks,
)
from petals_tune.wire.span import BlockSpan
from tests.raising import raises

SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 32}
LLAMA = {"intermediate_size": 24, "num_key_value_heads": 2}


def config_of(model_type: str, **options: object) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **{**SMALL, **options})


@pytest.mark.parametrize(
    ("config", "blocks", "prefix", "windowed"),
    [
        (config_of("llama", **LLAMA), "layers", "model", False),
        (config_of("mistral", **LLAMA, sliding_window=8), "layers", "model", True),
        (config_of("bloom"), "h", "transformer", False),
        (config_of("mpt"), "blocks", "transformer", True),
        (config_of("opt", ffn_dim=24, word_embed_proj_dim=16), "decoder.layers", "model", False),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_the_blocks_are_found_from_the_structure(config, blocks, prefix, windowed):
    base = placeholder_model(config)
    family = family_of(base)
    assert (family.blocks, family.total_blocks, family.prefixes, family.windowed) == (blocks, 4, (prefix,), windowed)
    assert len(family.blocks_of(base)) == 4
    for name in (f"{prefix}.{blocks}.3.mlp.weight", f"{blocks}.3.mlp.weight"):
        assert (family.block_index(name), family.inside(name)) == (3, "mlp.weight")
    assert (family.block_index("lm_head.weight"), family.inside("lm_head.weight")) == (None, None)


@pytest.mark.parametrize(
    "config",
    [
        AutoConfig.for_model("t5", d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=24, vocab_size=32),
        config_of("mamba"),
        AutoConfig.for_model("rwkv", hidden_size=16, num_hidden_layers=4, vocab_size=32),
        config_of("llama", **LLAMA, layer_types=["full_attention", "indexed_attention"] * 2),
        config_of("llama", **{**LLAMA, "num_hidden_layers": 0}),
    ],
    ids=["encoder and decoder", "recurrent", "its own state", "indexed attention", "no blocks"],
)
def test_a_model_that_cannot_be_split_is_refused_by_its_type(config):
    with raises(UnsupportedModel, model_type=config.model_type):
        family_of(placeholder_model(config))


def test_a_type_that_transformers_does_not_know_is_refused():
    with raises(UnsupportedModel, model_type="mine"):
        placeholder_model(type("Mine", (PretrainedConfig,), {"model_type": "mine"})())


def test_client_and_server_together_are_the_whole_model():
    """Through the server's two blocks from 1 on, and through nothing else of the model."""
    config = config_of("llama", **LLAMA)
    whole = placeholder_model(config)
    family = family_of(whole)
    full = type(whole)(config).eval()
    tensors = full.state_dict()
    span = BlockSpan(1, 3)
    part, _ = load_part(
        trimmed_class(whole, family, span),
        trimmed_config(whole),
        {
            f"layers.{index - span.start}.{family.inside(name)}": tensor
            for name, tensor in tensors.items()
            if (index := family.block_index(name)) is not None and index in span
        },
        dtype=torch.float32,
    )
    empty_the_rest(part, family)
    hidden = torch.randn(1, 5, 16)
    expected = hidden
    positions = full.rotary_emb(hidden, torch.arange(5)[None])
    for block in full.layers[1:3]:
        output = block(expected, position_embeddings=positions)
        expected = output if isinstance(output, torch.Tensor) else output[0]
    with torch.no_grad():
        torch.testing.assert_close(part.eval()(inputs_embeds=hidden).last_hidden_state, expected)
    client = without_blocks(type(whole), config, {"norm.weight": tensors["norm.weight"]}, torch.float32)
    assert isinstance(family.blocks_of(client), nn.ModuleList)
    assert len(family.blocks_of(client)) == 0
    assert not client.norm.weight.requires_grad
    assert client.embed_tokens.weight.requires_grad, "what was not loaded starts new, and is trained"


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (config_of("gpt2", n_positions=40), 40),
        (config_of("opt", ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=48), 48),
        (config_of("bloom"), None),
        (config_of("llama", **LLAMA), None),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_learned_positions_are_counted(config, positions):
    assert learned_positions(placeholder_model(config)) == positions

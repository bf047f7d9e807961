"""Sizes of a model's parts, from its config."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config

from petals_tune.blocks.sizes import model_sizes
from petals_tune.errors import UnsupportedModel
from tests.raising import raises

CONFIG = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)


def test_sizes_are_those_of_the_model() -> None:
    model = LlamaForCausalLM(CONFIG)
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    linears = 4 * 64 * 64 + 3 * 64 * 96

    sizes = model_sizes(CONFIG, ("none", "int8"), torch.float32)

    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.client_parameters == sizes.parameters - 3 * block
    assert sizes.blocks["none"] == (4 * block,) * 3
    outputs = 4 * 64 + 2 * 96 + 64
    assert sizes.blocks["int8"] == (linears + 4 * outputs + 4 * (block - linears),) * 3
    assert sizes.linear_sizes == 3 * (4 * (64 + 64) + 3 * (64 + 96))


def test_a_model_that_cannot_be_split_has_no_sizes() -> None:
    with raises(UnsupportedModel, reason="encoder"):
        model_sizes(T5Config(), ("none",), torch.float32)

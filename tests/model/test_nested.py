"""Text decoders of multimodal models: their config, their module, what is left out, and names of tensors in files."""

import pytest
import torch
from torch import nn
from transformers import Gemma3ForConditionalGeneration, Llama4ForCausalLM, LlavaForConditionalGeneration

from petals_tune.errors import UnsupportedModel
from petals_tune.model.families import family_of, load_part, placeholder_model
from petals_tune.model.nested import (
    causal_class,
    config_for,
    decoder_of,
    decoder_path,
    is_nested,
    text_class,
    text_config,
    towers,
    whole_model,
)
from tests.models import config_of
from tests.raising import raises


def test_the_text_decoder_has_a_config_of_its_own_inside():
    nested, text = config_of("gemma3"), config_of("gemma3_text")
    assert is_nested(nested)
    assert text_config(nested) is nested.text_config
    assert not is_nested(text)
    assert text_config(text) is text


@pytest.mark.parametrize(
    ("family", "model_class"),
    [
        ("gemma3", Gemma3ForConditionalGeneration),
        ("llava", LlavaForConditionalGeneration),
        ("llama4", Llama4ForCausalLM),
    ],
)
def test_the_class_is_that_of_the_auto_classes(family, model_class):
    """Llama 4's is one of the text alone: transformers makes it from the config inside."""
    config = config_of(family)
    assert causal_class(config) is model_class
    assert config_for(model_class, config) is (config.text_config if family == "llama4" else config)


def test_towers_are_left_out_and_say_so_when_text_needs_them():
    config = config_of("gemma3")
    whole = whole_model(config)
    assert decoder_path(whole) == "model.language_model"
    assert decoder_of(whole) is whole.get_submodule("model.language_model")
    assert set(towers(whole)) == {"model.vision_tower", "model.multi_modal_projector"}
    model, _ = load_part(text_class(type(whole), config), config, {}, dtype=torch.float32)
    assert not [name for name, _ in model.named_parameters() if "vision" in name or "projector" in name]
    assert isinstance(model.lm_head, nn.Linear)
    with raises(UnsupportedModel, model_type="gemma3", reason="tower"):
        model.model.vision_tower(torch.zeros(1))


def test_a_text_model_is_left_as_it_is():
    config = config_of("llama")
    model = causal_class(config)(config)
    assert text_class(type(model), config) is type(model)
    assert decoder_of(model) is model.model
    assert decoder_of(model.model) is model.model
    assert list(towers(model)) == []


@pytest.mark.parametrize(
    ("family", "name", "inside"),
    [
        ("gemma3", "language_model.model.layers.3.mlp.up_proj.weight", "mlp.up_proj.weight"),
        ("gemma3", "model.language_model.layers.3.mlp.up_proj.weight", "mlp.up_proj.weight"),
        ("qwen2_5_vl", "model.layers.3.mlp.up_proj.weight", "mlp.up_proj.weight"),
        ("qwen2_5_vl", "model.language_model.layers.3.mlp.up_proj.weight", "mlp.up_proj.weight"),
        ("llama4", "language_model.model.layers.3.self_attn.q_proj.weight", "self_attn.q_proj.weight"),
        ("step3p7", "model.layers.3.moe.gate.weight", "mlp.gate.weight"),
        ("gemma3", "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight", None),
        ("gemma3", "language_model.model.norm.weight", None),
    ],
)
def test_published_names_old_and_new_lead_to_the_block(family, name, inside):
    config = config_of(family)
    found = family_of(placeholder_model(config), config)
    assert (found.block_index(name), found.inside(name)) == (None if inside is None else 3, inside)
    assert found.is_outside(name) == (inside is None and "vision" not in name)


def test_a_config_that_transformers_makes_no_model_of_is_refused():
    config = config_of("llama", hidden_act="none that there is")
    with raises(UnsupportedModel, model_type="llama", reason="config"):
        placeholder_model(config)

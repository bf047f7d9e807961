"""A family that nobody tried is tried on a tiny model of its own; what cannot work is refused with the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PretrainedConfig,
    T5Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llama.modeling_llama import LlamaModel

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import UnsupportedModel
from petals_tune.model.families import family_of, placeholder_model
from petals_tune.remote.selftest import self_test, tiny
from tests.raising import raises


def passes(model_type: str) -> bool:
    """Whether its layers return tuples."""
    config = CONFIG_MAPPING[model_type]()
    return self_test(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "gptj"])
def test_layers_that_return_tuples_are_found(model_type):
    assert passes(model_type)


# At the sizes that their configs have by default, none of which this project was written for.
@pytest.mark.parametrize("model_type", ["persimmon", "olmo", "biogpt", "minicpm3", "seed_oss", "arcee", "nanochat"])
def test_families_that_no_line_of_ours_names_pass(model_type):
    assert not passes(model_type)


# What config.json says of published models, where it matters for making them small.
PUBLISHED: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 14336, "n_head": 112, "n_layer": 70},
    "llama": {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80},
    "mistral": {"sliding_window": None, "head_dim": 128},
    "qwen2": {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28},
    "qwen3": {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "qwen3_moe": {"hidden_size": 2048, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128},
    "gemma2": {"hidden_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 8, "query_pre_attn_scalar": 256},
    "gemma3_text": {"hidden_size": 1152, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
    "falcon": {"hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True},
    "gpt_neox": {"hidden_size": 6144, "num_attention_heads": 64, "num_hidden_layers": 44},
    "gpt2": {"n_embd": 1600, "n_head": 25, "n_layer": 48},
    "opt": {"hidden_size": 1024, "num_attention_heads": 16, "word_embed_proj_dim": 512, "do_layer_norm_before": False},
    "phi": {"hidden_size": 2560, "num_attention_heads": 32, "partial_rotary_factor": 0.4},
    "starcoder2": {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 2, "sliding_window": 4096},
    "granite": {"hidden_size": 4096, "num_key_value_heads": 8, "embedding_multiplier": 12.0, "logits_scaling": 16.0},
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_sizes_can_be_made_small(model_type):
    config = CONFIG_MAPPING[model_type](**PUBLISHED[model_type])
    self_test(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)


def test_a_tiny_model_has_all_kinds_of_blocks_and_few_parameters():
    config = Gemma3TextConfig(num_hidden_layers=26)
    small = tiny(config)
    assert set(small.layer_types) == set(config.layer_types)
    assert len(small.layer_types) == small.num_hidden_layers < 10
    assert sum(p.numel() for p in placeholder_model(small).parameters()) < 20_000_000
    assert config.num_hidden_layers == 26, "the config itself stays as it is"


def test_a_self_test_leaves_the_random_numbers_and_threads_alone():
    torch.manual_seed(3)
    wanted, threads = torch.rand(4), torch.get_num_threads()
    torch.manual_seed(3)
    assert not passes("llama")
    assert torch.equal(torch.rand(4), wanted)
    assert torch.get_num_threads() == threads


class ScalesItsInput(LlamaForCausalLM):
    """Its base model does something before the blocks that no server would leave out."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model.__class__ = type("Scaled", (LlamaModel,), {"forward": scaled})


def scaled(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **options: Any) -> Any:
    embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    return LlamaModel.forward(self, inputs_embeds=2 * embeds, **options)


def test_a_model_whose_numbers_differ_is_refused(monkeypatch):
    from petals_tune.model import families

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
    base = ScalesItsInput(LlamaConfig(**sizes)).model
    monkeypatch.setattr(families.AutoModel, "from_config", lambda config: _of(type(base), config))
    with raises(UnsupportedModel, model_type="llama", reason="differs"):
        self_test(ScalesItsInput, LlamaConfig())


class PassesOn(nn.Module):
    """A Llama block that gives the next one more than hidden states, or hidden states of another shape."""

    def __init__(self, block: nn.Module, what: str):
        super().__init__()
        self.block, self.what = block, what

    def forward(self, hidden: torch.Tensor, made: Any = None, **options: Any) -> Any:
        if self.what == "streams":
            return self.block(hidden[0] if hidden.dim() == 4 else hidden, **options)[None]
        return self.block(hidden, **options), hidden.sum()


class Passes(LlamaForCausalLM):
    what = ""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model.layers = nn.ModuleList(PassesOn(block, self.what) for block in self.model.layers)
        self.model.forward = self.loop

    def loop(self, input_ids: Any = None, **options: Any) -> Any:
        hidden, made = self.model.embed_tokens(input_ids), None
        tables = self.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for block in self.model.layers:
            output = block(hidden, made=made, position_embeddings=tables)
            hidden, made = output if isinstance(output, tuple) else (output, None)
        return BaseModelOutputWithPast(last_hidden_state=hidden[0] if hidden.dim() == 4 else hidden)


@pytest.mark.parametrize("reason", ["streams", "shared"])
def test_a_model_whose_blocks_pass_on_more_than_hidden_states_is_refused(reason):
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
    with raises(UnsupportedModel, model_type="llama", reason=reason):
        self_test(type("Passes", (Passes,), {"what": reason}), LlamaConfig(**sizes))


def _of(base_class: Any, config: PretrainedConfig) -> Any:
    model = LlamaModel(config)
    model.__class__ = base_class
    return model


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(num_layers=2), "encoder"),
        (MambaConfig(num_hidden_layers=2), "state"),
        (CONFIG_MAPPING["rwkv"](num_hidden_layers=2), "state"),
        (CONFIG_MAPPING["xlm"](n_layers=2), "blocks"),
        (CONFIG_MAPPING["gemma4_text"](), "token ids"),
        (CONFIG_MAPPING["gemma4_text"](hidden_size_per_layer_input=0, num_kv_shared_layers=6), "shared"),
    ],
    ids=["t5", "mamba", "rwkv", "xlm", "gemma4 embeddings", "gemma4 keys"],
)
def test_what_is_no_decoder_of_attention_blocks_is_refused_with_the_reason(config, reason):
    with raises(UnsupportedModel, model_type=config.model_type, reason=reason):
        family_of(placeholder_model(config))


def test_attention_in_both_directions_is_refused(tmp_path: Path):
    """Refused before a swarm is looked for: there is no initial peer here."""
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with raises(UnsupportedModel, model_type="bert"):
        AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path), initial_peers=[])

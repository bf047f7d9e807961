"""Small random models of many families, as folders; and how far two tensors are apart."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

BLOCKS = 6
VOCABULARY = 96

# Without dropout. The weights are large, so that a block that is left out or twice there is seen.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
_HEAD_DIM = {**_GROUPED, "head_dim": 8}
_OF_GPT2 = {"n_positions": 64, "initializer_range": 0.1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_OF_OPT = {"ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0, "initializer_range": 0.1}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MIXED = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2, "sliding_window": 4}
_RECURRENT = {"layer_types": ["linear_attention", "full_attention", "linear_attention"] * 2}
_DELTA_NET = {
    **_RECURRENT,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 4}

# What a family, or a variant of one, has besides: a model type of transformers, then what tells it from its siblings.
FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": {"initializer_range": 0.1},
    "llama": _GROUPED,
    "llama tied": {
        **_GROUPED,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {**_GROUPED, "sliding_window": 4},
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "qwen2": {**_GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "qwen2_moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2},
    "qwen3": _HEAD_DIM,
    "qwen3_moe": {**_HEAD_DIM, **_EXPERTS, "mlp_only_layers": [0, 3]},
    "gemma": _HEAD_DIM,
    "gemma2": {**_HEAD_DIM, **_MIXED},
    "gemma3_text": {**_HEAD_DIM, **_MIXED},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "initializer_range": 0.1},
    "falcon alibi": {"alibi": True, "multi_query": False, "initializer_range": 0.1},
    "gpt_neox": {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.1},
    "gptj": {"rotary_dim": 4, "n_positions": 64, "initializer_range": 0.1},
    "gpt2": _OF_GPT2,
    "gpt_bigcode": _OF_GPT2,
    "opt": _OF_OPT,
    "opt projected": {**_OF_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "xglm": {**_OF_OPT, "initializer_range": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0},
    "mpt": {"max_seq_len": 64, "initializer_range": 0.1},
    "phi": {**_GROUPED, "initializer_range": 0.1},
    "phi3": {**_GROUPED, "original_max_position_embeddings": 64, "sliding_window": 4},
    "olmo2": _GROUPED,
    "olmo3": {**_GROUPED, **_MIXED},
    "starcoder2": {**_GROUPED, "sliding_window": 4},
    "stablelm": {**_GROUPED, "initializer_range": 0.1},
    "granite": {
        **_GROUPED,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.2,
    },
    "cohere2": {**_GROUPED, **_MIXED},
    "smollm3": {**_GROUPED, "no_rope_layers": [1, 1, 0, 1, 0, 1]},
    "glm4": {**_HEAD_DIM, "initializer_range": 0.1},
    "gpt_oss": {**_HEAD_DIM, **_MIXED, "num_local_experts": 4, "intermediate_size": 32, "rope_scaling": None},
    "deepseek_v3": {
        **_GROUPED,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 8,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}

_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SPARSE = {"mlp_layer_types": ["dense", *["sparse"] * 5]}

# Further families, of which a test compares the numbers. The others of the suite are tried with FAMILIES.
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "glm4_moe": {**_HEAD_DIM, **_ROUTED, "first_k_dense_replace": 1, "use_qk_norm": True},
    "minimax_m2": {**_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "mistral4": {**_GROUPED, **_LATENT, **_ROUTED, "first_k_dense_replace": 1, "initializer_range": 0.1},
    "olmoe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**_GROUPED, "num_local_experts": 4, "initializer_range": 0.1},
    "flex_olmo": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.1},
    "exaone_moe": {**_HEAD_DIM, **_MIXED, **_EXPERTS, **_SPARSE, "n_group": 1, "topk_group": 1},
    "solar_open": {**_HEAD_DIM, **_ROUTED},
    "afmoe": {**_HEAD_DIM, **_MIXED, **_EXPERTS, "num_dense_layers": 1},
    "granitemoeshared": {**_GROUPED, "num_local_experts": 4, "shared_intermediate_size": 16},
    "glm4_moe_lite": {**_GROUPED, **_LATENT, **_ROUTED, **_SPARSE},
    "deepseek_v2": {**_GROUPED, **_LATENT, **_ROUTED, "topk_method": "greedy", "first_k_dense_replace": 1},
    "dots1": {**_HEAD_DIM, **_ROUTED, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "ernie4_5": _HEAD_DIM,
    "ernie4_5_moe": {**_GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "phimoe": {**_GROUPED, "num_local_experts": 4, "attention_bias": True},
    "hunyuan_v1_dense": _HEAD_DIM,
    "hunyuan_v1_moe": {**_HEAD_DIM, "num_experts": 4, "moe_topk": 2},
    "cohere": _GROUPED,
    "cohere2_moe": {**_HEAD_DIM, **_MIXED, **_EXPERTS},
    "olmo": _GROUPED,
    "seed_oss": _HEAD_DIM,
    "exaone4": {**_HEAD_DIM, **_MIXED},
    "helium": _HEAD_DIM,
    "glm": _HEAD_DIM,
    "arcee": _GROUPED,
    "apertus": _GROUPED,
    "nemotron": {
        **_HEAD_DIM,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "persimmon": _GROUPED,
    "minicpm3": {**_GROUPED, **_LATENT, "scale_emb": 3.0},
    "nanochat": _GROUPED,
    "biogpt": {
        **_GROUPED,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layerdrop": 0.0,
        "activation_dropout": 0.0,
    },
    "gpt_neo": {
        "attention_types": [[["global", "local"], 3]],
        "num_layers": BLOCKS,
        "max_position_embeddings": 64,
        "window_size": 4,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "ministral": {**_HEAD_DIM, **_MIXED},
    "ministral3": _HEAD_DIM,
    "vaultgemma": {**_HEAD_DIM, **_MIXED},
    "bitnet": _GROUPED,
    "cwm": {**_HEAD_DIM, **_MIXED},
    "gemma4_text": {
        **_HEAD_DIM,
        **_MIXED,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "global_head_dim": 16,
    },
    "llama4_text": {
        **_HEAD_DIM,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 4,
    },
}

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_OF_QWEN_VL = {**_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_OF_GLM_VL = {**_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 32}

# Multimodal models, whose text decoder's config is inside: sizes of that, and of a vision tower that nothing runs.
NESTED: dict[str, dict[str, Any]] = {
    "qwen3_vl": {
        "text_config": {**_HEAD_DIM, **_MROPE},
        "vision_config": {**_OF_QWEN_VL, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
    },
    "gemma3": {"text_config": {**_HEAD_DIM, **_MIXED}, "vision_config": _VISION},
    "mistral3": {
        "text_config": {"model_type": "mistral", **_HEAD_DIM},
        "vision_config": {"model_type": "pixtral", **_VISION},
        "image_token_index": VOCABULARY,
    },
    "llava": {
        "text_config": {"model_type": "llama", **_GROUPED},
        "vision_config": {"model_type": "clip_vision_model", **_VISION},
    },
    "qwen2_5_vl": {"text_config": {**_GROUPED, **_MROPE}, "vision_config": _OF_QWEN_VL},
    "qwen2_vl": {
        "text_config": {**_GROUPED, **_MROPE},
        "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32},
    },
    "qwen3_vl_moe": {
        "text_config": {**_HEAD_DIM, **_EXPERTS, **_MROPE},
        "vision_config": {**_OF_QWEN_VL, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
    },
    "kimi_k25": {
        "text_config": {"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]},
        "vision_config": _VISION,
    },
    "llama4": {
        "text_config": MORE_FAMILIES["llama4_text"],
        "vision_config": {**_VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "gemma4": {"text_config": MORE_FAMILIES["gemma4_text"], "vision_config": {**_VISION, "head_dim": 8}},
    "minimax_m3_vl": {
        "text_config": {
            **_HEAD_DIM,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rotary_dim": 8,
            "dense_intermediate_size": 48,
        },
        "vision_config": {**_VISION},
    },
    "glm4v": {"text_config": {**_GROUPED, "head_dim": 8, **_MROPE}, "vision_config": _OF_GLM_VL},
    "step3p7": {
        "text_config": {
            **_HEAD_DIM,
            **_MIXED,
            **_SPARSE,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "share_expert_dim": 16,
        },
        "vision_config": _VISION,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **_GROUPED},
        "vision_config": {**_VISION, "image_size": [8, 8], "patch_size": [4, 4]},
    },
    "cohere2_vision": {"text_config": {"model_type": "cohere2", **_GROUPED, **_MIXED}, "vision_config": _VISION},
}


# Families whose blocks keep states.
STATE_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **_HEAD_DIM,
        "initializer_range": 0.05,  # at 0.1 half a bit of the embeddings is 1e-5 of the plain logits, with a LoRA
        **_DELTA_NET,
        **_EXPERTS,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
    "qwen3_5_text": {**_HEAD_DIM, **_DELTA_NET},
    "qwen3_5_moe_text": {
        **_HEAD_DIM,
        "initializer_range": 0.05,  # as of qwen3_next
        **_DELTA_NET,
        **_EXPERTS,
        "shared_expert_intermediate_size": 16,
    },
    "kimi_linear": {
        **_GROUPED,
        **_EXPERTS,
        **_RECURRENT,
        "num_key_value_heads": 4,
        "linear_head_dim": 8,
        "linear_num_heads": 2,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    # Not linear attention first: then the library's own cache counts no positions, and its masks of padding are wrong.
    "minimax": {
        **_HEAD_DIM,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"] * 2,
        "num_local_experts": 4,
        "block_size": 4,
    },
    "nemotron_h": {
        **_HEAD_DIM,
        "num_hidden_layers": None,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "mlp", "full_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "granitemoehybrid": {
        **_GROUPED,
        **_RECURRENT,
        **_MAMBA2,
        "num_local_experts": 4,
        "shared_intermediate_size": 16,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.2,
    },
    "jamba": {
        **_GROUPED,
        "num_experts": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "bamba": {**_GROUPED, **_MAMBA2, "attn_layer_indices": [1, 4]},
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention", "conv"] * 2, "block_auto_adjust_ff_dim": False},
    "lfm3": {
        **_HEAD_DIM,
        "layer_types": ["conv", "sliding_attention", "conv", "full_attention", "conv", "sliding_attention"],
        "sliding_window": 4,
        "conv_L_cache": 3,
    },
    "falcon_h1": {**_HEAD_DIM, **_MAMBA2, "mamba_d_ssm": 64},
    "olmo_hybrid": {**_GROUPED, **_DELTA_NET, "num_key_value_heads": 4},
}


_ROPE = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 8,
    },
}
# What Llama's config has for a rope type; frequencies that depend on the length change beyond 8 positions.
ROPE_TYPES: dict[str, dict[str, Any]] = {
    kind: {
        "max_position_embeddings": 8 if kind == "dynamic" else 32,
        "rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields},
    }
    for kind, fields in _ROPE.items()
}
# Of Phi-3, which computes a text anew where it grows beyond 8 positions.
PHI3_LONGROPE = {**ROPE_TYPES["longrope"], "original_max_position_embeddings": 8, "sliding_window": None}


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    """The config of a small model of one of these families, with other values where `changes` has some."""
    kind = CONFIG_MAPPING[family.split()[0]]
    if family in NESTED:
        fields = NESTED[family]
        return kind(**{**fields, "text_config": {**_SIZES, **fields["text_config"], **changes}})
    return kind(**{**_SIZES, **{**FAMILIES, **MORE_FAMILIES, **STATE_FAMILIES}[family], **changes})


def save_model(folder: Path, family: str, *, max_shard_size: str = "1GB", **changes: Any) -> Path:
    """The same weights for the same arguments."""
    torch.manual_seed(0)
    config = config_of(family, **changes)
    whole = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model = (AutoModelForImageTextToText if whole else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # the library starts them at zero, where nobody would miss them
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def plain_model(folder: Path) -> PreTrainedModel:
    """The whole model in this process, frozen; of a multimodal checkpoint as its users load it."""
    known = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModelForCausalLM if known else AutoModelForImageTextToText
    return auto.from_pretrained(folder).requires_grad_(False).eval()


def relative_error(left: torch.Tensor, right: torch.Tensor) -> float:
    """max|a-b| / max|b|, as everywhere in this project."""
    assert left.shape == right.shape
    return ((left - right).abs().max() / right.abs().max()).item()


def masks(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Attention masks (B, S) without padding, and with different amounts of it on either side."""
    full = torch.ones(rows, length, dtype=torch.int64)
    amounts = (torch.arange(rows) * 2) % (length - 1)
    left = (torch.arange(length)[None] >= amounts[:, None]).long()
    return {"none": full, "left": left, "right": left.flip(1)}

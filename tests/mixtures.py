"""Small random mixtures of experts of many families, in which experts weigh most."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

EXPERTS = 8

# The names that families have for the same sizes; a config keeps those that it does not know, and makes no use of them.
_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "first_k_dense_replace": 0,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "n_routed_experts": EXPERTS,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}
_FULL = {"layer_types": ["full_attention"] * 2}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 128},
    "qwen3_moe": {},
    "deepseek_v2": {**_LATENT, "head_dim": 16},
    "deepseek_v3": {**_LATENT, "head_dim": 16},
    "glm4_moe": {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1},
    "glm4_moe_lite": {**_LATENT, "head_dim": 16, "mlp_layer_types": ["sparse"] * 2},
    "minimax_m2": {"rotary_dim": 16},
    "gpt_oss": {**_FULL, "rope_scaling": None},
    "mistral4": _LATENT,
    "olmoe": {"num_key_value_heads": 4},
    "granitemoe": {},
    "granitemoeshared": {"shared_intermediate_size": 128},
    "flex_olmo": {"num_key_value_heads": 4},
    "exaone_moe": {**_FULL, "mlp_layer_types": ["sparse"] * 2, "n_group": 1, "topk_group": 1},
    "solar_open": {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1},
    "afmoe": {**_FULL, "num_dense_layers": 0, "global_attn_every_n_layers": 1, "n_group": 1, "topk_group": 1},
    "phimoe": {},
    "dots1": {**_FULL, "n_shared_experts": 1, "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_layer_start_index": 0,
        "moe_layer_interval": 1,
        "moe_num_shared_experts": 1,
    },
    "hunyuan_v1_moe": {"moe_topk": 2},
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 32, "num_attention_heads": 4},
    "llama4_text": {"intermediate_size_mlp": 128, "moe_layers": [0, 1], "interleave_moe_layer_step": 1, **_FULL},
    "dbrx": {
        "d_model": 128,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 128, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
}


def save_mixture(folder: Path, family: str, **changes: Any) -> Path:
    """Save a model of one of MIXTURES, or of a dense family of the same sizes; no bias is zero.

    The weights are the same for the same arguments.
    """
    torch.manual_seed(0)
    model = AutoModel.from_config(mixture_config(family, **changes))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() >= 2:
                tensor.normal_(std=0.1)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("bias"):
                tensor.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def mixture_config(family: str, **changes: Any) -> PretrainedConfig:
    return CONFIG_MAPPING[family](**{**_SIZES, **MIXTURES.get(family, {}), **changes})

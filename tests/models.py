"""Small random models of several families, as folders; and how far two tensors are apart."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

BLOCKS = 6
VOCABULARY = 96


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    """Without dropout. The weights are large, so that a block that is left out or twice there is seen."""
    match family:
        case "bloom":
            sizes = {"hidden_size": 32, "n_layer": BLOCKS, "n_head": 4, "initializer_range": 0.1}
            return BloomConfig(**{"vocab_size": VOCABULARY, **sizes, **changes})
        case "llama":
            sizes = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2}
            more = {"intermediate_size": 48, "initializer_range": 0.2, "max_position_embeddings": 64}
            return LlamaConfig(**{"vocab_size": VOCABULARY, **sizes, **more, **changes})
        case "gpt2":
            sizes = {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
            dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            ends = {"bos_token_id": 0, "eos_token_id": 0}
            return GPT2Config(**{"vocab_size": VOCABULARY, **sizes, **dropout, **ends, **changes})
    raise ValueError(family)


def save_model(folder: Path, family: str, *, max_shard_size: str = "1GB", **changes: Any) -> Path:
    """The same weights for the same arguments."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # the library starts them at zero, where nobody would miss them
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def plain_model(folder: Path) -> PreTrainedModel:
    """The whole model in this process, frozen."""
    return AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()


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

"""Which matrices of a model Tinker's LoRA trains: of attention, of MLPs with their experts, and of the unembedding."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from petals_tune.adapters.base import expert_parameters
from petals_tune.errors import ConfigError
from petals_tune.service.tinker.records import LoRA

ALPHA = 32  # of LoRA, which is scaled by ALPHA / rank. Source: Schulman et al. 2025, "LoRA Without Regret"

# Parts of the paths inside a block, as the families of transformers have them.
_ATTENTION = {"self_attn", "self_attention", "attention", "attn", "linear_attn"}
_STATE_SPACE = {"mamba", "conv"}
_ROUTERS = {"router", "gate", "shared_expert_gate"}
_MLP_OF_MIXER = {"up_proj", "down_proj", "shared_experts", "experts"}  # nemotron_h: every layer is a `mixer`


def lora_config(model: Any, lora: LoRA) -> LoraConfig:
    """Return PEFT's config for what `lora` trains of a model with remote blocks.

    `train_attn`: all projections of attention, linear attention included; `train_mlp`: all matrices of MLPs, those of
    routed and shared experts included, each expert with matrices of its own; `train_unembed`: the head. Routers and
    state-space layers stay as they are. Raises ConfigError where nothing would be trained.
    """
    linears, experts = set(), set()
    for block in model.remote_blocks.children():
        for path, module in block.named_modules():
            kind = _kind(path)
            if not ((kind == "attention" and lora.train_attn) or (kind == "mlp" and lora.train_mlp)):
                continue
            if isinstance(module, nn.Linear | Conv1D):
                linears.add(path)
            experts |= {f"{path}.{parameter.name}" for parameter in expert_parameters(module)}
    head = model.get_output_embeddings()
    if lora.train_unembed and head is not None:
        linears |= {name for name, module in model.named_modules() if module is head}
    if not linears and not experts:
        raise ConfigError(
            "nothing of this model would be trained: set train_attn, train_mlp or train_unembed", key="lora_config"
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=ALPHA,
        target_modules=sorted(linears),
        target_parameters=sorted(experts) or None,
    )


def _kind(path: str) -> str | None:
    """What a module at `path` inside a block belongs to: "attention", "mlp", or neither."""
    parts = set(path.split("."))
    if parts & _ATTENTION:
        return "attention"
    if parts & (_STATE_SPACE | _ROUTERS):
        return None
    if "mixer" in parts and not parts & _MLP_OF_MIXER:
        # Its projections of attention; a state-space layer's are in_proj and out_proj.
        return "attention" if parts & {"q_proj", "k_proj", "v_proj", "o_proj"} else None
    return "mlp"

"""How large a model's parts are, from its config alone: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from petals_tune.adapters.base import linear_features
from petals_tune.blocks.memory import block_bytes
from petals_tune.blocks.quantization import find_scheme
from petals_tune.model.families import family_of, placeholder_model


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A model's parts in bytes and parameters."""

    hidden_size: int
    parameters: int  # of the whole model, its head included
    blocks: Mapping[str, tuple[int, ...]]  # quantization -> bytes of each block
    client_parameters: int  # embeddings, final norm and head
    linear_sizes: int  # inputs + outputs, summed over the linears of all blocks: times r, the parameters of a LoRA

    @property
    def total_blocks(self) -> int:
        return len(next(iter(self.blocks.values())))


def model_sizes(config: PretrainedConfig, quantizations: tuple[str, ...], dtype: torch.dtype) -> ModelSizes:
    """The sizes of `config`'s model; what a scheme does not quantize is in `dtype`. Raises UnsupportedModel."""
    base = placeholder_model(config)
    family = family_of(base)
    blocks = family.blocks_of(base)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    parameters = _parameters(whole)
    return ModelSizes(
        hidden_size=base.config.hidden_size,
        parameters=parameters,
        blocks={
            name: tuple(block_bytes(block, quantization=find_scheme(name), dtype=dtype) for block in blocks)
            for name in quantizations
        },
        client_parameters=parameters - _parameters(blocks),
        linear_sizes=sum(sum(features) for module in blocks.modules() if (features := linear_features(module))),
    )


def _parameters(module: nn.Module) -> int:
    """Number of parameters; a tied one counts once."""
    return sum(parameter.numel() for parameter in module.parameters())

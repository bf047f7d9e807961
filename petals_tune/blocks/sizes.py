"""How large a model's parts are, from its config alone: no weight is read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from petals_tune.adapters.base import linear_features
from petals_tune.blocks.memory import block_bytes, loading_bytes
from petals_tune.blocks.quantization import find_scheme
from petals_tune.errors import UnsupportedModel
from petals_tune.model.families import family_of, placeholder_model
from petals_tune.model.nested import causal_class, config_for, text_class


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A model's parts in bytes and parameters."""

    hidden_size: int
    parameters: int  # of the whole model, its head included
    blocks: Mapping[str, tuple[int, ...]]  # quantization -> bytes of each block
    loading_bytes: int  # beside the blocks, while a server reads one
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
    model_class = causal_class(config)
    if model_class is None:
        raise UnsupportedModel(
            f"transformers has no causal language model of model_type={config.model_type!r}",
            model_type=config.model_type,
            reason="no class",
        )
    with torch.device("meta"):
        whole = text_class(model_class, config)(copy.deepcopy(config_for(model_class, config)))
    parameters = _parameters(whole)
    return ModelSizes(
        hidden_size=base.config.hidden_size,
        parameters=parameters,
        blocks={
            name: tuple(block_bytes(block, quantization=find_scheme(name), dtype=dtype) for block in blocks)
            for name in quantizations
        },
        loading_bytes=max(loading_bytes(block, dtype) for block in blocks),
        client_parameters=parameters - _parameters(blocks),
        linear_sizes=sum(sum(features) for module in blocks.modules() if (features := linear_features(module))),
    )


def _parameters(module: nn.Module) -> int:
    """Number of parameters; a tied one counts once."""
    return sum(parameter.numel() for parameter in module.parameters())

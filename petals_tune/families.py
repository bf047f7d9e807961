"""Where the blocks of a model are, and what belongs to its entry. What can be found from the structure is found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from petals_tune.errors import UnsupportedModel

# Models whose loop takes `outputs[0]` of a layer. A bare (B, S, H) tensor would be cut to its first row without a word.
_TUPLE_LAYERS = frozenset({"bloom", "falcon"})

# Position embeddings that the base model adds to the token embeddings by itself, also to `inputs_embeds`.
_POSITION_EMBEDDINGS = {"gpt2": "wpe"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to take a model of one architecture apart."""

    blocks: str  # path of the block list inside the base model, such as "layers"
    total_blocks: int
    prefix: str  # of the base model inside a model with a head, such as "model"
    returns_tuple: bool  # a layer returns (hidden, ...) instead of hidden
    position_embeddings: str | None  # child of the base model that has to stay with the client

    def block_index(self, tensor_name: str) -> int | None:
        """The block that a tensor of a checkpoint belongs to; None for those outside the blocks."""
        name = tensor_name.removeprefix(f"{self.prefix}.").removeprefix(f"{self.blocks}.")
        if name in (tensor_name, tensor_name.removeprefix(f"{self.prefix}.")):
            return None
        return int(name.split(".", 1)[0])


def hollow_base_model(config: PretrainedConfig) -> PreTrainedModel:
    """The base model of `config` on the meta device: all its modules, none of its memory."""
    try:
        with torch.device("meta"):
            return AutoModel.from_config(config)
    except ValueError as error:
        raise UnsupportedModel(f"transformers knows no model for model_type={config.model_type!r}: {error}") from None


def family_of(base: PreTrainedModel) -> Family:
    """Find the block list of a base model. Raises UnsupportedModel where there is not exactly one.

    The list is the one whose length is the number of blocks that the config states.
    """
    config = base.config
    total: int = getattr(config, "num_hidden_layers", 0)
    lists = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total and name.count(".") == 0
    ]
    if getattr(config, "is_encoder_decoder", False) or len(lists) != 1:
        raise UnsupportedModel(
            f"model_type={config.model_type!r} has {len(lists)} lists of {total} blocks; "
            "a decoder with exactly one can be split, such as BLOOM, Llama, Mistral or Qwen"
        )
    return Family(
        blocks=lists[0],
        total_blocks=total,
        prefix=base.base_model_prefix,
        returns_tuple=config.model_type in _TUPLE_LAYERS,
        position_embeddings=_POSITION_EMBEDDINGS.get(config.model_type),
    )

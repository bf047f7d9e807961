"""How to take a model of any decoder family apart: what a client keeps, and what a server of blocks a:b builds.

There is no table of families: what differs between them is found from the structure of the model itself. What could
not be found right is seen by the self-test (`remote/selftest.py`), before anything is trained.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from petals_tune.errors import UnsupportedModel
from petals_tune.wire.span import BlockSpan

# Kinds of blocks, as configs name them, whose cache is keys and values.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

# Widths of attention that looks back a fixed number of positions.
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")

# What base models do to `inputs_embeds` by a number of their config: the client has done it already.
_ENTRY_FACTORS = ("embedding_multiplier",)


# Who in the library says what is missing from a model, and which of its plans find nothing to do.
_REPORTS = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the blocks of one architecture are. The owner is the module whose forward loops over them."""

    blocks: str  # path of the block list inside the base model, such as "layers" or "decoder.layers"
    total_blocks: int
    prefix: str  # of the base model inside a model with a head, such as "model"
    windowed: bool  # some block looks back a fixed number of positions only

    def owner(self, base: nn.Module) -> Any:
        return base.get_submodule(self.blocks.rpartition(".")[0])

    def blocks_of(self, base: nn.Module) -> nn.ModuleList:
        return base.get_submodule(self.blocks)  # type: ignore[return-value]  # the table says so

    def put_blocks(self, base: nn.Module, blocks: nn.ModuleList) -> None:
        setattr(self.owner(base), self.blocks.rpartition(".")[2], blocks)

    def block_index(self, tensor_name: str) -> int | None:
        """The block that a tensor of a checkpoint belongs to; None for those outside the blocks."""
        path = self._path(tensor_name)
        return None if path is None else int(path.split(".", 1)[0])

    def inside(self, tensor_name: str) -> str | None:
        """The name of a tensor inside its block, such as "mlp.weight"; None for those outside the blocks."""
        path = self._path(tensor_name)
        return None if path is None else path.split(".", 1)[1]

    def _path(self, tensor_name: str) -> str | None:
        """Inside the block list, such as "3.mlp.weight". Checkpoints have names with and without the prefix."""
        name = tensor_name.removeprefix(f"{self.prefix}.")
        path = name.removeprefix(f"{self.blocks}.")
        return None if path == name else path


def placeholder_model(config: PretrainedConfig) -> PreTrainedModel:
    """The base model of `config` on the meta device: all its modules, none of its memory."""
    try:
        with torch.device("meta"):
            return AutoModel.from_config(copy.deepcopy(config))  # the library writes into it
    except ValueError as error:
        raise UnsupportedModel(f"transformers knows no model for model_type={config.model_type!r}: {error}") from None


def family_of(base: PreTrainedModel) -> Family:
    """Find the block list of a base model: the one list as long as the number of blocks that the config states.

    Raises UnsupportedModel, with the reason, for what is no decoder of blocks that can be run one by one.
    """
    config = base.config
    what = f"model_type={config.model_type!r}"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{what} is an encoder and a decoder; decoders alone can be split, such as BLOOM or Llama"
        )
    kinds = set(getattr(config, "layer_types", None) or [])
    if getattr(base, "_is_stateful", False) or not kinds <= _ATTENTION:
        raise UnsupportedModel(
            f"{what} has blocks with a state of their own ({', '.join(sorted(kinds - _ATTENTION)) or 'recurrent'}); "
            "servers keep the keys and values of attention alone"
        )
    total: int = getattr(config, "num_hidden_layers", 0)
    lists = [
        name for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total > 0
    ]
    lists = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(lists) != 1:
        raise UnsupportedModel(
            f"{what} has {len(lists)} lists of {total} blocks; "
            "a decoder with exactly one can be split, such as BLOOM, Llama, Mistral or Qwen"
        )
    return Family(
        blocks=lists[0],
        total_blocks=total,
        prefix=base.base_model_prefix,
        windowed=any(getattr(config, name, None) for name in _WINDOWS),
    )


def load_part(
    model_class: Any, config: PretrainedConfig, tensors: Mapping[str, Any], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """`model_class.from_pretrained` of tensors, in memory or to be read by `[...]`: (model, what was missing).

    The library would report all that a part lacks.
    """
    reports = [logging.getLogger(name) for name in _REPORTS]
    levels = [logger.level for logger in reports]
    for logger in reports:
        logger.setLevel(logging.ERROR)
    try:
        return model_class.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True, **options)
    finally:
        for logger, level in zip(reports, levels, strict=True):
            logger.setLevel(level)


def without_blocks(
    model_class: type[PreTrainedModel], config: PretrainedConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """The client's part, loaded by the library as a model of no blocks: rotary tables are real, heads stay tied.

    What `tensors` hold is frozen; what they lack, such as a new classification head, starts at random, trainable.
    """
    zero = copy.deepcopy(config)
    zero.num_hidden_layers = 0
    if hasattr(zero, "layerdrop"):
        zero.layerdrop = 0.0  # servers drop single blocks; here all of them are one
    model, loading = load_part(model_class, zero, tensors, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in loading["missing_keys"])
    return model.eval()


def trimmed_config(placeholder: PreTrainedModel) -> PretrainedConfig:
    """For `trimmed_class`: the config of `placeholder` without a vocabulary, and no caches of the library's own."""
    trimmed = copy.deepcopy(placeholder.config)  # with what its blocks wrote into it
    trimmed.vocab_size = 1
    trimmed.pad_token_id = None
    trimmed.use_cache = False
    for name in _ENTRY_FACTORS:
        if hasattr(trimmed, name):
            setattr(trimmed, name, 1.0)
    return trimmed


def trimmed_class(placeholder: PreTrainedModel, family: Family, span: BlockSpan) -> type[PreTrainedModel]:
    """The class of `placeholder` with its blocks `span` alone, listed from 0; to be loaded with a `trimmed_config`.

    The blocks are copied from `placeholder`: in some families a block's structure depends on its number (experts or
    not, sliding or full attention), and in one on the number of blocks.
    """
    model_class: Any = type(placeholder)

    class Trimmed(model_class):
        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
            config.num_hidden_layers = 0
            super().__init__(config, *args, **kwargs)
            config.num_hidden_layers = len(span)
            if getattr(config, "layer_types", None) is not None:
                config.layer_types = list(config.layer_types[span.start : span.stop])  # read as the loop goes
            blocks = list(family.blocks_of(placeholder))[span.start : span.stop]
            kept = copy.deepcopy(nn.ModuleList(blocks), {id(placeholder.config): config})
            for parameter in kept.parameters():
                if parameter.is_floating_point():  # the library sets the default while it loads
                    parameter.data = parameter.data.to(torch.get_default_dtype())
            family.put_blocks(self, kept)

    # By these the library finds how a checkpoint's experts are fused.
    Trimmed.__name__, Trimmed.__module__ = model_class.__name__, model_class.__module__
    return Trimmed


class _Nothing(nn.Module):
    """Stands where position embeddings were: the client has added them."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(())


def empty_the_rest(model: PreTrainedModel, family: Family) -> None:
    """What the base model does before and after its blocks belongs to the client: make it do nothing here.

    Rotary tables stay: they are computed from positions. Token embeddings stay unused, with one row.
    """
    owner = family.owner(model)
    blocks, tokens = family.blocks_of(model), model.get_input_embeddings()
    for name, child in owner.named_children():
        kinds = [type(module).__name__ for module in child.modules()]
        if child is blocks or child is tokens or any("Rotary" in kind for kind in kinds):
            continue
        adds_positions = isinstance(child, nn.Embedding) or "Position" in kinds[0]
        setattr(owner, name, _Nothing() if adds_positions else nn.Identity())

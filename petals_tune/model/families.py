"""Splitting of decoder models of any family: what a client loads, and what a server of blocks a:b loads.

There is no table of families: what differs between them is derived from the structure of the model. Where that is
derived wrongly, the self-test (`remote/selftest.py`) fails before anything is trained.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from petals_tune.errors import UnsupportedModel
from petals_tune.model.block_lists import STATES, kinds_of_blocks, restore_class, set_blocks
from petals_tune.model.nested import decoder_of, decoder_path, is_nested, text_class, text_config, towers, whole_model
from petals_tune.wire.span import BlockSpan

# The values of `layer_types` of blocks whose caches servers keep: keys and values, a state beside them or in their
# place, or nothing.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_NO_CACHE = {"moe", "mlp"}

# Config keys of attention to a fixed number of positions back.
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")

# Config keys of factors on `inputs_embeds`: the client applies them, and servers must not.
_ENTRY_FACTORS = ("embedding_multiplier",)

# Loggers of transformers that warn about missing weights and unused plans.
_REPORTS = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")


# What a model's code raises on a config that it does not expect, and on a package that it needs and does not find.
CONFIG_ERRORS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the blocks of one architecture are, in its modules and in the names of its tensors."""

    blocks: str  # path of the block list inside the text decoder, such as "layers" or "decoder.layers"
    total_blocks: int
    prefixes: tuple[str, ...]  # paths of the text decoder inside models with more, such as "model"
    windowed: bool  # some block counts back from the end of the longest row: a window of positions, or MPT's ALiBi
    renamings: tuple[WeightRenaming, ...] = ()  # from names in published files to those of the library's own modules
    conversions: str | None = None  # the name that transformers knows the other conversions of these files by
    towers: tuple[str, ...] = ()  # paths in the whole model of what text alone does not need

    def owner(self, base: nn.Module) -> Any:
        """Return the module whose forward loops over the blocks."""
        return base.get_submodule(self.blocks.rpartition(".")[0])

    def blocks_of(self, base: nn.Module) -> nn.ModuleList:
        return base.get_submodule(self.blocks)  # type: ignore[return-value]  # `family_of` found a ModuleList there

    def put_blocks(self, base: nn.Module, blocks: nn.ModuleList) -> None:
        setattr(self.owner(base), self.blocks.rpartition(".")[2], blocks)

    def block_index(self, tensor_name: str) -> int | None:
        """Return the number of the block that a tensor of a checkpoint belongs to; None outside the blocks.

        Behind the last one come blocks that predict further tokens, in some checkpoints; nothing runs them.
        """
        path = self._path(tensor_name)
        return None if path is None else int(path.split(".", 1)[0])

    def inside(self, tensor_name: str) -> str | None:
        """Return the name of a tensor inside its block, such as "mlp.weight"; None outside the blocks."""
        path = self._path(tensor_name)
        return None if path is None else path.split(".", 1)[1]

    def is_outside(self, tensor_name: str) -> bool:
        """Does the client need this tensor: an embedding, the final norm, the head?"""
        name = self._renamed(tensor_name)
        return self._path(tensor_name) is None and not name.startswith(self.towers)

    def _path(self, tensor_name: str) -> str | None:
        """Return the path inside the block list, such as "3.mlp.weight". Checkpoints may omit the prefix."""
        name = self._renamed(tensor_name)
        for prefix in (*self.prefixes, ""):
            start = f"{prefix}.{self.blocks}.".removeprefix(".")
            if name.startswith(start):
                return name.removeprefix(start)
        return None

    def _renamed(self, name: str) -> str:
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        return name


def placeholder_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the text decoder of `config` on the meta device: all its modules with placeholder weights, no memory."""
    config = copy.deepcopy(config)  # transformers writes into it
    with _explained(config):
        text = text_config(config)
        if is_nested(config) and MODEL_MAPPING.get(type(text), None) is None:
            return decoder_of(whole_model(config))
        with torch.device("meta"):
            return AutoModel.from_config(text)


@contextmanager
def _explained(config: PretrainedConfig) -> Iterator[None]:
    """Raise UnsupportedModel for what transformers raises on a config that it makes no model of."""
    try:
        yield
    except CONFIG_ERRORS as error:
        if isinstance(error, UnsupportedModel):
            raise
        what = " ".join(str(error).split())[:300]
        raise UnsupportedModel(
            f"transformers makes no model of model_type={config.model_type!r}: {type(error).__name__}: {what}",
            model_type=config.model_type,
            reason="config",
        ) from None


def learned_positions(base: PreTrainedModel) -> int | None:
    """Return the number of positions in a base model's table of learned position embeddings; None without one."""
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)  # OPT's table begins with two unused rows
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name or name.rpartition(".")[2] == "wpe")
    ]
    return min(tables, default=None)


def family_of(base: PreTrainedModel, config: PretrainedConfig | None = None) -> Family:
    """Find the block list of a text decoder: the only list whose length is `num_hidden_layers`.

    config: of the whole checkpoint, whose names of tensors are those of a multimodal model where it is one's

    Raises UnsupportedModel for a model that is no decoder of blocks which can be run one by one.
    """
    own = base.config
    what = f"model_type={own.model_type!r}"
    if getattr(own, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{what} is an encoder and a decoder; decoders alone can be split, such as BLOOM or Llama",
            model_type=own.model_type,
            reason="encoder",
        )
    if what_crosses := _crossings(own):
        reason, text = what_crosses
        raise UnsupportedModel(f"{what}: {text}", model_type=own.model_type, reason=reason)
    kinds = set(kinds_of_blocks(own) or [])
    unknown = sorted(kinds - _ATTENTION - STATES - _NO_CACHE)
    has_states = bool(kinds & STATES)
    # Models of recurrent blocks alone (Mamba, xLSTM) take a cache of another kind; RWKV's says nothing of its blocks.
    takes_cache = "past_key_values" in inspect.signature(base.forward).parameters
    if unknown or (getattr(base, "_is_stateful", False) and not has_states) or (has_states and not takes_cache):
        raise UnsupportedModel(
            f"{what} has blocks with a state of a kind ({', '.join(unknown) or 'recurrent'}) that servers cannot keep "
            "for each client; those of linear attention, Mamba and short convolutions beside attention can be kept",
            model_type=own.model_type,
            reason="state",
        )
    total: int = getattr(own, "num_hidden_layers", 0)
    lists = [
        name for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total > 0
    ]
    lists = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(lists) != 1:
        raise UnsupportedModel(
            f"{what} has {len(lists)} lists of {total} blocks; "
            "a decoder with exactly one can be split, such as BLOOM, Llama, Mistral or Qwen",
            model_type=own.model_type,
            reason="blocks",
        )
    family = Family(
        blocks=lists[0],
        total_blocks=total,
        prefixes=(base.base_model_prefix, *_published_prefixes(base)),
        windowed=any(getattr(own, name, None) for name in _WINDOWS) or hasattr(base, "build_mpt_alibi_tensor"),
    )
    return family if config is None or not is_nested(config) else _inside(config, base, family)


def _crossings(config: PretrainedConfig) -> tuple[str, str] | None:
    """(reason, text) of what blocks of `config` need beside hidden states, by what it says; None: nothing.

    What a config does not say is found by the self-test, which watches what blocks are given.
    """
    fields = vars(config)
    if fields.get("hidden_size_per_layer_input"):
        return "token ids", (
            "each block adds an embedding of the tokens themselves (hidden_size_per_layer_input), and servers are sent "
            "hidden states alone"
        )
    if fields.get("num_kv_shared_layers") or "shared" in (fields.get("indexer_types") or ()):
        return "shared", (
            "blocks reuse keys, values or indexes that earlier blocks made, and these do not travel from server to "
            "server"
        )
    return None


def _published_prefixes(base: PreTrainedModel) -> list[str]:
    """Return other names of the base model in published files, such as Nemotron-H's "backbone"."""
    own = f"{base.base_model_prefix}."
    renamings = [each for each in get_model_conversion_mapping(base, add_legacy=False) if type(each) is WeightRenaming]
    pairs = [(*each.source_patterns, *each.target_patterns) for each in renamings]
    return [pair[0].removesuffix(".") for pair in pairs if pair[1:] == (own,) and pair[0].endswith(".")]


def _inside(config: PretrainedConfig, base: PreTrainedModel, family: Family) -> Family:
    """Return `family` with the names of tensors in a multimodal checkpoint."""
    with _explained(config):
        whole = whole_model(copy.deepcopy(config))
    mapping = get_model_conversion_mapping(whole, add_legacy=False)
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    for each in converters:  # for names inside the decoder alone
        each.scope_prefix = each.base_model_prefix = None
    conversions = f"{type(base).__name__}In{type(whole).__name__}"
    register_checkpoint_conversion_mapping(conversions, list(converters), overwrite=True)
    path = decoder_path(whole)
    inside_base = path.removeprefix(f"{whole.base_model_prefix}.")
    return replace(
        family,
        prefixes=tuple(dict.fromkeys((path, inside_base))),
        renamings=tuple(each for each in mapping if isinstance(each, WeightRenaming)),
        conversions=conversions,
        towers=tuple(f"{each}." for each in towers(whole)),
    )


def load_part(
    model_class: Any, config: PretrainedConfig, tensors: Mapping[str, Any], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a model from tensors, in memory or to be read by `[...]`; return it and transformers' loading report.

    Warnings about what the tensors lack are off: a part of a model lacks most of it.
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
    """Load the client's part, as a model without blocks and towers: rotary tables are computed, heads stay tied.

    Parameters in `tensors` are frozen; others, such as a new classification head, are initialized and trainable.
    """
    zero = copy.deepcopy(config)
    text = text_config(zero)
    set_blocks(text, 0)
    if hasattr(text, "layerdrop"):
        text.layerdrop = 0.0  # servers drop single blocks; the loop here would drop all of them at once
    model, loading = load_part(text_class(model_class, config), zero, tensors, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in loading["missing_keys"])
    restore_class(text_config(model.config))
    return model.eval()


def trimmed_config(placeholder: PreTrainedModel) -> PretrainedConfig:
    """Copy the config of `placeholder` for `trimmed_class`: with no vocabulary, and no caches of transformers."""
    trimmed = copy.deepcopy(placeholder.config)  # its blocks have written into it
    trimmed.vocab_size = 1
    trimmed.pad_token_id = 0  # of a vocabulary of one; some configs allow no None
    trimmed.use_cache = False
    for name in _ENTRY_FACTORS:
        if hasattr(trimmed, name):
            setattr(trimmed, name, 1.0)
    return trimmed


def trimmed_class(placeholder: PreTrainedModel, family: Family, span: BlockSpan) -> type[PreTrainedModel]:
    """Derive a class from that of `placeholder`, with the blocks `span` alone, to be loaded with a `trimmed_config`.

    The blocks are copied from `placeholder`: in some families a block's structure depends on its number (experts or
    not, sliding or full attention), and in one on the number of blocks.
    """
    model_class: Any = type(placeholder)

    class Trimmed(model_class):
        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
            set_blocks(config, 0)
            super().__init__(config, *args, **kwargs)
            set_blocks(config, len(span))
            blocks = list(family.blocks_of(placeholder))[span.start : span.stop]
            kept = copy.deepcopy(nn.ModuleList(blocks), {id(placeholder.config): config})
            for parameter in kept.parameters():
                if parameter.is_floating_point():  # transformers sets the default while it loads
                    parameter.data = parameter.data.to(torch.get_default_dtype())
            family.put_blocks(self, kept)

    # transformers finds by these names how a checkpoint's experts are fused.
    Trimmed.__name__, Trimmed.__module__ = family.conversions or model_class.__name__, model_class.__module__
    return Trimmed


@dataclass(frozen=True)
class PerBlock:
    """Fields of a config with a value for each block, which the loop over the blocks reads by position."""

    values: dict[str, list[Any]]

    @classmethod
    def of(cls, config: PretrainedConfig, total_blocks: int) -> PerBlock:
        fields = {name: value for name, value in vars(config).items() if isinstance(value, list)}
        if (kinds := kinds_of_blocks(config)) is not None:
            fields["layer_types"] = kinds  # also where the config computes them, or has them under another name
        return cls({name: value for name, value in fields.items() if len(value) == total_blocks})

    @property
    def kinds(self) -> list[str] | None:
        """The kind of each block; None where all are of one kind."""
        return self.values.get("layer_types")

    def write(self, config: PretrainedConfig, span: BlockSpan) -> None:
        """Make `config` that of a loop over the blocks `span` alone."""
        set_blocks(config, len(span))
        for name, values in self.values.items():
            setattr(config, name, values[span.start : span.stop])


def restore_counts(owner: nn.Module, whole: nn.Module) -> None:
    """Give the module that loops over the blocks the numbers that it has in the `whole` model, with all blocks.

    Some models derive them from the number of blocks, which is 0 while parts of them are made.
    """
    for name, value in vars(whole).items():
        if type(value) is int and vars(owner).get(name) != value:
            setattr(owner, name, value)


class _Zero(nn.Module):
    """Replaces the position embedding with zeros: the client has already added it."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(())


def empty_the_rest(model: PreTrainedModel, family: Family) -> None:
    """Replace all modules before and after the blocks by ones that do nothing: the client runs them.

    Rotary tables stay, since they are computed from positions. Token embeddings stay, unused, with one row.
    """
    owner = family.owner(model)
    blocks, tokens = family.blocks_of(model), model.get_input_embeddings()
    for name, child in owner.named_children():
        kinds = [type(module).__name__ for module in child.modules()]
        if child is blocks or child is tokens or any("Rotary" in kind for kind in kinds):
            continue
        adds_positions = isinstance(child, nn.Embedding) or "Position" in kinds[0]
        setattr(owner, name, _Zero() if adds_positions else nn.Identity())

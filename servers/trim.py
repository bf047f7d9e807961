"""Blocks a:b of a checkpoint as a model of its own: the library's base model, trimmed and, if wished, quantized."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from petals_tune.checkpoint import Checkpoint
from petals_tune.errors import ConfigError
from petals_tune.families import Family, family_of, hollow_base_model
from petals_tune.wire.span import BlockSpan

QUANTIZATIONS = ("int8", "nf4", "none")


class Nothing(nn.Module):
    """Stands where position embeddings were: the client has added them."""

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=positions.device)


@dataclass(frozen=True, kw_only=True)
class TrimmedModel:
    """A base model that holds blocks `span` alone, frozen; called with `inputs_embeds`, it returns their output."""

    model: PreTrainedModel
    family: Family
    span: BlockSpan
    weight_bytes: int

    @property
    def blocks(self) -> nn.ModuleList:
        return getattr(self.model, self.family.blocks)


def load_blocks(
    checkpoint: Checkpoint, span: BlockSpan, *, quantization: str, dtype: torch.dtype, device: str = "cpu"
) -> TrimmedModel:
    """Read the tensors of blocks `span` and build the model around them.

    Raises UnsupportedModel for files that cannot be used, ConfigError for a span that the model does not have.
    """
    config = checkpoint.config
    hollow = hollow_base_model(config)
    family = family_of(hollow)
    if span.stop > family.total_blocks:
        raise ConfigError(f"blocks={span}: {checkpoint.source} has blocks 0:{family.total_blocks}")
    renamed = {}
    for name in checkpoint.tensor_names:
        block = family.block_index(name)
        if block is not None and block in span:
            inside = name.removeprefix(f"{family.prefix}.").split(".", 2)[2]
            renamed[name] = f"{family.blocks}.{block - span.start}.{inside}"
    tensors = {renamed[name]: tensor for name, tensor in checkpoint.read(renamed, dtype).items()}
    model = type(hollow).from_pretrained(
        None,
        config=trimmed_config(config, span),
        state_dict=tensors,
        dtype=dtype,
        device_map=device,
        quantization_config=_quantization_config(quantization, dtype),
    )
    del tensors
    _empty_the_rest(model, family)
    model.requires_grad_(False)
    set_training(model, training=False)
    return TrimmedModel(model=model, family=family, span=span, weight_bytes=_weight_bytes(model))


def trimmed_config(config: PretrainedConfig, span: BlockSpan) -> PretrainedConfig:
    """`config` of a model that has blocks `span` alone, and no vocabulary."""
    trimmed = copy.deepcopy(config)
    layer_types = getattr(config, "layer_types", None)
    trimmed.num_hidden_layers = len(span)
    if layer_types is not None:
        trimmed.layer_types = list(layer_types[span.start : span.stop])
    trimmed.vocab_size = 1
    trimmed.pad_token_id = None
    trimmed.use_cache = False
    return trimmed


def set_training(model: nn.Module, *, training: bool) -> None:
    """Dropout on or off. bitsandbytes' int8 linears stay in training mode always.

    In eval mode they also quantize the activations: less exact, and on a CPU a row's result depends on its batch-mates.
    """
    model.train(training)
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.train(True)


def _quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    raise ConfigError(f"quantization={quantization!r} is not one of {', '.join(QUANTIZATIONS)}")


def _empty_the_rest(model: PreTrainedModel, family: Family) -> None:
    """What the base model does before and after its blocks belongs to the client: make it do nothing here.

    Rotary tables stay: they are computed from positions. Token embeddings stay unused, with one row.
    """
    for name, child in model.named_children():
        if name == family.position_embeddings:
            setattr(model, name, Nothing())
        elif name != family.blocks and not isinstance(child, nn.Embedding) and "Rotary" not in type(child).__name__:
            setattr(model, name, nn.Identity())


def _weight_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    states = [getattr(module, "state", None) for module in model.modules()]  # int8: where the scales live
    tensors += [
        t for state in states for t in (getattr(state, "CB", None), getattr(state, "SCB", None)) if t is not None
    ]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def torch_dtype(name: str, config: PretrainedConfig, device: str) -> torch.dtype:
    """The dtype of the computation. `auto` is the checkpoint's on a GPU and float32 on a CPU.

    bfloat16 without native support was 8 to 80 times slower than float32 on a CPU.
    """
    if name == "auto":
        stored = getattr(config, "dtype", None)
        return stored if device != "cpu" and isinstance(stored, torch.dtype) else torch.float32
    if name not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"dtype={name!r} is not one of auto, float32, float16, bfloat16")
    return getattr(torch, name)

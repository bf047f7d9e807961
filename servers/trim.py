"""Blocks a:b of a checkpoint as a model of its own: the library's base model, trimmed and, if wished, quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from petals_tune.checkpoint import Checkpoint
from petals_tune.errors import ConfigError
from petals_tune.families import (
    Family,
    empty_the_rest,
    family_of,
    hollow_base_model,
    load_part,
    trimmed_class,
    trimmed_config,
)
from petals_tune.wire.span import BlockSpan

QUANTIZATIONS = ("int8", "nf4", "none")


@dataclass(frozen=True, kw_only=True)
class TrimmedModel:
    """A base model that holds blocks `span` alone, frozen; called with `inputs_embeds`, it returns their output."""

    model: PreTrainedModel
    family: Family
    span: BlockSpan
    weight_bytes: int

    @property
    def blocks(self) -> nn.ModuleList:
        return self.family.blocks_of(self.model)


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
        block, inside = family.block_index(name), family.inside(name)
        if block is not None and inside is not None and block in span:
            renamed[name] = f"{family.blocks}.{block - span.start}.{inside}"
    tensors = {renamed[name]: tensor for name, tensor in checkpoint.read(renamed, dtype).items()}
    model, _ = load_part(
        trimmed_class(hollow, family, span),
        trimmed_config(hollow),
        tensors,
        dtype=dtype,
        device_map=device,
        quantization_config=_quantization_config(quantization, dtype),
    )
    del tensors
    empty_the_rest(model, family)
    model.requires_grad_(False)
    set_training(model, training=False)
    return TrimmedModel(model=model, family=family, span=span, weight_bytes=_weight_bytes(model))


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

"""Blocks a:b of a checkpoint as a model of its own: the library's base model, trimmed and, if wished, quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from petals_tune.blocks.memory import give_back_freed_memory
from petals_tune.blocks.quantized_cache import QuantizedBlocks
from petals_tune.errors import ConfigError, UnsupportedModel
from petals_tune.model.checkpoint import Checkpoint, StoredTensor
from petals_tune.model.disk import DiskCache
from petals_tune.model.families import (
    Family,
    empty_the_rest,
    family_of,
    load_part,
    placeholder_model,
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
    checkpoint: Checkpoint,
    span: BlockSpan,
    *,
    quantization: str,
    dtype: torch.dtype,
    device: str = "cpu",
    disk: DiskCache | None = None,
    on_block: Callable[[int], None] = lambda block: None,
) -> TrimmedModel:
    """Read blocks `span` one by one, quantize each, and build the model around them.

    No more than one tensor is in memory in full, or those of one block's experts. Quantized blocks are kept in `disk`
    and taken from there. `on_block` is told each block that is there. Raises UnsupportedModel for files that cannot be
    used, ConfigError for a span that the model does not have.
    """
    parts = Parts.of(checkpoint)
    if span.stop > parts.family.total_blocks:
        raise ConfigError(f"blocks={span}: {checkpoint.source} has blocks 0:{parts.family.total_blocks}")
    kept = None
    if disk is not None and quantization != "none":
        kept = QuantizedBlocks(disk=disk, checkpoint=checkpoint, quantization=quantization, dtype=dtype)
    blocks = []
    for block in range(span.start, span.stop):
        blocks.append(_load_block(parts, block, quantization, dtype, device, kept))
        give_back_freed_memory()
        on_block(block)
    return _around(blocks, parts, span, dtype, device)


def made_up_block(checkpoint: Checkpoint, *, quantization: str, dtype: torch.dtype, device: str) -> TrimmedModel:
    """A block 0 of the right shapes and of no meaning: it computes as fast as the real one."""
    parts = Parts.of(checkpoint)
    span = BlockSpan(0, 1)
    made_up = {
        f"{parts.family.blocks}.0.{name}": _MadeUp(shape=parameter.shape, dtype=dtype)
        for name, parameter in parts.placeholder_block(0).named_parameters()
    }
    model = _built(parts, 0, made_up, quantization, dtype, device)[0]
    return _around([parts.family.blocks_of(model)[0]], parts, span, dtype, device)


@dataclass(frozen=True, kw_only=True)
class _MadeUp:
    """Stands for a `StoredTensor`: is there once it is indexed."""

    shape: torch.Size
    dtype: torch.dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        return torch.full(self.shape, 0.01, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A checkpoint taken apart: which tensors belong to which block."""

    checkpoint: Checkpoint
    placeholder: PreTrainedModel  # all modules of the base model, none of its memory
    family: Family
    names: dict[int, dict[str, str]]  # block -> name in the checkpoint -> name inside the block

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Parts:
        placeholder = placeholder_model(checkpoint.config)
        family = family_of(placeholder)
        names: dict[int, dict[str, str]] = {block: {} for block in range(family.total_blocks)}
        for name in checkpoint.tensor_names:
            block, inside = family.block_index(name), family.inside(name)
            if block is not None and inside is not None:
                names[block][name] = inside
        return cls(checkpoint=checkpoint, placeholder=placeholder, family=family, names=names)

    def placeholder_block(self, block: int) -> nn.Module:
        return self.family.blocks_of(self.placeholder)[block]


def _load_block(
    parts: Parts, block: int, quantization: str, dtype: torch.dtype, device: str, kept: QuantizedBlocks | None
) -> nn.Module:
    renamed, place = parts.names[block], f"{parts.family.blocks}.0."
    state = None if kept is None else kept.get(block, list(renamed))
    if state is not None:
        inside = {place + name: tensor for name, tensor in state.items()}
        model, _ = _built(parts, block, inside, quantization, dtype, device, is_quantized=True)
        return parts.family.blocks_of(model)[0]
    tensors = parts.checkpoint.stored(renamed, dtype)
    shapes = {name: tuple(parameter.shape) for name, parameter in parts.placeholder_block(block).named_parameters()}
    for name, tensor in tensors.items():
        wanted = shapes.get(renamed[name], tensor.shape)
        if tensor.shape != wanted:
            raise UnsupportedModel(
                f"{parts.checkpoint.source}: {parts.checkpoint.file_of(name)} does not fit config.json: {name} is "
                f"{tensor.shape} there, and should be {wanted}"
            )
    full = {place + renamed[name]: tensor for name, tensor in tensors.items()}
    model, missing = _built(parts, block, full, quantization, dtype, device)
    if missing:
        raise UnsupportedModel(
            f"{parts.checkpoint.source} lacks tensors of block {block}: {', '.join(sorted(missing)[:3])}"
            f"{', ...' if len(missing) > 3 else ''}"
        )
    made = parts.family.blocks_of(model)[0]
    if quantization != "none":
        for parameter in made.parameters():
            if parameter.is_floating_point():  # a view that would keep the whole file in memory
                parameter.data = parameter.data.clone()
    if kept is not None:
        kept.put(block, list(renamed), made.state_dict())
    return made


def _built(
    parts: Parts,
    block: int,
    state: Mapping[str, torch.Tensor | StoredTensor | _MadeUp],
    quantization: str,
    dtype: torch.dtype,
    device: str,
    *,
    is_quantized: bool = False,
) -> tuple[PreTrainedModel, list[str]]:
    """(the library's base model with `block` alone, the names of its tensors that `state` lacks)."""
    config = trimmed_config(parts.placeholder)
    how = _quantization_config(quantization, dtype)
    if is_quantized and how is not None:
        config.quantization_config, how = how.to_dict(), None  # as in a checkpoint that was saved quantized
    model, loading = load_part(
        trimmed_class(parts.placeholder, parts.family, BlockSpan(block, block + 1)),
        config,
        state,
        dtype=dtype,
        device_map=device,
        quantization_config=how,
    )
    return model, [name for name in loading["missing_keys"] if name.startswith(f"{parts.family.blocks}.")]


def _around(
    blocks: Sequence[nn.Module], parts: Parts, span: BlockSpan, dtype: torch.dtype, device: str
) -> TrimmedModel:
    """The library's base model with `blocks` for its own; they keep their numbers, which some families compute with."""
    config = trimmed_config(parts.placeholder)
    config.num_hidden_layers = 0  # made without blocks: masks, rotary tables of each layer type, the loop
    model, _ = load_part(type(parts.placeholder), config, {}, dtype=dtype, device_map=device)
    model.config.num_hidden_layers = len(span)
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = list(model.config.layer_types[span.start : span.stop])  # read as the loop goes
    for block in blocks:
        module: Any
        for module in block.modules():
            if isinstance(getattr(module, "config", None), PretrainedConfig):
                module.config = model.config
    parts.family.put_blocks(model, nn.ModuleList(blocks))
    empty_the_rest(model, parts.family)
    model.requires_grad_(False)
    set_training(model, training=False)
    return TrimmedModel(model=model, family=parts.family, span=span, weight_bytes=_weight_bytes(model))


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
    tensors: list[torch.Tensor | None] = [*model.parameters(), *model.buffers()]
    for weight in model.parameters():  # bitsandbytes keeps the scales beside the weights: int8's, nf4's
        tensors += [getattr(weight, "SCB", None), getattr(getattr(weight, "quant_state", None), "absmax", None)]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}.values())


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

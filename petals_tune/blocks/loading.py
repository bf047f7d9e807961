"""Blocks of a checkpoint in memory, quantized or not: transformers' base model with these blocks alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petals_tune.blocks.memory import give_back_freed_memory
from petals_tune.blocks.quantization import Quantization, find_scheme
from petals_tune.blocks.quantized_cache import QuantizedBlockCache
from petals_tune.errors import ConfigError, UnsupportedModel
from petals_tune.model.block_lists import kinds_of_blocks, set_blocks
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


@dataclass(frozen=True, kw_only=True)
class LoadedBlocks:
    """A base model that holds blocks `span` alone, frozen; called with `inputs_embeds`, it returns their output."""

    model: PreTrainedModel
    family: Family
    span: BlockSpan
    quantization: Quantization
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
) -> LoadedBlocks:
    """Read blocks `span` one by one, quantize each by the scheme of that name, and build the model around them.

    At most one tensor is in memory in full, or those of one block's experts. Quantized blocks are kept in `disk`, and
    read from there the next time. `on_block` is called after each block, with its number. Raises UnsupportedModel for
    files that cannot be used, ConfigError for a span that the model does not have or a scheme that cannot be used.
    """
    scheme = find_scheme(quantization)
    scheme.check_available(device)
    layout = BlockLayout.of(checkpoint)
    if span.stop > layout.family.total_blocks:
        raise ConfigError(
            f"blocks={span}: {checkpoint.source} has blocks 0:{layout.family.total_blocks}", key="blocks", seen=span
        )
    loader = _Loader(layout, scheme, dtype, device)
    cache = None
    if disk is not None and scheme.stored_config(dtype) is not None:
        cache = QuantizedBlockCache(disk=disk, checkpoint=checkpoint, quantization=scheme.name, dtype=dtype)
    blocks = []
    for block in range(span.start, span.stop):
        blocks.append(loader.load(block, cache))
        give_back_freed_memory()
        on_block(block)
    return loader.build_around(blocks, span)


def dummy_block(checkpoint: Checkpoint, *, quantization: str, dtype: torch.dtype, device: str) -> LoadedBlocks:
    """Block 0 with constants for weights: it has the shapes of the real one, and computes as fast."""
    layout = BlockLayout.of(checkpoint)
    loader = _Loader(layout, find_scheme(quantization), dtype, device)
    constants = {
        name: _Constant(shape=parameter.shape, dtype=dtype)
        for name, parameter in layout.meta_block(0).named_parameters()
    }
    block, _ = loader.build(0, constants)
    return loader.build_around([block], BlockSpan(0, 1))


@dataclass(frozen=True, kw_only=True)
class _Constant:
    """A tensor in the place of a `StoredTensor`: it takes memory once it is indexed."""

    shape: torch.Size
    dtype: torch.dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        return torch.full(self.shape, 0.01, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Which tensors of a checkpoint belong to which block."""

    checkpoint: Checkpoint
    meta_model: PreTrainedModel  # the whole base model on the meta device
    family: Family
    names: dict[int, dict[str, str]]  # block -> name in the checkpoint -> name inside the block

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> BlockLayout:
        meta_model = placeholder_model(checkpoint.config)
        family = family_of(meta_model)
        names: dict[int, dict[str, str]] = {block: {} for block in range(family.total_blocks)}
        for name in checkpoint.tensor_names:
            block, inside = family.block_index(name), family.inside(name)
            if block is not None and inside is not None:
                names[block][name] = inside
        return cls(checkpoint=checkpoint, meta_model=meta_model, family=family, names=names)

    def meta_block(self, block: int) -> nn.Module:
        return self.family.blocks_of(self.meta_model)[block]


_State = Mapping[str, torch.Tensor | StoredTensor | _Constant]  # of one block: name inside the block -> tensor


@dataclass(frozen=True)
class _Loader:
    """Builds blocks of one checkpoint, each by transformers in a base model of that block alone."""

    layout: BlockLayout
    scheme: Quantization
    dtype: torch.dtype
    device: str

    def load(self, block: int, cache: QuantizedBlockCache | None) -> nn.Module:
        renamed, checkpoint = self.layout.names[block], self.layout.checkpoint
        if cache is not None and (quantized := cache.get(block, list(renamed))) is not None:
            return self.build(block, quantized, is_quantized=True)[0]
        tensors = checkpoint.stored(renamed, self.dtype)
        shapes = {name: tuple(parameter.shape) for name, parameter in self.layout.meta_block(block).named_parameters()}
        for name, tensor in tensors.items():
            wanted = shapes.get(renamed[name], tensor.shape)
            if tensor.shape != wanted:
                raise UnsupportedModel(
                    f"{checkpoint.source}: {checkpoint.file_of(name)} does not fit config.json: {name} is "
                    f"{tensor.shape} there, and should be {wanted}",
                    key="model.source",
                    seen=name,
                )
        made, missing = self.build(block, {renamed[name]: tensor for name, tensor in tensors.items()})
        if missing:
            raise UnsupportedModel(
                f"{checkpoint.source} lacks tensors of block {block}: {', '.join(sorted(missing)[:3])}"
                f"{', ...' if len(missing) > 3 else ''}",
                key="model.source",
                seen=sorted(missing),
            )
        if self.scheme.stored_config(self.dtype) is not None:
            for parameter in made.parameters():
                if parameter.is_floating_point():  # a view that would keep the whole file in memory
                    parameter.data = parameter.data.clone()
        if cache is not None:
            cache.put(block, list(renamed), made.state_dict())
        return made

    def build(self, block: int, state: _State, *, is_quantized: bool = False) -> tuple[nn.Module, list[str]]:
        """(block number `block` with the tensors of `state`, the names of tensors that `state` lacks)."""
        family, meta_model = self.layout.family, self.layout.meta_model
        config, quantize = trimmed_config(meta_model), self.scheme.loading_config(self.dtype)
        if is_quantized and (stored := self.scheme.stored_config(self.dtype)) is not None:
            config.quantization_config, quantize = stored.to_dict(), None  # as in a checkpoint that was saved quantized
        place = f"{family.blocks}.0."
        model, loading = load_part(
            trimmed_class(meta_model, family, BlockSpan(block, block + 1)),
            config,
            {place + name: tensor for name, tensor in state.items()},
            dtype=self.dtype,
            device_map=self.device,
            quantization_config=quantize,
        )
        missing = [name.removeprefix(place) for name in loading["missing_keys"] if name.startswith(place)]
        return family.blocks_of(model)[0], missing

    def build_around(self, blocks: Sequence[nn.Module], span: BlockSpan) -> LoadedBlocks:
        """The base model with `blocks`; they keep their own numbers, which some families compute with."""
        family, meta_model = self.layout.family, self.layout.meta_model
        config = trimmed_config(meta_model)
        kinds = kinds_of_blocks(config)
        set_blocks(config, 0)  # made without blocks: masks, rotary tables of each layer type, the loop
        model, _ = load_part(type(meta_model), config, {}, dtype=self.dtype, device_map=self.device)
        set_blocks(model.config, len(span), None if kinds is None else kinds[span.start : span.stop])
        for block in blocks:
            module: Any
            for module in block.modules():
                if isinstance(getattr(module, "config", None), PretrainedConfig):
                    if hasattr(module.config, "_is_quantized"):  # Jamba multiplies by some weights in another way then
                        model.config._is_quantized = True
                    module.config = model.config
        family.put_blocks(model, nn.ModuleList(blocks))
        empty_the_rest(model, family)
        model.requires_grad_(False)
        self.scheme.set_mode(model, training=False)
        tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
        tensors += [scale for weight in model.parameters() for scale in self.scheme.scales(weight)]
        return LoadedBlocks(
            model=model,
            family=family,
            span=span,
            quantization=self.scheme,
            weight_bytes=sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()),
        )


def torch_dtype(name: str, config: PretrainedConfig, device: str) -> torch.dtype:
    """The dtype to compute in, by its name. `auto` is the checkpoint's on a GPU and float32 on a CPU.

    On a CPU without native support, bfloat16 was 8 to 80 times slower than float32. Raises ConfigError.
    """
    if name == "auto":
        stored = getattr(config, "dtype", None)
        return stored if device != "cpu" and isinstance(stored, torch.dtype) else torch.float32
    if name not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"dtype={name!r} is not one of auto, float32, float16, bfloat16", key="dtype", seen=name)
    return getattr(torch, name)

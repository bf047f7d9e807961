"""Blocks of a checkpoint in memory, quantized or not: transformers' base model with these blocks alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petals_tune.blocks.devices.hardware import has_bfloat16, is_accelerator
from petals_tune.blocks.experts.forward import use_expert_forward
from petals_tune.blocks.experts.reading import ExpertReader, Readable, StoredExperts
from petals_tune.blocks.experts.stack import ExpertStack, expert_stacks, replace_by_stacks
from petals_tune.blocks.memory import give_back_freed_memory
from petals_tune.blocks.quantization import Quantization, find_scheme
from petals_tune.blocks.quantized_cache import QuantizedBlockCache
from petals_tune.errors import ConfigError, UnsupportedModel
from petals_tune.model.block_lists import set_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.disk import DiskCache
from petals_tune.model.families import (
    Family,
    PerBlock,
    empty_the_rest,
    family_of,
    load_part,
    placeholder_model,
    restore_counts,
    trimmed_class,
    trimmed_config,
)
from petals_tune.model.nested import text_config
from petals_tune.wire.records import Dtype
from petals_tune.wire.span import BlockSpan


@dataclass(frozen=True, kw_only=True)
class LoadedBlocks:
    """A base model that holds blocks `span` alone, frozen; called with `inputs_embeds`, it returns their output."""

    model: PreTrainedModel
    family: Family
    span: BlockSpan
    quantization: Quantization
    weight_bytes: int
    per_block: PerBlock  # of the whole model

    @property
    def blocks(self) -> nn.ModuleList:
        return self.family.blocks_of(self.model)


def load_blocks(
    checkpoint: Checkpoint,
    span: BlockSpan,
    *,
    quantization: str,
    dtype: torch.dtype,
    device: str | Sequence[str] = "cpu",
    disk: DiskCache | None = None,
    on_block: Callable[[int], None] = lambda block: None,
) -> LoadedBlocks:
    """Read blocks `span` one by one, quantize each by the scheme of that name, and build the model around them.

    At most one tensor is in memory in full, or one expert's matrix. Quantized blocks are kept in `disk`, and read from
    there the next time. `on_block` is called after each block, with its number.

    device: of all blocks, or a list with that of each; the rest of the model is on the first block's

    Raises UnsupportedModel for files that cannot be used, ConfigError for a span that the model does not have or a
    scheme that cannot be used.
    """
    devices = [device] * len(span) if isinstance(device, str) else list(device)
    scheme = find_scheme(quantization)
    for each in {*devices}:
        scheme.check_available(each)
    layout = BlockLayout.of(checkpoint)
    if span.stop > layout.family.total_blocks:
        raise ConfigError(
            f"blocks={span}: {checkpoint.source} has blocks 0:{layout.family.total_blocks}", key="blocks", seen=span
        )
    loader = _Loader(layout, scheme, dtype)
    cache = None
    if disk is not None and scheme.stored_config(dtype) is not None:
        cache = QuantizedBlockCache(
            disk=disk, checkpoint=checkpoint, quantization=scheme.stored_as or scheme.name, dtype=dtype
        )
    blocks = []
    for block, its_device in zip(range(span.start, span.stop), devices, strict=True):
        blocks.append(loader.load(block, cache, its_device))
        give_back_freed_memory()
        on_block(block)
    return loader.build_around(blocks, span, devices[0])


def dummy_block(checkpoint: Checkpoint, *, quantization: str, dtype: torch.dtype, device: str) -> LoadedBlocks:
    """Block 0 with constants for weights: it has the shapes of the real one, and computes as fast."""
    layout = BlockLayout.of(checkpoint)
    loader = _Loader(layout, find_scheme(quantization), dtype)
    constants = {
        name: _Constant(shape=parameter.shape, dtype=dtype)
        for name, parameter in layout.meta_block(0).named_parameters()
    }
    block, _ = loader.build(0, constants, device)
    for stack in expert_stacks(block).values():
        stack.fill(_Constant(shape=torch.Size(stack.shape[1:]), dtype=dtype).__getitem__, device)
    return loader.build_around([block], BlockSpan(0, 1), device)


@dataclass(frozen=True, kw_only=True)
class _Constant:
    """A tensor in the place of a stored tensor: it takes memory once it is indexed."""

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
        family = family_of(meta_model, checkpoint.config)
        names: dict[int, dict[str, str]] = {block: {} for block in range(family.total_blocks)}
        for name in checkpoint.tensor_names:
            block, inside = family.block_index(name), family.inside(name)
            if block in names and inside is not None:
                names[block][name] = inside
        return cls(checkpoint=checkpoint, meta_model=meta_model, family=family, names=names)

    @cached_property
    def per_block(self) -> PerBlock:
        return PerBlock.of(self.meta_model.config, self.family.total_blocks)

    def meta_block(self, block: int) -> nn.Module:
        return self.family.blocks_of(self.meta_model)[block]


_State = Mapping[str, torch.Tensor | Readable]  # of one block: name inside the block -> tensor


class _Loader:
    """Builds blocks of one checkpoint, each by transformers in a base model of that block alone.

    Experts are read and quantized here, one by one: transformers makes one tensor of all of a block's.
    """

    def __init__(self, layout: BlockLayout, scheme: Quantization, dtype: torch.dtype):
        self.layout, self.scheme, self.dtype = layout, scheme, dtype
        for block in layout.family.blocks_of(layout.meta_model):
            replace_by_stacks(block, scheme)
        self._reader = ExpertReader(layout.meta_model, layout.family.conversions)

    def load(self, block: int, cache: QuantizedBlockCache | None, device: str) -> nn.Module:
        renamed, checkpoint = self.layout.names[block], self.layout.checkpoint
        if cache is not None and (quantized := cache.get(block, list(renamed))) is not None:
            return self.build(block, quantized, device, is_quantized=True)[0]
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
        experts = self._find_experts(block)
        of_experts = {name for stored in experts.values() for names in stored.names.values() for name in names}
        others = {renamed[name]: tensor for name, tensor in tensors.items() if name not in of_experts}
        made, missing = self.build(block, others, device)
        stacks = expert_stacks(made)
        missing += [
            path for path, stack in stacks.items() if path not in experts or experts[path].lacks(stack.shape[0])
        ]
        if missing:
            raise UnsupportedModel(
                f"{checkpoint.source} lacks tensors of block {block}: {', '.join(sorted(missing)[:3])}"
                f"{', ...' if len(missing) > 3 else ''}",
                key="model.source",
                seen=sorted(missing),
            )
        for path, stack in stacks.items():
            self._fill(stack, experts[path], tensors, device)
        if self.scheme.stored_config(self.dtype) is not None:
            for parameter in made.parameters():
                if parameter.is_floating_point():  # a view that would keep the whole file in memory
                    parameter.data = parameter.data.clone()
        if cache is not None:
            cache.put(block, list(renamed), made.state_dict())
        return made

    def _find_experts(self, block: int) -> dict[str, StoredExperts]:
        """Where the experts of a block are in the checkpoint, by the paths of their stacks."""
        place = f"{self.layout.family.blocks}.{block}."
        paths = expert_stacks(self.layout.meta_block(block))
        names = {place + inside: name for name, inside in self.layout.names[block].items()}
        found = self._reader.find(names, [place + path for path in paths])
        return {parameter.removeprefix(place): stored.renamed(names) for parameter, stored in found.items()}

    def _fill(self, stack: ExpertStack, stored: StoredExperts, tensors: Mapping[str, Readable], device: str) -> None:
        """Read and quantize the experts of a stack. Raises UnsupportedModel for those of another shape."""
        checkpoint = self.layout.checkpoint
        whole = stored.whole(tensors) if self.scheme.stored_config(self.dtype) is None else None
        if whole is not None and whole.shape == stack.shape:  # of the mapped file, which servers on one machine share
            whole = whole.to(device)
            stack.put(whole.transpose(1, 2) if stack.transposed else whole, whole.new_empty(len(whole), 0))
            return

        def matrix_of(expert: int) -> torch.Tensor:
            matrix = stored.read(expert, tensors, stack.shape, checkpoint.config)
            if matrix.shape != stack.shape[1:]:
                raise UnsupportedModel(
                    f"{checkpoint.source} does not fit config.json: expert {expert} of {stored.parameter} is "
                    f"{tuple(matrix.shape)} there, and should be {tuple(stack.shape[1:])}",
                    key="model.source",
                    seen=stored.parameter,
                )
            return matrix

        stack.fill(matrix_of, device)

    def build(
        self, block: int, state: _State, device: str, *, is_quantized: bool = False
    ) -> tuple[nn.Module, list[str]]:
        """(block number `block` on `device` with the tensors of `state`, the names of tensors that `state` lacks)."""
        family, meta_model = self.layout.family, self.layout.meta_model
        config, quantize = trimmed_config(meta_model), self.scheme.loading_config(self.dtype)
        if is_quantized and (stored := self.scheme.stored_config(self.dtype)) is not None:
            config.quantization_config, quantize = stored.to_dict(), None  # as in a checkpoint that was saved quantized
            family = replace(family, conversions=None)  # the names are those of the library's own modules
        place = f"{family.blocks}.0."
        filled = {
            path: [state[f"{path}.{tensor}"] for tensor in ("numbers", "scales")]
            for path in expert_stacks(meta_model.get_submodule(f"{family.blocks}.{block}"))
            if f"{path}.numbers" in state
        }
        model, loading = load_part(
            trimmed_class(meta_model, family, BlockSpan(block, block + 1)),
            config,
            {place + name: t for name, t in state.items() if name.rpartition(".")[0] not in filled},
            dtype=self.dtype,
            device_map=device,
            quantization_config=quantize,
        )
        missing = [name.removeprefix(place) for name in loading["missing_keys"] if name.startswith(place)]
        made = family.blocks_of(model)[0]
        for path, stack in expert_stacks(made).items():
            if path in filled:
                stack.put(*(tensor[...].to(device) for tensor in filled[path]))
        return made, missing

    def build_around(self, blocks: Sequence[nn.Module], span: BlockSpan, device: str) -> LoadedBlocks:
        """The base model on `device` with `blocks`; they keep their own numbers, which some families compute with."""
        family, meta_model = self.layout.family, self.layout.meta_model
        config = trimmed_config(meta_model)
        set_blocks(config, 0)  # made without blocks: masks, rotary tables of each layer type, the loop
        model, _ = load_part(type(meta_model), config, {}, dtype=self.dtype, device_map=device)
        self.layout.per_block.write(model.config, span)
        restore_counts(family.owner(model), family.owner(meta_model))
        for block in blocks:
            module: Any
            for module in block.modules():
                if isinstance(getattr(module, "config", None), PretrainedConfig):
                    if hasattr(module.config, "_is_quantized"):  # Jamba multiplies by some weights in another way then
                        model.config._is_quantized = True
                    module.config = model.config
        family.put_blocks(model, nn.ModuleList(blocks))
        use_expert_forward(model)
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
            per_block=self.layout.per_block,
            weight_bytes=sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()),
        )


def torch_dtype(name: str, config: PretrainedConfig, *devices: str) -> torch.dtype:
    """The dtype to compute in on `devices`, by its name.

    `auto` is float32 on a CPU, where bfloat16 without native support was 8 to 80 times slower, and the checkpoint's
    dtype on a GPU, where it is one that servers compute in; but float16 where that is bfloat16 and a GPU does not have
    it. Raises ConfigError.
    """
    if name == "auto":
        stored: Any = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
        if not all(map(is_accelerator, devices)) or stored not in [getattr(torch, each) for each in get_args(Dtype)]:
            return torch.float32
        return torch.float16 if stored is torch.bfloat16 and not all(map(has_bfloat16, devices)) else stored
    if name not in get_args(Dtype):
        raise ConfigError(f"dtype={name!r} is not one of auto, float32, float16, bfloat16", key="dtype", seen=name)
    return getattr(torch, name)

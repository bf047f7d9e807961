"""Small models in packed formats, made from models in full by each format's own formula or library."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from petals_tune.blocks.experts.stack import expert_stacks
from petals_tune.blocks.loading import load_blocks
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.families import family_of, placeholder_model, without_blocks
from petals_tune.wire.span import BlockSpan

_NOT_PACKED = ("norm", "embed", "gate.weight", "router")
FP8_MAX = 448.0


def is_packed(name: str, tensor: torch.Tensor) -> bool:
    """Whether checkpoints may pack this tensor: the weight of a linear, of the head or of an expert."""
    return tensor.dim() == 2 and name.endswith("weight") and not any(part in name for part in _NOT_PACKED)


def repacked(
    plain: Path,
    folder: Path,
    options: dict[str, Any],
    pack: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    chosen: Callable[[str, torch.Tensor], bool] = is_packed,
) -> Path:
    """Write the model of `plain` with `chosen` tensors as `pack` makes them of a name and a tensor."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        tensors |= pack(name, tensor) if chosen(name, tensor) else {name: tensor}
    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": options}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def change(folder: Path, copy: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Write the model of `folder` with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    copy.mkdir()
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, copy / "model.safetensors")
    return copy


def fp8_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize (out, in) by blocks, the last ones cut: (FP8 (out, in), float32 scales)."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    scales = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).abs().amax((1, 3)) / FP8_MAX
    return (weight / widened(scales, block)[:rows, :columns]).to(torch.float8_e4m3fn), scales


def widened(scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Repeat each scale for its block."""
    return scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def fp8_model(plain: Path, folder: Path, block: tuple[int, int] = (16, 16)) -> Path:
    """Write the model of `plain` as DeepSeek publishes its models."""

    def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        packed, scales = fp8_blocks(weight, block)
        return {name: packed, f"{name}_scale_inv": scales}

    options = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [*block]}
    return repacked(plain, folder, options, pack)


def mxfp4_model(plain: Path, folder: Path) -> Path:
    """Write the model of `plain` as OpenAI publishes gpt-oss: experts in MXFP4, each number the nearest one."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

    def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.mT.unflatten(-1, (-1, 32))
        exponents = torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True) / 6))
        scaled = groups / torch.exp2(exponents)
        numbers = (scaled.abs()[..., None] - values).abs().argmin(-1) + 8 * (scaled < 0)
        blocks = (numbers[..., 0::2] | numbers[..., 1::2] << 4).to(torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": (exponents[..., 0] + 127).to(torch.uint8)}

    options = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return repacked(plain, folder, options, pack, lambda name, weight: name.endswith("_proj") and weight.dim() == 3)


def words_of(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack numbers (rows, n) without a sign into int32 words (rows, n * bits / 32), the lowest bits first."""
    shifts = torch.arange(0, 32, bits)
    return (numbers.unflatten(1, (-1, 32 // bits)) << shifts).sum(-1).to(torch.int32)


def random_bits(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Make numbers of random bytes below 120, which are finite in FP8, and scales in FP4 that do not overflow."""
    size = torch.empty((), dtype=dtype).itemsize
    return torch.randint(0, 120, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(dtype)


def random_parts(method: str, rows: int, columns: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Make the parts of a random weight (out, in), in MXFP4 of two experts: (options of the format, role -> part)."""
    words, groups = torch.int32, -(-columns // 128)
    options: dict[str, Any] = {"quant_method": method}
    if method == "fp8":
        scale = torch.rand(-(-rows // 128), -(-columns // 128))
        return options, {"weight": random_bits(rows, columns, dtype=torch.float8_e4m3fn), "scale": scale}
    if method == "mxfp4":
        shape = (2, rows, columns // 32)
        scales = random_bits(*shape, dtype=torch.uint8)
        return options, {"blocks": random_bits(*shape, 16, dtype=torch.uint8), "scales": scales}
    if method == "compressed-tensors":
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
        options |= {"format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}}
        scale, shape_part = torch.rand(rows, columns // 32).bfloat16(), torch.tensor([rows, columns])
        return options, {"words": random_bits(rows, columns // 8, dtype=words), "scale": scale, "shape": shape_part}
    if method == "bitsandbytes":
        return options | {"load_in_8bit": True}, {
            "weight": random_bits(rows, columns, dtype=torch.int8),
            "SCB": torch.rand(rows),
        }
    of_words = (columns // 8, rows) if method == "gptq" else (columns, rows // 8)
    return options | {"bits": 4, "group_size": 128}, {
        "words": random_bits(*of_words, dtype=words),
        "zeros": random_bits(groups, rows // 8, dtype=words),
        "scales": torch.rand(groups, rows).half(),
    }


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Read all of a model as clients and servers do: the parameters by their names in the whole model."""
    source = Checkpoint(str(folder))
    decoder = placeholder_model(source.config)
    family = family_of(decoder)
    loaded = load_blocks(source, BlockSpan(0, family.total_blocks), quantization="none", dtype=dtype)
    held = {name: value.data for name, value in loaded.blocks.named_parameters()}
    for name, stack in expert_stacks(loaded.blocks).items():
        held[name] = stack.numbers.mT if stack.transposed else stack.numbers
    found = {f"{decoder.base_model_prefix}.{family.blocks}.{name}": value for name, value in held.items()}
    outside = [name for name in source.tensor_names if family.block_index(name) is None]
    model = without_blocks(
        AutoModelForCausalLM._model_mapping[type(source.config)], source.config, source.read(outside, dtype), dtype
    )
    return found | {name: value.data for name, value in model.named_parameters()}


def assert_equal_to(library: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Compare each parameter with the library's own model of the same files, bit by bit."""
    wanted, found = dict(library.named_parameters()), ours(folder, dtype)
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert found[name].dtype is dtype
        assert torch.equal(found[name], parameter.data.to(dtype)), name

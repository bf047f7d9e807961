"""FP8 checkpoints give the values of the library's own dequantized model, and DeepSeek's where that has none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from petals_tune.errors import UnsupportedModel
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.packed.fp8 import FP8
from tests.models import plain_model, relative_error
from tests.packed_models import assert_equal_to, change, fp8_blocks, fp8_model, ours, repacked, widened
from tests.raising import raises

NAME = "model.layers.1.mlp.down_proj.weight"


def small(model_folder: Any, family: str = "llama") -> Path:
    return model_folder(family, num_hidden_layers=2)


@pytest.fixture(scope="module")
def llama(model_folder, tmp_path_factory) -> Path:
    return fp8_model(small(model_folder), tmp_path_factory.mktemp("fp8") / "llama")


def library(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_librarys(llama, dtype):
    assert_equal_to(library(llama, dtype), llama, dtype)


def test_experts_are_the_librarys(model_folder, tmp_path):
    folder = fp8_model(small(model_folder, "qwen3_moe"), tmp_path / "moe")
    assert_equal_to(library(folder, torch.float32), folder)


def test_the_weights_are_near_those_that_were_packed(model_folder, llama):
    plain = dict(plain_model(small(model_folder)).named_parameters())[NAME]
    assert 0 < relative_error(ours(llama)[NAME], plain) < 0.04, "three bits of mantissa"


def test_blocks_that_do_not_divide_a_weight_are_cut(model_folder, tmp_path):
    """As in DeepSeek's own checkpoints: 576 rows in blocks of 128; the library refuses them."""
    plain, block = small(model_folder), (20, 12)
    folder = fp8_model(plain, tmp_path / "cut", block)
    packed, scales = fp8_blocks(dict(plain_model(plain).named_parameters())[NAME], block)
    wanted = packed.float()
    for row in range(wanted.shape[0]):
        for column in range(wanted.shape[1]):
            wanted[row, column] *= scales[row // 20, column // 12]
    assert torch.equal(ours(folder)[NAME], wanted)


@pytest.mark.parametrize("kind", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_that_are_exponents(model_folder, tmp_path, kind):
    """MXFP8: a power of two for 32 weights of a row."""

    def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        _, scales = fp8_blocks(weight, (1, 16))
        powers = torch.exp2(torch.ceil(torch.log2(scales)))
        packed = (weight / powers.repeat_interleave(16, dim=1)).to(torch.float8_e4m3fn)
        return {name: packed, f"{name}_scale_inv": powers.to(torch.float8_e8m0fnu).view(kind)}

    options = {"quant_method": "mxfp8", "weight_block_size": [1, 16], "scale_fmt": "ue8m0"}
    folder = repacked(small(model_folder), tmp_path / "mxfp8", options, pack)
    if kind is torch.uint8:
        assert_equal_to(library(folder, torch.float32), folder)
    else:
        assert 0 < relative_error(ours(folder)[NAME], ours(small(model_folder))[NAME]) < 0.07


def test_one_scale_for_a_weight(model_folder, tmp_path):
    def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        packed, scales = fp8_blocks(weight, tuple(weight.shape))
        return {name: packed, f"{name}_scale_inv": scales.reshape(())}

    options = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    folder = repacked(small(model_folder), tmp_path / "tensor", options, pack)
    assert_equal_to(library(folder, torch.float32), folder)


def test_pairs_of_fp4_beside_fp8(tmp_path, model_folder):
    """DeepSeek V4's experts."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values += [-value for value in values]
    torch.manual_seed(0)
    numbers, scales = torch.randint(0, 16, (24, 64)), torch.randint(120, 130, (24, 2), dtype=torch.uint8)
    pairs = (numbers[:, 0::2] | numbers[:, 1::2] << 4).to(torch.uint8).view(torch.int8)

    def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: pairs, name.removesuffix("weight") + "scale": scales}

    options = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}
    folder = repacked(small(model_folder), tmp_path / "fp4", options, pack, lambda name, _: name == NAME)
    wanted = torch.tensor(
        [[values[numbers[i, j]] * 2.0 ** (int(scales[i, j // 32]) - 127) for j in range(64)] for i in range(24)]
    )
    assert torch.equal(Checkpoint(str(folder)).read([NAME], torch.float32)[NAME], wanted)


def test_stacked_experts_are_read_one_by_one(model_folder, tmp_path):
    name, torch_name = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.gate_proj.weight"
    torch.manual_seed(0)
    weights = torch.randn(4, 32, 48)
    packed, scales = zip(*(fp8_blocks(weight, (16, 16)) for weight in weights), strict=True)

    def pack(_: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: torch.stack(packed), f"{name}_scale_inv": torch.stack(scales), torch_name: weight}

    options = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    folder = repacked(small(model_folder), tmp_path / "fused", options, pack, lambda each, _: each == torch_name)
    stored = Checkpoint(str(folder)).stored([name], torch.float32)[name]
    wanted = torch.stack([packed[i].float() * widened(scales[i], (16, 16)) for i in range(4)])
    assert stored.shape == (4, 32, 48)
    assert torch.equal(stored[...], wanted)
    assert torch.equal(stored[2], wanted[2])
    assert torch.equal(stored[-1], wanted[3])
    assert torch.equal(stored[1:3], wanted[1:3])
    assert stored[1:2].untyped_storage().nbytes() == wanted[1].nbytes


def _set(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("edit", "seen"),
    [
        (lambda tensors: tensors.pop(f"{NAME}_scale_inv"), NAME),
        (lambda tensors: tensors.pop(NAME), f"{NAME}_scale_inv"),
        (_set(f"{NAME}_scale_inv", torch.ones(1, 3)), f"{NAME}_scale_inv"),
        (_set(f"{NAME}_scale_inv", torch.ones(())), f"{NAME}_scale_inv"),
        (_set(NAME, torch.ones(32, 48, dtype=torch.bfloat16)), NAME),
        (_set(NAME, torch.ones(1536, dtype=torch.float8_e4m3fn)), NAME),
    ],
    ids=["no scale", "no weight", "scales of another shape", "one scale for all", "not FP8", "no matrix"],
)
def test_parts_that_contradict_each_other_are_named(llama, tmp_path, edit, seen):
    folder = change(llama, tmp_path / "copy", edit)
    with raises(UnsupportedModel, file="model.safetensors", key="model.source", seen=seen):
        ours(folder)


@pytest.mark.parametrize("options", [{"weight_block_size": [128]}, {"fmt": "e5m2"}, {"weight_block_size": "big"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        FP8(options)

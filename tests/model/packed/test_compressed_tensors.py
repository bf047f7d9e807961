"""Checkpoints that compressed-tensors wrote give the values of the library's own dequantized model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from petals_tune.errors import UnsupportedModel
from petals_tune.model.packed.compressed_tensors import CompressedTensors
from tests.packed_models import assert_equal_to, change, ours, repacked
from tests.raising import raises

NAME = "model.layers.1.mlp.down_proj"
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
# Name of a case: (format, weights)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 of Kimi": ("pack-quantized", INT4),
    "int4 asymmetric": ("pack-quantized", {**INT4, "symmetric": False}),
    "int8 in words, by rows": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 by rows": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "fp8 by rows": ("float-quantized", {**FLOAT8, "strategy": "channel"}),
    "fp8 whole": ("float-quantized", {**FLOAT8, "strategy": "tensor"}),
    "fp8 by blocks": ("float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [16, 32]}),
}


def packed_model(plain: Path, folder: Path, case: str, scale_dtype: torch.dtype) -> Path:
    stored_as, weights = CASES[case]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=stored_as)
    compressor: Any = BaseCompressor.get_value_from_registry(stored_as)

    def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        height, width = {
            "group": (1, 16),
            "channel": (1, columns),
            "tensor": (rows, columns),
            "block": (16, 32),
        }[weights["strategy"]]
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), scheme.weights)
        scale = scale.to(scale_dtype)
        state = {"weight": weight, "weight_scale": scale.reshape(1) if weights["strategy"] == "tensor" else scale}
        state["weight_zero_point"] = zero.to(torch.int8) if not scheme.weights.symmetric else None
        state = compressor.compress({key: value for key, value in state.items() if value is not None}, scheme)
        return {f"{name.removesuffix('weight')}{key}": value for key, value in state.items()}

    options = {
        "quant_method": "compressed-tensors",
        "format": stored_as,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": stored_as}},
        "ignore": ["lm_head"],
    }
    return repacked(plain, folder, options, pack)


@pytest.fixture(scope="module")
def packed(model_folder, tmp_path_factory) -> Callable[..., Path]:
    made: dict[Any, Path] = {}

    def folder(case: str, family: str = "llama", scale_dtype: torch.dtype = torch.bfloat16) -> Path:
        key = (case, family, scale_dtype)
        if key not in made:
            plain = model_folder(family, num_hidden_layers=2)
            made[key] = packed_model(plain, tmp_path_factory.mktemp("compressed") / "model", case, scale_dtype)
        return made[key]

    return folder


def library(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32
    )


@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_librarys(packed, case):
    assert_equal_to(library(packed(case)), packed(case))


@pytest.mark.parametrize("case", ["int4 of Kimi", "fp8 by rows"])
def test_experts_are_the_librarys(packed, case):
    """It multiplies those in FP8 in float32, and others in the dtype of the scales."""
    folder = packed(case, "qwen3_moe")
    assert_equal_to(library(folder), folder)


def _set(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.__setitem__(name, value)


def _pop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("case", "edit", "seen"),
    [
        ("int4 of Kimi", _pop(f"{NAME}.weight_scale"), f"{NAME}.weight_packed"),
        ("int4 of Kimi", _pop(f"{NAME}.weight_shape"), f"{NAME}.weight_packed"),
        ("int4 of Kimi", _pop(f"{NAME}.weight_packed"), f"{NAME}.weight_scale"),
        ("int4 of Kimi", _set(f"{NAME}.weight_shape", torch.tensor([32, 64])), f"{NAME}.weight_packed"),
        ("int4 of Kimi", _set(f"{NAME}.weight_scale", torch.ones(32, 6)), f"{NAME}.weight_scale"),
        ("int4 of Kimi", _set(f"{NAME}.weight_g_idx", torch.zeros(48, dtype=torch.int32)), f"{NAME}.weight_g_idx"),
        ("int4 asymmetric", _set(f"{NAME}.weight_zero_point", torch.zeros(32, 3)), f"{NAME}.weight_zero_point"),
        ("fp8 by rows", _set(f"{NAME}.weight_scale", torch.ones(48, 1)), f"{NAME}.weight_scale"),
        ("fp8 by rows", _set(f"{NAME}.weight", torch.ones(32, 48)), f"{NAME}.weight"),
        ("fp8 by rows", _pop(f"{NAME}.weight_scale"), f"{NAME}.weight"),
    ],
)
def test_parts_that_contradict_each_other_are_named(packed, tmp_path, case, edit, seen):
    folder = change(packed(case), tmp_path / "copy", edit)
    with raises(UnsupportedModel, file="model.safetensors", key="model.source") as caught:
        ours(folder)
    assert str(caught.value.seen).startswith(NAME)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format"),
        ({"config_groups": {"a": {"weights": {"num_bits": 3, "type": "int"}}}}, "num_bits"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "strategy": "tensor_group"}}}}, "strategy"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "format"),
    ],
)
def test_unknown_options_are_refused(options, text):
    """Rotated weights, for one, would have the right shapes."""
    CompressedTensors({"format": "pack-quantized", "config_groups": {}})
    with pytest.raises(ValueError, match=text):
        CompressedTensors({"format": "pack-quantized", "config_groups": {}, **options})

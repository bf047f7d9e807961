"""Formats that cannot be read are refused by name, by clients and servers alike; files that hide one, too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.blocks.loading import load_blocks
from petals_tune.errors import UnsupportedModel
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.fingerprint import Fingerprint
from petals_tune.model.packed import _TRANSPOSED, FORMATS
from petals_tune.wire.span import BlockSpan
from tests.packed_models import change, fp8_model, ours
from tests.raising import raises

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def plain(model_folder) -> Path:
    return model_folder("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def fp8(plain, tmp_path_factory) -> Path:
    return fp8_model(plain, tmp_path_factory.mktemp("fp8") / "llama")


def with_options(plain: Path, folder: Path, options: Any, **fields: Any) -> Path:
    """The model of `plain` with another config.json."""
    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields, "quantization_config": options}))
    (folder / "model.safetensors").symlink_to(plain / "model.safetensors")
    return folder


OTHER_METHODS = AUTO_QUANTIZATION_CONFIG_MAPPING.keys() - FORMATS.keys() - {"bitsandbytes_4bit", "bitsandbytes_8bit"}


@pytest.mark.parametrize("method", [*sorted(OTHER_METHODS), "modelopt", ""])
def test_other_methods_are_refused_by_name(plain, tmp_path, method):
    folder = with_options(plain, tmp_path / "copy", {"quant_method": method, "bits": 4})
    wanted = {"source": str(folder), "file": "config.json", "seen": method, "model_type": "llama"}
    with raises(UnsupportedModel, **wanted):
        AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=[])
    with raises(UnsupportedModel, **wanted):
        load_blocks(Checkpoint(str(folder)), BlockSpan(0, 1), quantization="int8", dtype=torch.float32)
    with raises(UnsupportedModel, **wanted):
        _ = Checkpoint(str(folder)).digest


@pytest.mark.parametrize(
    "options",
    [
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "gptq", "bits": {}},
        {"quant_method": "gptq", "group_size": "128"},
        {"quant_method": "awq", "q_group_size": 0},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"block_structure": [128]}}}},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"group_size": 1.5}}}},
    ],
)
def test_options_that_cannot_be_read_are_refused(plain, tmp_path, options):
    folder = with_options(plain, tmp_path / "copy", options)
    with raises(UnsupportedModel, source=str(folder), seen=options["quant_method"]):
        _ = Checkpoint(str(folder)).config


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_transposed_weights_are_refused(model_folder, tmp_path, method):
    folder = with_options(model_folder("gpt2"), tmp_path / "copy", {"quant_method": method})
    with raises(UnsupportedModel, source=str(folder), seen=method, model_type="gpt2"):
        _ = Checkpoint(str(folder)).config


def test_all_families_with_transposed_weights_are_known():
    models = Path(transformers.__file__).parent / "models"
    using = {path.parent.name for path in models.glob("*/modeling_*.py") if "import Conv1D" in path.read_text()}
    assert {name.replace("openai", "openai-gpt") for name in using} - {"clvp"} == _TRANSPOSED  # CLVP: no causal LM


def test_options_of_a_nested_text_model_count(tmp_path, plain):
    """As in Kimi K2.5's config.json."""
    text = json.loads((plain / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llava", "text_config": {**text, "quantization_config": {"quant_method": "hqq"}}})
    )
    with raises(UnsupportedModel, seen="hqq", file="config.json"):
        _ = Checkpoint(str(tmp_path)).config
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llava", "text_config": {**text, "quantization_config": {"quant_method": "fp8"}}})
    )
    checkpoint = Checkpoint(str(tmp_path))
    assert checkpoint.is_packed
    assert not hasattr(checkpoint.config.get_text_config(), "quantization_config")


@pytest.mark.parametrize("mark", [f"{NAME}_scale_inv", "model.layers.1.mlp.down_proj.qweight", f"{NAME}.absmax"])
def test_packed_weights_without_a_word_in_the_config_are_refused(plain, tmp_path, mark):
    """The weights of FP8 have the right names and shapes, and would be off by their scales."""
    folder = change(plain, tmp_path / "copy", lambda tensors: tensors.__setitem__(mark, torch.ones(2)))
    with raises(UnsupportedModel, source=str(folder), seen=mark):
        ours(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_whole_numbers_are_no_weights(plain, tmp_path, dtype):
    folder = change(plain, tmp_path / "copy", lambda tensors: tensors.__setitem__(NAME, tensors[NAME].to(dtype)))
    with raises(UnsupportedModel, file="model.safetensors", seen=NAME):
        ours(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_other_floats_are_read_as_they_are(plain, tmp_path, dtype):
    """Weights that were rounded to FP8 without a scale: their values are what is stored, in the library as well."""
    folder = change(plain, tmp_path / "copy", lambda tensors: tensors.__setitem__(NAME, tensors[NAME].to(dtype)))
    wanted = load_file(plain / "model.safetensors")[NAME].to(dtype).float()
    assert torch.equal(ours(folder)[NAME], wanted)
    assert Checkpoint(str(folder)).dtype is torch.float32


def test_the_same_files_are_the_same_model_and_others_are_not(plain, fp8, tmp_path):
    same = change(fp8, tmp_path / "same", lambda tensors: None)
    scaled = change(fp8, tmp_path / "scaled", lambda tensors: tensors[f"{NAME}_scale_inv"].mul_(2))
    first = Fingerprint.of(str(fp8))
    assert first == Fingerprint.of(str(same))
    assert first.difference(Fingerprint.of(str(scaled))) == "blocks"
    assert first.difference(Fingerprint.of(str(plain))) == "config"
    assert Checkpoint(str(fp8)).digest == Checkpoint(str(same)).digest != Checkpoint(str(plain)).digest


def test_other_options_are_another_model_and_another_cache(fp8, tmp_path):
    """Blocks that were quantized with scales of other blocks are not taken from the cache."""
    config = json.loads((fp8 / "config.json").read_text())
    options = {**config["quantization_config"], "weight_block_size": None}
    other = with_options(fp8, tmp_path / "copy", options)
    assert Checkpoint(str(fp8)).digest != Checkpoint(str(other)).digest
    assert Checkpoint(str(fp8)).state_of([NAME]) != Checkpoint(str(other)).state_of([NAME])

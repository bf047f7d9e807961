"""MXFP4 checkpoints give the values of the library's own dequantized model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

from petals_tune.errors import UnsupportedModel
from petals_tune.model.checkpoint import Checkpoint
from tests.packed_models import assert_equal_to, change, mxfp4_model, ours
from tests.raising import raises

NAME = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def gpt_oss(model_folder, tmp_path_factory) -> Path:
    plain = model_folder("gpt_oss", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    return mxfp4_model(plain, tmp_path_factory.mktemp("mxfp4") / "gpt_oss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_the_librarys(gpt_oss, dtype):
    library = AutoModelForCausalLM.from_pretrained(
        gpt_oss, quantization_config=Mxfp4Config(dequantize=True), dtype=dtype
    )
    assert_equal_to(library, gpt_oss, dtype)


def test_one_expert_is_read_alone(gpt_oss):
    stored = Checkpoint(str(gpt_oss)).stored([NAME], torch.float32)[NAME]
    assert stored.shape == (4, 32, 64)
    assert torch.equal(stored[2], stored[...][2])
    assert stored[2].untyped_storage().nbytes() == 4 * 32 * 64


def _set(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("edit", "seen"),
    [
        (lambda tensors: tensors.pop(f"{NAME}_scales"), f"{NAME}_blocks"),
        (lambda tensors: tensors.pop(f"{NAME}_blocks"), f"{NAME}_scales"),
        (_set(f"{NAME}_scales", torch.ones(4, 64, 2, dtype=torch.uint8)), f"{NAME}_scales"),
        (_set(f"{NAME}_scales", torch.ones(4, 64, 1)), f"{NAME}_scales"),
        (_set(f"{NAME}_blocks", torch.ones(4, 64, 2, 8, dtype=torch.uint8)), f"{NAME}_blocks"),
    ],
    ids=["no scales", "no blocks", "scales of another shape", "scales of another kind", "blocks of another size"],
)
def test_parts_that_contradict_each_other_are_named(gpt_oss, tmp_path, edit, seen):
    folder = change(gpt_oss, tmp_path / "copy", edit)
    with raises(UnsupportedModel, file="model.safetensors", key="model.source", seen=seen):
        ours(folder)

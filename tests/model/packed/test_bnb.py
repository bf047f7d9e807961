"""Checkpoints that bitsandbytes wrote give the values that it dequantizes them to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from petals_tune.errors import UnsupportedModel
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.packed.bnb import BitsAndBytes
from tests.packed_models import assert_equal_to, change, ours
from tests.raising import raises

NAME = "model.layers.1.mlp.down_proj.weight"
SIZES = {"hidden_size": 64, "intermediate_size": 128}
KINDS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 in bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_quant_storage": "bfloat16",
        "bnb_4bit_compute_dtype": "bfloat16",
    },
}


@pytest.fixture(scope="module")
def saved(model_folder, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a kind, made once by the library."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            model = AutoModelForCausalLM.from_pretrained(
                model_folder("llama", num_hidden_layers=2, **SIZES),
                quantization_config=BitsAndBytesConfig(**KINDS[kind]),
            )
            made[kind] = tmp_path_factory.mktemp("bnb") / "llama"
            model.save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_librarys(saved, kind):
    library = AutoModelForCausalLM.from_pretrained(saved(kind), dtype=torch.float32)
    assert_equal_to(library.dequantize(torch.float32), saved(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_cut_from_a_large_weight(saved, kind, monkeypatch):
    """Pieces begin where a block of scales begins."""
    whole = Checkpoint(str(saved(kind))).read([NAME], torch.float32)[NAME]
    monkeypatch.setattr("petals_tune.model.packed.base._VALUES_AT_ONCE", 200)
    assert torch.equal(Checkpoint(str(saved(kind))).read([NAME], torch.float32)[NAME], whole)


def _set(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.__setitem__(name, value)


FIELDS = {"shape": [64, 128], "blocksize": 64, "dtype": "float32", "quant_type": "nf4"}
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def _text(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "edit", "seen"),
    [
        ("nf4", lambda tensors: tensors.pop(STATE), NAME),
        ("nf4", lambda tensors: tensors.pop(f"{NAME}.absmax"), NAME),
        ("nf4", lambda tensors: tensors.pop(NAME), f"{NAME}.absmax"),
        ("nf4", _set(f"{NAME}.absmax", torch.ones(3)), f"{NAME}.absmax"),
        ("nf4", _set(STATE, _text("{")), STATE),
        ("nf4", _set(STATE, _text('{"shape": [32, 48]}')), STATE),
        ("nf4", _set(NAME, torch.ones(10, 1, dtype=torch.uint8)), NAME),
        ("nf4 twice", lambda tensors: tensors.pop(f"{NAME}.nested_absmax"), NAME),
        ("nf4 twice", _set(f"{NAME}.nested_absmax", torch.ones(0)), f"{NAME}.nested_absmax"),
        ("nf4 twice", _set(f"{NAME}.nested_quant_map", torch.ones(10)), f"{NAME}.nested_quant_map"),
        (
            "nf4",
            _set(STATE, _text(json.dumps({**FIELDS, "blocksize": 0}))),
            STATE,
        ),
        ("nf4", _set(STATE, _text("[]")), STATE),
        ("int8", lambda tensors: tensors.pop(NAME.replace("weight", "SCB")), NAME),
        ("int8", _set(NAME.replace("weight", "SCB"), torch.ones(48)), NAME.replace("weight", "SCB")),
        ("int8", _set(NAME.replace("weight", "weight_format"), torch.tensor(2, dtype=torch.uint8)), NAME),
    ],
)
def test_parts_that_contradict_each_other_are_named(saved, tmp_path, kind, edit, seen):
    folder = change(saved(kind), tmp_path / "copy", edit)
    with raises(UnsupportedModel, file="model.safetensors", key="model.source") as caught:
        ours(folder)
    assert str(caught.value.seen).startswith(seen.rpartition(".")[0])


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="bnb_4bit_quant_type"):
        BitsAndBytes({"bnb_4bit_quant_type": "nf2"})


@pytest.mark.parametrize("shape", [(32, 48), (3, 33), (5, 7)])
def test_rows_that_end_inside_a_block_of_scales(tmp_path, shape):
    """Compared with the formula: bitsandbytes' own kernel for CPUs takes wrong scales for the first of these."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-1, 1, shape[0])[:, None]
    packed, state = quantize_4bit(weight, quant_type="nf4")
    config = {"model_type": "llama", "quantization_config": {"load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    parts = {f"a.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    save_file({"a.weight": packed, **parts}, tmp_path / "model.safetensors")
    pairs = packed.flatten().int()
    numbers = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: weight.numel()]
    wanted = (state.code[numbers] * state.absmax.repeat_interleave(64)[: weight.numel()]).reshape(shape)
    assert torch.equal(Checkpoint(str(tmp_path)).read(["a.weight"], torch.float32)["a.weight"], wanted)

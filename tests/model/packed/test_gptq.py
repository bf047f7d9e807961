"""GPTQ checkpoints give what the formula of its paper gives, number by number."""

from pathlib import Path
from typing import Any

import pytest
import torch

from petals_tune.errors import UnsupportedModel
from petals_tune.model.packed.gptq import GPTQ
from tests.packed_models import change, ours, repacked, words_of
from tests.raising import raises

NAME = "model.layers.1.mlp.down_proj"
WANTED: dict[str, torch.Tensor] = {}


def packed_model(
    plain: Path, folder: Path, *, bits: int = 4, size: int = 16, stored_as: str = "gptq", by_activation: bool = False
) -> Path:
    """Write the model of `plain` with random whole numbers for weights; WANTED has what they mean."""
    torch.manual_seed(0)

    def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs, inputs = weight.shape
        groups = inputs // size if size > 0 else 1
        numbers = torch.randint(0, 2**bits, (inputs, outputs))
        zeros, scales = torch.randint(1, 2**bits, (groups, outputs)), torch.rand(groups, outputs).half() / 16
        group_of = torch.arange(inputs) // size if size > 0 else torch.zeros(inputs, dtype=torch.int64)
        if by_activation:
            group_of = group_of[torch.randperm(inputs)]
        WANTED[name] = torch.tensor(
            [
                [((numbers[i, o] - zeros[g, o]).half() * scales[g, o]).item() for i, g in enumerate(group_of.tolist())]
                for o in range(outputs)
            ]
        )
        return {
            name.replace("weight", "qweight"): words_of(numbers.T, bits).T,
            name.replace("weight", "qzeros"): words_of(zeros - int(stored_as == "gptq"), bits),
            name.replace("weight", "scales"): scales,
            name.replace("weight", "g_idx"): group_of.to(torch.int32),
        }

    options = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": stored_as}
    WANTED.clear()
    return repacked(plain, folder, options, pack, lambda name, _: name == f"{NAME}.weight")


@pytest.fixture
def plain(model_folder) -> Path:
    return model_folder("llama", num_hidden_layers=2)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"by_activation": True},
        {"stored_as": "gptq_v2"},
        {"bits": 8},
        {"bits": 2, "size": -1},
    ],
    ids=str,
)
def test_weights_are_the_formulas(plain, tmp_path, how):
    found = ours(packed_model(plain, tmp_path / "gptq", **how))
    for name, wanted in WANTED.items():
        assert torch.equal(found[name], wanted)
    assert WANTED


def test_without_the_groups_of_inputs_they_are_in_order(plain, tmp_path):
    packed_model(plain, tmp_path / "gptq")
    folder = change(tmp_path / "gptq", tmp_path / "copy", lambda tensors: tensors.pop(f"{NAME}.g_idx"))
    assert torch.equal(ours(folder)[f"{NAME}.weight"], WANTED[f"{NAME}.weight"])


def _set(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("edit", "seen"),
    [
        (lambda tensors: tensors.pop(f"{NAME}.scales"), f"{NAME}.qweight"),
        (_set(f"{NAME}.scales", torch.ones(2, 32)), f"{NAME}.scales"),
        (_set(f"{NAME}.qzeros", torch.ones(3, 8, dtype=torch.int32)), f"{NAME}.qzeros"),
        (_set(f"{NAME}.g_idx", torch.ones(4, dtype=torch.int32)), f"{NAME}.g_idx"),
        (_set(f"{NAME}.g_idx", torch.full((48,), 3, dtype=torch.int32)), f"{NAME}.qweight"),
        (_set(f"{NAME}.qweight", torch.ones(6, 32)), f"{NAME}.qweight"),
        (_set(f"{NAME}.qzeros", torch.ones(3, 4)), f"{NAME}.qzeros"),
    ],
)
def test_parts_that_contradict_each_other_are_named(plain, tmp_path, edit, seen):
    folder = change(packed_model(plain, tmp_path / "gptq"), tmp_path / "copy", edit)
    with raises(UnsupportedModel, file="model.safetensors", key="model.source") as caught:
        ours(folder)
    assert str(caught.value.seen).startswith(NAME)


@pytest.mark.parametrize("options", [{"bits": 3}, {"checkpoint_format": "marlin"}, {"dynamic": {"+:.*": {"bits": 8}}}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GPTQ(options)

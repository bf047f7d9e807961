"""AWQ checkpoints give what its formula gives, number by number."""

from pathlib import Path
from typing import Any

import pytest
import torch

from petals_tune.errors import UnsupportedModel
from petals_tune.model.packed.awq import AWQ
from tests.packed_models import change, ours, repacked
from tests.raising import raises

NAME = "model.layers.1.mlp.down_proj"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # a word has these outputs, from its lowest bits on
WANTED: dict[str, torch.Tensor] = {}


def words(numbers: torch.Tensor) -> torch.Tensor:
    packed = [
        [
            sum(int(row[start + output]) << 4 * place for place, output in enumerate(ORDER))
            for start in range(0, len(row), 8)
        ]
        for row in numbers
    ]
    return torch.tensor(packed, dtype=torch.int64).to(torch.int32)


def packed_model(plain: Path, folder: Path, size: int = 16) -> Path:
    """Write the model of `plain` with random whole numbers for weights; WANTED has what they mean."""
    torch.manual_seed(0)

    def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs, inputs = weight.shape
        groups = inputs // size if size > 0 else 1
        numbers, zeros = torch.randint(0, 16, (inputs, outputs)), torch.randint(0, 16, (groups, outputs))
        scales = torch.rand(groups, outputs).half() / 16
        WANTED[name] = torch.tensor(
            [
                [
                    ((numbers[i, o] - zeros[g, o]).half() * scales[g, o]).item()
                    for i in range(inputs)
                    for g in [i * groups // inputs]
                ]
                for o in range(outputs)
            ]
        )
        return {
            name.replace("weight", "qweight"): words(numbers),
            name.replace("weight", "qzeros"): words(zeros),
            name.replace("weight", "scales"): scales,
        }

    WANTED.clear()
    options = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    return repacked(plain, folder, options, pack, lambda name, _: name == f"{NAME}.weight")


@pytest.fixture
def plain(model_folder) -> Path:
    return model_folder("llama", num_hidden_layers=2)


@pytest.mark.parametrize("size", [16, -1])
def test_weights_are_the_formulas(plain, tmp_path, size):
    found = ours(packed_model(plain, tmp_path / "awq", size))
    for name, wanted in WANTED.items():
        assert torch.equal(found[name], wanted)
    assert WANTED


def _set(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: tensors.pop(f"{NAME}.scales"),
        _set(f"{NAME}.scales", torch.ones(2, 32)),
        _set(f"{NAME}.qzeros", torch.ones(3, 8, dtype=torch.int32)),
        _set(f"{NAME}.qweight", torch.ones(48, 4)),
    ],
)
def test_parts_that_contradict_each_other_are_named(plain, tmp_path, edit):
    folder = change(packed_model(plain, tmp_path / "awq"), tmp_path / "copy", edit)
    with raises(UnsupportedModel, file="model.safetensors", key="model.source") as caught:
        ours(folder)
    assert str(caught.value.seen).startswith(NAME)


@pytest.mark.parametrize("options", [{"bits": 3}, {"version": "gemv"}, {"zero_point": False}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AWQ(options)

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from petals_tune.adapters.base import expert_parameters
from petals_tune.blocks.experts.reading import ExpertReader
from petals_tune.blocks.loading import load_blocks
from petals_tune.errors import UnsupportedModel
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.families import placeholder_model
from petals_tune.wire.span import BlockSpan
from tests.mixtures import EXPERTS, MIXTURES
from tests.raising import raises

FAMILIES = [name if name == "qwen3_moe" else pytest.param(name, marks=pytest.mark.slow) for name in MIXTURES]


class Watched:
    """A stored tensor that counts the bytes which were read of it and are still in memory."""

    live = most = 0

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self.shape = tensor, tuple(tensor.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        part = self._tensor[index].clone()
        Watched.live += part.nbytes
        Watched.most = max(Watched.most, Watched.live)
        weakref.finalize(part, Watched._gone, part.nbytes)
        return part

    @classmethod
    def _gone(cls, size_bytes: int) -> None:
        Watched.live -= size_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_each_experts_matrix_is_that_of_the_librarys_parameter_and_read_alone(mixture_folder, family, monkeypatch):
    folder = mixture_folder(family)
    model, config = AutoModel.from_pretrained(folder), Checkpoint(str(folder)).config
    shapes = {
        f"{path}.{each.name}": each.shape
        for path, module in model.named_modules()
        for each in expert_parameters(module)
    }
    tensors = load_file(folder / "model.safetensors")
    found = ExpertReader(placeholder_model(config)).find(tensors, shapes)
    assert found.keys() == shapes.keys()
    assert shapes
    for parameter, stored in found.items():
        whole = model.get_parameter(parameter).view(shapes[parameter])
        assert not stored.lacks(EXPERTS)
        for expert in (0, EXPERTS - 1):
            monkeypatch.setattr(Watched, "most", 0)
            watched = {name: Watched(tensor) for name, tensor in tensors.items()}
            matrix = stored.read(expert, watched, shapes[parameter], config)
            assert torch.equal(matrix, whole[expert])
            assert 0 < Watched.most <= matrix.nbytes
            del matrix


def changed(folder: Path, into: Path, change: Any) -> Checkpoint:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (into / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(str(into))


def test_an_expert_that_is_not_there_is_named(mixture_folder, tmp_path):
    lost = "layers.1.mlp.experts.3.down_proj.weight"
    source = changed(mixture_folder("qwen3_moe"), tmp_path, lambda tensors: tensors.pop(lost))
    with raises(UnsupportedModel, key="model.source", seen=["mlp.experts.down_proj"]):
        load_blocks(source, BlockSpan(0, 2), quantization="int8", dtype=torch.float32)


def test_experts_of_another_shape_are_refused(mixture_folder, tmp_path):
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = "layers.1.mlp.experts.3.down_proj.weight"
        tensors[name] = tensors[name][:-1].contiguous()

    source = changed(mixture_folder("qwen3_moe"), tmp_path, cut)
    with raises(UnsupportedModel, key="model.source", seen="layers.1.mlp.experts.down_proj"):
        load_blocks(source, BlockSpan(0, 2), quantization="int8", dtype=torch.float32)

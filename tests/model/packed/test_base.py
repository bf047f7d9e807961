"""Packed weights of all formats: what unpacking one takes beside its values, and pieces of any size."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petals_tune.model.packed import FORMATS, PackedTensor
from petals_tune.model.stored import tensors_in
from tests.packed_models import random_parts

MB = 2**20
OUT, IN = 2048, 4096  # of MXFP4, half the outputs in each of two experts


def packed(method: str, folder: Path, rows: int = OUT, columns: int = IN) -> PackedTensor:
    """Make a weight of random parts: (out, in), or (2 experts, in, out) in MXFP4."""
    torch.manual_seed(0)
    options, parts = random_parts(method, rows // 2 if method == "mxfp4" else rows, columns)
    save_file(parts, folder / "model.safetensors")
    stored = tensors_in(folder / "model.safetensors", list(parts))
    how = FORMATS[method](options)
    return PackedTensor(name="a.weight", shape=how.shape_of(stored), dtype=torch.float32, parts=stored, format=how)


class Peak(TorchDispatchMode):
    """The most bytes of tensors at once, of those that operations make meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._live = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        known = {
            each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
        }
        for tensor in (each for each in tree_leaves(output) if isinstance(each, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self._storages:
                self._storages.add(storage._cdata)
                self._live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.bytes = max(self.bytes, self._live)
        return output

    def _gone(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self._live -= size


METHODS = [method for method in FORMATS if method != "mxfp8"]


@pytest.mark.parametrize("method", METHODS)
def test_a_large_weight_takes_its_values_and_a_few_mb(method, tmp_path):
    weight = packed(method, tmp_path)
    with Peak() as peak:
        values = weight[...]
    assert values.shape == weight.shape
    assert values.nbytes <= peak.bytes <= values.nbytes + 20 * MB


@pytest.mark.parametrize("method", METHODS)
def test_pieces_of_any_size_give_the_same_values(method, tmp_path, monkeypatch):
    weight = packed(method, tmp_path, 192, 160)
    whole = weight[...]
    assert whole.unique().numel() > 100
    for values in (1, 700, 5000):
        monkeypatch.setattr("petals_tune.model.packed.base._VALUES_AT_ONCE", values)
        assert torch.equal(weight[...], whole)
    assert torch.equal(weight[1], whole[1])

"""Packed weights of all formats: what unpacking one takes beside its values, and pieces of any size."""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from petals_tune.model.packed import FORMATS, PackedTensor
from petals_tune.model.stored import tensors_in

MB = 2**20
OUT, IN = 2048, 4096
FLOAT8 = torch.float8_e4m3fn


def bits(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    size = torch.empty((), dtype=dtype).itemsize
    return torch.randint(0, 120, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(dtype)


def packed(method: str, folder: Path, rows: int = OUT, columns: int = IN) -> PackedTensor:
    """Make a weight of random parts: (out, in), or (2 experts, in, out / 2) in MXFP4."""
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    parts: Mapping[str, torch.Tensor]
    if method == "fp8":
        parts = {"weight": bits(rows, columns, dtype=FLOAT8), "scale": torch.rand(-(-rows // 128), -(-columns // 128))}
    elif method == "mxfp4":
        shape = (2, rows // 2, columns // 32)
        parts = {"blocks": bits(*shape, 16, dtype=torch.uint8), "scales": bits(*shape, dtype=torch.uint8)}
    elif method == "compressed-tensors":
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
        options = {"config_groups": {"group_0": {"weights": weights}}}
        parts = {
            "words": bits(rows, columns // 8),
            "scale": torch.rand(rows, columns // 32).bfloat16(),
            "shape": torch.tensor([rows, columns]),
        }
    elif method == "bitsandbytes":
        parts = {"weight": bits(rows, columns, dtype=torch.int8), "SCB": torch.rand(rows)}
    else:
        by_words = (columns // 8, rows) if method == "gptq" else (columns, rows // 8)
        groups = -(-columns // 128)
        parts = {"words": bits(*by_words), "zeros": bits(groups, rows // 8), "scales": torch.rand(groups, rows).half()}
    save_file({role: part.contiguous() for role, part in parts.items()}, folder / "model.safetensors")
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
    assert values.numel() == OUT * IN
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

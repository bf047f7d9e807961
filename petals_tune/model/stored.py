"""Tensors in safetensors files, read when they are indexed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from petals_tune.errors import UnsupportedModel

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file. Indexing reads it, with `...` all of it; a floating one as `dtype` (None: as stored).

    transformers accepts a state dict of these and reads each one when it needs it.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: str  # dtype by safetensors' names: "BF16", "F8_E4M3", "I32"
    dtype: torch.dtype | None = None

    def __getitem__(self, index: Any) -> torch.Tensor:
        with opened(self.path) as file:  # not kept open: pages read from a mapped file count as memory
            tensor = file.get_tensor(self.name)[index]
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def unfit(self, what: str) -> UnsupportedModel:
        """Make the error for this tensor, of which `what` says what is wrong."""
        return UnsupportedModel(
            f"{self.path} is damaged or contradicts config.json: {self.name}, {self.kind} {self.shape}, {what}",
            file=self.path.name,
            key="model.source",
            seen=self.name,
        )


def tensors_in(path: Path, names: Sequence[str], dtype: torch.dtype | None = None) -> dict[str, StoredTensor]:
    """Describe tensors of one file; none is read. Raises UnsupportedModel where the file lacks one."""
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in names}
        return {
            name: StoredTensor(
                path=path, name=name, shape=tuple(found.get_shape()), kind=str(found.get_dtype()), dtype=dtype
            )
            for name, found in slices.items()
        }


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; its errors are raised as UnsupportedModel."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UnsupportedModel(f"{path} is damaged or does not fit its index: {error}", file=path.name) from None

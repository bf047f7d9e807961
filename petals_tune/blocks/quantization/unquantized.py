"""`none`: weights as they are in the checkpoint, in the dtype of the computation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from petals_tune.blocks.quantization.base import Quantization

if TYPE_CHECKING:
    import torch
    from torch import nn


class Unquantized(Quantization):
    name: ClassVar[str] = "none"

    def loading_config(self, dtype: torch.dtype) -> None:
        return None

    def weight_bytes(self, inputs: int, outputs: int, dtype: torch.dtype) -> float:
        return inputs * outputs * dtype.itemsize

    def weight_copies(self, device: str) -> int:
        return 2 if device == "cpu" else 1  # kernels.FloatLinear keeps a weight a second time, in oneDNN's layout

    def scales(self, weight: nn.Parameter) -> list[torch.Tensor]:
        return []

    def quantize_matrix(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return matrix, matrix.new_empty(0)

    def multiply(
        self, x: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        from petals_tune.blocks.kernels import FrozenProduct

        return FrozenProduct.apply(x, None, lambda: numbers)

    def is_available(self, device: str) -> bool:
        return True

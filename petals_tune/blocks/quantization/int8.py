"""`int8`: 8 bits a weight by bitsandbytes, with a float32 scale for each output. Activations are not quantized.

Source: Dettmers et al. 2022, arXiv:2208.07339, without its outliers: they are for quantized activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from petals_tune.blocks.quantization.base import Quantization

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig


class Int8(Quantization):
    name: ClassVar[str] = "int8"

    def loading_config(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        from petals_tune.blocks.quantization.int8_loading import QuantizeByRowsConfig

        return QuantizeByRowsConfig(load_in_8bit=True, llm_int8_threshold=0.0)

    def stored_config(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)

    def weight_bytes(self, inputs: int, outputs: int, dtype: torch.dtype) -> float:
        return inputs * outputs + 4 * outputs

    def scales(self, weight: nn.Parameter) -> list[torch.Tensor]:
        scale = getattr(weight, "SCB", None)
        return [] if scale is None else [scale]

    def quantize_matrix(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from petals_tune.blocks.quantization.int8_loading import quantize_by_rows

        return quantize_by_rows(matrix)

    def multiply(
        self, x: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        from petals_tune.blocks.quantization.int8_linear import int8_product

        return int8_product(x, numbers, scales)

    def keeps_hidden_input(self, module: nn.Module) -> bool:
        from bitsandbytes.nn.modules import Linear8bitLt

        return type(module) is Linear8bitLt  # on `ctx`; Int8Linear keeps nothing

    def fast_class(self, linear: nn.Linear) -> type[nn.Linear] | None:
        from bitsandbytes.nn.modules import Linear8bitLt

        from petals_tune.blocks.quantization.int8_linear import Int8Linear

        return Int8Linear if isinstance(linear, Linear8bitLt) else None

"""Quantization to 8 bits while transformers loads a model, some rows at a time.

On a CPU, bitsandbytes quantizes a whole matrix at once, with four more copies of it in memory in 16 bits; for a GPU,
transformers takes each matrix back to the CPU first. transformers
takes quantizers of others by name (`register_quantizer`); this one differs from its own in that operation alone.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn.modules import Int8Params
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb8bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

_METHOD = "petals_tune_int8_by_rows"
_WEIGHTS_AT_ONCE = 2**20


class QuantizeByRowsConfig(BitsAndBytesConfig):
    """transformers' configuration, which chooses the quantizer below."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.quant_method: Any = _METHOD


def quantize_by_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `matrix` (out, in) as bitsandbytes does: (int8 numbers (out, in), float32 scales (out,))."""
    quantized = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    scales = matrix.new_empty(len(matrix), dtype=torch.float32)
    rows = max(1, _WEIGHTS_AT_ONCE // matrix.shape[1])
    for part, into, scale in zip(matrix.split(rows), quantized.split(rows), scales.split(rows), strict=True):
        values, row_scales, _ = int8_vectorwise_quant(part.to(torch.float16).contiguous())
        into.copy_(values)
        scale.copy_(row_scales)
    return quantized, scales


class _QuantizeByRows(Bnb8bitQuantize):
    """The operation on one weight, which transformers calls once it has read it."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        result = {}
        for name, value in input_dict.items():
            weight: torch.Tensor = value[0] if isinstance(value, list) else value
            module = kwargs["model"].get_submodule(name.rpartition(".")[0])
            if issubclass(module.source_cls, Conv1D):  # which stores (in, out)
                weight = weight.T
            numbers, scales = quantize_by_rows(weight)
            result[name] = Int8Params(numbers, requires_grad=False, CB=numbers, SCB=scales)
        return result


@register_quantizer(_METHOD)
class _Quantizer(Bnb8BitHfQuantizer):
    def get_quantize_ops(self) -> _QuantizeByRows:
        return _QuantizeByRows(self)

"""`nf4`: 4 bits a weight by bitsandbytes, in the NormalFloat type, with a float32 scale for 64 weights.

Source: Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from petals_tune.blocks.quantization.base import Quantization

_WEIGHTS_PER_SCALE = 64  # bitsandbytes' default

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

_WEIGHTS_AT_ONCE = 2**20  # on a CPU, bitsandbytes has five copies of what it quantizes


class NF4(Quantization):
    name: ClassVar[str] = "nf4"

    def loading_config(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)

    def weight_bytes(self, inputs: int, outputs: int, dtype: torch.dtype) -> float:
        weights = inputs * outputs
        return weights / 2 + 4 * weights / _WEIGHTS_PER_SCALE

    def scales(self, weight: nn.Parameter) -> list[torch.Tensor]:
        state = getattr(weight, "quant_state", None)
        return [] if state is None else [state.absmax]

    def quantize_matrix(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch
        from bitsandbytes.functional import quantize_4bit

        parts = [
            quantize_4bit(part, blocksize=_WEIGHTS_PER_SCALE, quant_type="nf4")
            for part in matrix.reshape(-1).split(_WEIGHTS_AT_ONCE)
        ]
        return torch.cat([packed.view(-1) for packed, _ in parts]), torch.cat([state.absmax for _, state in parts])

    def multiply(
        self, x: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        from petals_tune.blocks.kernels import FrozenProduct
        from petals_tune.blocks.quantization.nf4_linear import unpack_nf4

        dtype = x.dtype  # a lambda that holds x itself would keep it for the backward
        return FrozenProduct.apply(x, None, lambda: unpack_nf4(numbers, scales, shape, dtype, group=_WEIGHTS_PER_SCALE))

    def fast_class(self, linear: nn.Linear) -> type[nn.Linear] | None:
        from bitsandbytes.nn.modules import Linear4bit

        from petals_tune.blocks.quantization.nf4_linear import NF4Linear

        if not isinstance(linear, Linear4bit):
            return None
        # On a GPU, bitsandbytes' own linear has a kernel for one row, whose rows are whole groups of weights.
        on_gpu = linear.weight.device.type == "cuda" and linear.in_features % _WEIGHTS_PER_SCALE == 0
        return None if on_gpu else NF4Linear

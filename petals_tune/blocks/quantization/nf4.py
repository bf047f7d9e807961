"""`nf4`: 4 bits a weight by bitsandbytes, in the NormalFloat type, with a float32 scale for 64 weights.

Source: Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from petals_tune.blocks.quantization.base import Quantization

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

_WEIGHTS_PER_SCALE = 64  # bitsandbytes' default


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

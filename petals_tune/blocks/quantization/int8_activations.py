"""`int8_activations`: weights as in int8, and activations in 8 bits too, so that products are of integers.

Faster on GPUs, whose units for 8-bit integers do the product, and less exact than int8, whose activations stay as they
are. No client uses such servers unless it names the scheme.
Source: Dettmers et al. 2022, arXiv:2208.07339 (vector-wise quantization), without its outliers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from petals_tune.blocks.quantization.int8 import Int8

if TYPE_CHECKING:
    import torch
    from torch import nn


class Int8Activations(Int8):
    name: ClassVar[str] = "int8_activations"
    stored_as: ClassVar[str] = "int8"
    on_request: ClassVar[bool] = True

    def multiply(
        self, x: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        from petals_tune.blocks.quantization.int8_activations_linear import integer_product

        return integer_product(x, numbers, scales)

    def is_available(self, device: str) -> bool:
        return device.partition(":")[0] in ("cpu", "cuda")

    def fast_class(self, linear: nn.Linear) -> type[nn.Linear] | None:
        from bitsandbytes.nn.modules import Linear8bitLt

        from petals_tune.blocks.quantization.int8_activations_linear import Int8ActivationsLinear

        return Int8ActivationsLinear if isinstance(linear, Linear8bitLt) else None

"""bitsandbytes' 8-bit linear with 8-bit weights alone: activations stay as they are, on CPUs and GPUs alike."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear8bitLt

from petals_tune.blocks.kernels import FrozenProduct
from petals_tune.blocks.quantization.int8_digits import is_worth_it, product_by_digits


def int8_product(
    x: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., in) W^T + bias (..., out) for W = diag(scales / 127) C, with C (out, in) int8: (x C^T) scales / 127.

    Few float32 rows without a gradient, as a generation has them, are multiplied without unpacking C (int8_digits.py).
    """
    dtype = x.dtype  # a lambda that holds x itself would keep it for the backward
    if dtype is torch.float16:  # x C^T alone is beyond its range
        return FrozenProduct.apply(x, bias, lambda: numbers.to(dtype) * (scales.to(dtype) / 127)[:, None])
    if torch.is_grad_enabled() or not is_worth_it(x, numbers):
        return FrozenProduct.apply(x, bias, lambda: numbers.to(dtype), lambda: scales.to(dtype) / 127)
    product = product_by_digits(x.reshape(-1, x.shape[-1]), numbers).view(*x.shape[:-1], -1)
    scale = scales.to(dtype) / 127
    return product * scale if bias is None else torch.addcmul(bias.to(dtype), product, scale)


class Int8Linear(Linear8bitLt):
    """A frozen 8-bit linear. Its arithmetic is that of `int8_product`.

    On a CPU, bitsandbytes scales the whole matrix anew in each call, and keeps its input for a gradient that nobody
    wants. On a GPU it casts activations to float16, where those beyond 65,504 are infinite, and quantizes them.
    """

    weight: Any  # bitsandbytes' Int8Params
    state: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.CB is not None:
            self.init_8bit_state()
        return int8_product(x, self.state.CB, self.state.SCB, self.bias)

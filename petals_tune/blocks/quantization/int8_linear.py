"""bitsandbytes' 8-bit linear with 8-bit weights alone: activations stay as they are, on CPUs and GPUs alike."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear8bitLt

from petals_tune.blocks.kernels import FrozenProduct


def int8_product(
    x: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., in) W^T + bias (..., out) for W = diag(scales / 127) C, with C (out, in) int8: (x C^T) scales / 127."""
    dtype = x.dtype  # a lambda that holds x itself would keep it for the backward
    if dtype is torch.float16:  # x C^T alone is beyond its range
        return FrozenProduct.apply(x, bias, lambda: numbers.to(dtype) * (scales.to(dtype) / 127)[:, None])
    return FrozenProduct.apply(x, bias, lambda: numbers.to(dtype), lambda: scales.to(dtype) / 127)


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

"""bitsandbytes' 8-bit linear with 8-bit activations: a product of integers, exact until it is scaled.

Shapes: N vectors (rows x positions), in and out features.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import int8_linear_matmul
from bitsandbytes.nn.modules import Linear8bitLt
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Int8ActivationsLinear(Linear8bitLt):
    """A frozen 8-bit linear that quantizes each vector of its input by the largest value in it.

    Unlike bitsandbytes' own forward, it casts no activation to float16, where those beyond 65,504 are infinite. A
    vector's result depends on nothing that is computed with it: sums of integers have no order.
    """

    weight: Any  # bitsandbytes' Int8Params
    state: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.CB is not None:
            self.init_8bit_state()
        return integer_product(x, self.state.CB, self.state.SCB, self.bias)


def integer_product(
    x: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., in) W^T + bias (..., out), W = diag(scales / 127) numbers, each vector of x rounded to 8 bits."""
    return _IntegerProduct.apply(x, bias, numbers, scales)


class _IntegerProduct(torch.autograd.Function):
    """`integer_product`, differentiable in x alone; the gradient is that of a product with x as it is."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, numbers: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        ctx.weight = numbers, scales
        vectors = x.reshape(-1, x.shape[-1])  # (N, in)
        if not len(vectors):
            return x.new_zeros(*x.shape[:-1], len(numbers))
        vectors = vectors.float()
        steps = (vectors.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        product = int8_linear_matmul((vectors / steps).round().to(torch.int8), numbers)  # (N, out) int32
        output = product.float().mul_(steps).mul_(scales / 127)
        if bias is not None:
            output += bias
        return output.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        numbers, scales = ctx.weight
        weight = numbers.to(grad.dtype) * (scales / 127).to(grad.dtype)[:, None]
        return F.linear(grad, weight.t()), None, None, None

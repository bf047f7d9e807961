"""bitsandbytes' 4-bit linear on a CPU, with its weights unpacked right whatever its number of inputs."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit

from petals_tune.blocks.kernels import FrozenProduct


def unpack_nf4(
    numbers: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, *, group: int
) -> torch.Tensor:
    """The matrix (out, in) of `shape`, from two numbers in each byte and a scale for each `group` of them in a row.

    It is unpacked with a group in a row. With other rows, bitsandbytes 0.50 takes a scale too many for each of them
    on CPUs with AVX-512 where a row of the matrix has 16, 32 or 48 weights more than groups of 64.
    """
    weights = shape[0] * shape[1]
    rows = torch.Size([1, weights] if weights % group else [weights // group, group])
    state = QuantState(absmax=scales, shape=rows, blocksize=group, quant_type="nf4", dtype=dtype)
    return dequantize_4bit(numbers.view(-1, 1), state).view(shape)


class NF4Linear(Linear4bit):
    """A frozen 4-bit linear: x W^T, with W unpacked anew in each direction."""

    weight: Any  # bitsandbytes' Params4bit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, dtype = self.weight, x.dtype  # a lambda that holds x itself would keep it for the backward
        state, shape = weight.quant_state, (self.out_features, self.in_features)
        bias = None if self.bias is None else self.bias.to(dtype)
        return FrozenProduct.apply(
            x, bias, lambda: unpack_nf4(weight.data, state.absmax, shape, dtype, group=state.blocksize)
        )

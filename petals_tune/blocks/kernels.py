"""The library's own functions by faster kernels: the same numbers to float rounding, in fewer passes over memory.

For the CPU alone. torch multiplies float32 matrices with MKL, which on many processors (AMD's, among others) runs at
half the speed of oneDNN, the other library inside torch; which of them is faster here is measured once per process.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn.modules import Linear8bitLt
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Written out in Python in transformers, operation by operation: 15 % of a step of BLOOM on a CPU.
_TANH_GELUS = frozenset({"BloomGelu", "NewGELUActivation", "FastGELUActivation"})

FEW_ROWS = 16  # up to here a product reads the weight once and computes little: its layout in memory decides
_QUANTIZED_AT_ONCE = 2**20  # numbers
_CLEARLY = 0.9  # a library that is not faster than this is not worth a change


_vectorwise_quant = bitsandbytes.functional.int8_vectorwise_quant


def quantize_by_rows(matrix: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """bitsandbytes' quantization to 8 bits, some rows at a time: each row has a scale of its own.

    On a CPU it computes with three times the memory of the matrix otherwise.
    """
    if threshold or matrix.device.type != "cpu":
        return _vectorwise_quant(matrix, threshold)
    quantized = torch.empty_like(matrix, dtype=torch.int8)
    scales = matrix.new_empty(len(matrix), dtype=torch.float32)
    rows = max(1, _QUANTIZED_AT_ONCE // matrix.shape[1])
    for part, into, scale in zip(matrix.split(rows), quantized.split(rows), scales.split(rows), strict=True):
        values, row_scales, _ = _vectorwise_quant(part)
        into.copy_(values)
        scale.copy_(row_scales)
    return quantized, scales, None


bitsandbytes.functional.int8_vectorwise_quant = quantize_by_rows  # type: ignore[assignment]  # it is looked up there


def use_fast_kernels(model: nn.Module) -> None:
    """Replace slow functions of a frozen model, in place: the classes of its modules, so that names and hooks stay."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in _TANH_GELUS:
                setattr(module, name, nn.GELU(approximate="tanh"))
        if not isinstance(module, nn.Linear) or module.weight.device.type != "cpu":
            continue
        if isinstance(module, Linear8bitLt):
            module.__class__ = Int8Linear
        elif type(module) is nn.Linear and module.weight.dtype is torch.float32 and onednn_is_faster():
            module.__class__ = FloatLinear


class FloatLinear(nn.Linear):
    """A frozen float32 linear, by oneDNN. For few rows without a gradient, as a generation has them, its weight is
    kept a second time in oneDNN's own layout: half the time of a token."""

    _packed: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or x.numel() > FEW_ROWS * self.in_features:
            return _FrozenProduct.apply(x, self.bias, lambda: self.weight)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 128)
        return _onednn(x, self._packed, self.bias)


class Int8Linear(Linear8bitLt):
    """A frozen 8-bit linear: W = diag(scale) C with C (out, in) int8, so x W^T = (x C^T) scale.

    bitsandbytes scales the whole matrix anew in each call, and keeps its input for a gradient that nobody wants.
    """

    weight: Any  # bitsandbytes' Int8Params
    state: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.CB is not None:
            self.init_8bit_state()
        state, dtype = self.state, x.dtype  # a lambda that holds x itself would keep it for the backward
        product = _FrozenProduct.apply(x, None, lambda: state.CB.to(dtype))
        scale = state.SCB.to(dtype) / 127
        return product * scale if self.bias is None else torch.addcmul(self.bias.to(dtype), product, scale)


class _FrozenProduct(torch.autograd.Function):
    """x (..., in) -> x W^T + bias (..., out), differentiable in x alone: nothing of the call is kept.

    `weight` gives W (out, in) anew in each direction, where it is stored in another form.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, weight: Callable[[], torch.Tensor]) -> Any:
        ctx.weight = weight
        return _linear(x, weight(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _linear(grad, ctx.weight().t(), None), None, None


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` by the faster library."""
    fast = weight.dtype is torch.float32 and onednn_is_faster()
    return _onednn(x, weight, bias) if fast else F.linear(x, weight, bias)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` by oneDNN. torch has no public name for it; its own compiler calls it so."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def onednn_is_faster() -> bool:
    """Is oneDNN clearly faster than torch's default library here? Takes some 50 ms, once."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.rand(128, 1024), torch.rand(1024, 1024)

    def best_s(linear: Callable[..., torch.Tensor]) -> float:
        seconds = []
        for _ in range(6):
            started_s = time.perf_counter()
            linear(x, weight, None)
            seconds.append(time.perf_counter() - started_s)
        return min(seconds)

    with torch.no_grad():
        return best_s(_onednn) < _CLEARLY * best_s(F.linear)

"""Faster kernels for frozen blocks: transformers' numbers to float rounding.

On a CPU torch multiplies float32 matrices with MKL, which on many processors (AMD's, among others) runs at half the
speed of oneDNN, the other library inside torch. Which of them is faster here is measured once per process, unless it
was chosen with `choose_library`: the two round differently, and where they tie another measurement may take the other.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from petals_tune.blocks.quantization.base import Quantization

# Written out in Python in transformers, operation by operation: 15 % of a step of BLOOM on a CPU.
_TANH_GELUS = frozenset({"BloomGelu", "NewGELUActivation", "FastGELUActivation"})

Library = Literal["oneDNN", "default"]

FEW_ROWS = 16  # up to here a product reads the weight once and computes little: its layout in memory decides
_WORTH_IT = 0.9  # oneDNN is used where it takes less than this share of the default library's time


def use_fast_kernels(model: nn.Module, quantization: Quantization) -> None:
    """Replace slow functions of a frozen model, in place: the classes of its modules, so that names and hooks stay."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in _TANH_GELUS:
                setattr(module, name, nn.GELU(approximate="tanh"))
        if isinstance(module, nn.Linear):
            module.__class__ = quantization.fast_class(module) or _fast_class(module)


def _fast_class(linear: nn.Linear) -> type[nn.Linear]:
    """The class for a linear that is not quantized; its own where there is no faster one."""
    is_float = linear.weight.device.type == "cpu" and linear.weight.dtype is torch.float32
    return FloatLinear if type(linear) is nn.Linear and is_float and matrix_library() == "oneDNN" else type(linear)


class FloatLinear(nn.Linear):
    """A frozen float32 linear, by oneDNN. For few rows without a gradient, as a generation has them, its weight is
    kept a second time in oneDNN's own layout: half the time of a token."""

    _packed: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or x.numel() > FEW_ROWS * self.in_features:
            return FrozenProduct.apply(x, self.bias, lambda: self.weight)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 128)
        return _onednn(x, self._packed, self.bias)


class FrozenProduct(torch.autograd.Function):
    """x (..., in) -> (x W^T) scale + bias (..., out), differentiable in x alone: nothing of the call is kept.

    `weight` gives W (out, in) and `scale` (out,) or nothing, anew in each direction, where they are stored in another
    form.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        weight: Callable[[], torch.Tensor],
        scale: Callable[[], torch.Tensor] | None = None,
    ) -> Any:
        ctx.weight, ctx.scale = weight, scale
        if scale is None:
            return _linear(x, weight(), bias)
        product = _linear(x, weight(), None)
        return product.mul_(scale()) if bias is None else torch.addcmul(bias.to(x.dtype), product, scale())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        scaled = grad if ctx.scale is None else grad * ctx.scale()
        return _linear(scaled, ctx.weight().t(), None), None, None, None


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` by the faster library."""
    on_cpu = weight.device.type == "cpu" and weight.dtype is torch.float32
    fast = on_cpu and matrix_library() == "oneDNN"
    return _onednn(x, weight, bias) if fast else F.linear(x, weight, bias)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` by oneDNN. torch has no public name for it; its own compiler calls it so."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@contextmanager
def without_cudnn_attention(device: torch.device) -> Iterator[None]:
    """Within the block, attention on a GPU is computed by torch's own kernels; afterwards by those that it had before.

    cuDNN makes a plan for each new length: 55 ms for every token of a text, on an H100 with torch 2.11. The setting is
    of the whole process.
    """
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


_chosen: Library | None = None


def choose_library(library: Library | None) -> None:
    """Compute float32 products of this process by `library` from now on; None: by the faster one."""
    global _chosen
    _chosen = library


def matrix_library() -> Library:
    """Return the library that computes float32 products: the chosen one, else the faster one."""
    return _chosen or ("oneDNN" if onednn_is_faster() else "default")


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
        return best_s(_onednn) < _WORTH_IT * best_s(F.linear)

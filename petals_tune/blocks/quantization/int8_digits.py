"""Products of few float32 rows with an int8 matrix, in integers: the matrix is read as it is stored.

Unpacking a matrix to float32 for one row takes longer than multiplying it. So the row is split instead, into three
signed 8-bit digits, whose products with the matrix are sums of integers, without rounding. Source: the splitting of
Ozaki et al. 2012 (doi:10.1007/s11075-011-9478-1), on integer units as by Ootomo et al. 2024 (arXiv:2306.11975).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

_LARGEST = 127.0
_BASE = 250.0  # between digits; at 254, a remainder that was rounded up would be 128, which is no signed 8-bit number
_MOST_INPUTS = 2**31 // 127**2  # of whose products 32 bits hold the sum
_FEWEST_WEIGHTS = 2**18  # of fewer, splitting the row takes longer than unpacking them
_MOST_ROWS = 16
_WORTH_IT = 0.9  # used where it takes less than this share of the time with unpacking
_TINY = 1e-30


def product_by_digits(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x (rows, in) float32 times the transpose of `matrix` (out, in) int8: (rows, out) float32.

    The error is that of rounding x to 2**-23 of the row's largest value. A row's result does not depend on other rows;
    it is not finite where the row is not.
    """
    rows, inputs = x.shape
    largest = x.abs().amax(-1, keepdim=True).clamp_(min=_TINY)
    powers = x.new_tensor([1.0, _BASE, _BASE**2]).view(3, 1, 1)
    rounded = (x * (powers * (_LARGEST / largest))).round_()
    rounded[1:].sub_(rounded[:-1] * _BASE)  # the right side is computed before anything is overwritten
    sums = torch._int_mm(rounded.view(3 * rows, inputs).to(torch.int8), matrix.t())
    first, second, third = sums.view(3, rows, -1).to(torch.float32)
    second.add_(third, alpha=1 / _BASE)
    return first.add_(second, alpha=1 / _BASE).mul_(largest / _LARGEST)


def is_worth_it(x: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Whether `product_by_digits` is the faster way for `x` (..., in) and `matrix`, and exact on this processor."""
    return (
        x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.numel() <= _MOST_ROWS * matrix.shape[1]
        and matrix.numel() >= _FEWEST_WEIGHTS
        and matrix.shape[1] <= _MOST_INPUTS
        and _sums_exactly()
        and _is_faster()
    )


@functools.cache
def _sums_exactly() -> bool:
    """Does this processor sum 8-bit products without saturation?

    Processors without such an instruction (AVX-512 VNNI, AVX-VNNI) add pairs of products in 16 bits.
    """
    digits = torch.full((2, 1024), 127, dtype=torch.int8)
    digits[1] = -127
    matrix = _matrix()
    return torch.equal(torch._int_mm(digits, matrix.t()).long(), digits.long() @ matrix.long().t())


@functools.cache
def _is_faster() -> bool:
    """Is it clearly faster than unpacking here? Takes some 20 ms, once."""
    x, matrix = torch.rand(1, 1024), _matrix()

    def best_s(product: Callable[[], torch.Tensor]) -> float:
        seconds = []
        for _ in range(6):
            started_s = time.perf_counter()
            product()
            seconds.append(time.perf_counter() - started_s)
        return min(seconds)

    with torch.no_grad():
        unpacking_s = best_s(lambda: torch.nn.functional.linear(x, matrix.to(torch.float32)))
        return best_s(lambda: product_by_digits(x, matrix)) < _WORTH_IT * unpacking_s


def _matrix() -> torch.Tensor:
    """The largest products of both signs."""
    matrix = torch.full((1024, 1024), 127, dtype=torch.int8)
    matrix[::2] = -127
    return matrix

"""4-bit linears on a CPU."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit

from petals_tune.blocks.quantization.nf4_linear import NF4Linear, unpack_nf4


def unpacked_by_hand(numbers: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The high half of each byte first; a scale for 64 weights, counted through all rows."""
    levels = get_4bit_type("nf4", device="cpu")
    flat = numbers.flatten().int()
    values = levels[torch.stack([flat >> 4, flat & 15], dim=1).flatten()][: shape[0] * shape[1]]
    return (values * scales.repeat_interleave(64)[: len(values)]).view(shape)


@pytest.mark.parametrize("inputs", [16, 48, 64, 80, 96, 100, 128, 1632])
@pytest.mark.parametrize("outputs", [3, 64])
def test_a_matrix_of_any_shape_is_unpacked(outputs: int, inputs: int) -> None:
    """Rows of very different sizes: a scale of another row would be far off."""
    torch.manual_seed(0)
    matrix = torch.randn(outputs, inputs) * torch.logspace(-3, 3, outputs)[:, None]
    numbers, state = quantize_4bit(matrix, blocksize=64, quant_type="nf4")

    unpacked = unpack_nf4(numbers, state.absmax, (outputs, inputs), torch.float32, group=64)

    assert torch.equal(unpacked, unpacked_by_hand(numbers, state.absmax, (outputs, inputs)))


@pytest.mark.parametrize("inputs", [64, 80])
def test_a_linear_and_its_gradient_are_those_of_the_unpacked_matrix(inputs: int) -> None:
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(inputs, 32, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False)
    linear.weight.data *= torch.logspace(-2, 2, 32)[:, None]
    linear = linear.requires_grad_(False).to("cpu")
    linear.__class__ = NF4Linear
    matrix = unpacked_by_hand(linear.weight.data, linear.weight.quant_state.absmax, (32, inputs))
    x = torch.randn(2, 5, inputs, requires_grad=True)

    linear(x).square().sum().backward()

    again = x.detach().clone().requires_grad_()
    wanted = again @ matrix.t() + linear.bias
    wanted.square().sum().backward()
    assert torch.allclose(linear(x), wanted, rtol=1e-5, atol=1e-4)
    assert torch.allclose(x.grad, again.grad, rtol=1e-5, atol=float(again.grad.abs().max()) * 1e-6)

"""One linear with 8-bit weights and activations, against sums of integers written out."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn.modules import Linear8bitLt

from petals_tune.blocks.quantization.int8_activations_linear import Int8ActivationsLinear

IN, OUT = 96, 40


@pytest.fixture
def linear() -> Linear8bitLt:
    torch.manual_seed(0)
    made = Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=0.0).to("cpu").requires_grad_(False)
    made.__class__ = Int8ActivationsLinear
    return made


def by_hand(linear: Linear8bitLt, vector: torch.Tensor) -> torch.Tensor:
    """(in,) -> (out,) in float64: each number in steps of a 127th of the largest."""
    step = vector.double().abs().max() / 127
    sums = linear.state.CB.long() @ (vector.double() / step).round().long()
    return sums * step * linear.state.SCB.double() / 127 + linear.bias.double()


@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [
        (torch.float32, 1.0, 1e-6),
        (torch.float32, 1e5, 1e-6),
        (torch.float32, 1e-30, 1e-6),
        (torch.bfloat16, 1e5, 2**-8),
        (torch.float16, 100.0, 2**-10),
    ],
)
def test_a_product_is_that_of_integers(linear, dtype, size, tolerance):
    x = (torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(1)) * size).to(dtype)
    found = linear(x)
    assert found.dtype is dtype
    wanted = torch.stack([by_hand(linear, vector) for vector in x.view(-1, IN)]).view(2, 3, OUT)
    assert ((found.double() - wanted).abs() <= tolerance * wanted.abs().amax(-1, keepdim=True)).all()


def test_a_vector_of_zeros_is_the_bias_and_no_vector_is_none(linear):
    assert torch.equal(linear(torch.zeros(2, IN)), linear.bias.expand(2, OUT))
    assert linear(torch.zeros(0, IN)).shape == (0, OUT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_so(linear, value):
    x = torch.ones(2, IN)
    x[1, 5] = value
    found = linear(x)
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()


def test_a_gradient_goes_back_through_the_weights_as_they_are(linear):
    x = torch.randn(3, IN, requires_grad=True)
    grad = torch.randn(3, OUT)
    (found,) = torch.autograd.grad(linear(x), x, grad)
    weight = linear.state.CB.double() * linear.state.SCB.double()[:, None] / 127
    torch.testing.assert_close(found.double(), grad.double() @ weight, rtol=1e-5, atol=1e-5)

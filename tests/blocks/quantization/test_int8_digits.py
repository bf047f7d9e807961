"""Products of few rows with an int8 matrix by integers."""

from __future__ import annotations

import pytest
import torch

from petals_tune.blocks.quantization import int8_digits
from petals_tune.blocks.quantization.int8_digits import is_worth_it, product_by_digits

# Without it the processor saturates, and the product is never used: nothing is to be tested.
exact = pytest.mark.skipif(not int8_digits._sums_exactly(), reason="this processor has no exact 8-bit sums")


def matrix_of(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)


@exact
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e5, 1e30])
def test_a_product_is_that_of_float32(rows: int, scale: float) -> None:
    torch.manual_seed(rows)
    x, matrix = torch.randn(rows, 640) * scale, matrix_of(512, 640)
    wanted = x.double() @ matrix.double().t()

    product = product_by_digits(x, matrix)

    # Each number of a row is off by half a digit in the last place, 127 x 250**2 of which are the row's largest number.
    bound = x.abs().amax(-1, keepdim=True).double() / (127 * 250**2) / 2 * matrix.double().abs().sum(-1)
    assert (product.double() - wanted).abs().le(bound + wanted.abs() * 2**-20).all()
    assert (product.double() - wanted).norm() / wanted.norm() < 1e-6


@exact
def test_one_large_number_leaves_the_others_in_the_sum() -> None:
    """Some positions of a text have a feature a thousand times as large as the rest (arXiv:2402.17762)."""
    torch.manual_seed(0)
    x, matrix = torch.randn(1, 1024), matrix_of(512, 1024)
    x[0, 7] = 3000.0
    wanted = x.double() @ matrix.double().t()

    error, of_float32 = (
        (each.double() - wanted).norm() for each in (product_by_digits(x, matrix), x @ matrix.float().t())
    )
    assert error < 10 * of_float32


@exact
def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(0)
    x, matrix = torch.randn(8, 1024), matrix_of(512, 1024)
    mates = x.clone()
    mates[1:] *= 1e6

    assert torch.equal(product_by_digits(x[:1], matrix), product_by_digits(mates, matrix)[:1])


@exact
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_stay_so(bad: float) -> None:
    x = torch.ones(2, 640)
    x[0, 3] = bad

    product = product_by_digits(x, torch.ones(512, 640, dtype=torch.int8))

    assert not product[0].isfinite().any()
    assert torch.allclose(product[1], torch.full((512,), 640.0))


@exact
def test_rows_of_zeros_give_zeros() -> None:
    assert not product_by_digits(torch.zeros(2, 640), matrix_of(512, 640)).any()


@exact
def test_the_largest_remainders_fit_into_a_digit() -> None:
    """A remainder just beyond a half, once it is rounded, must not become 128, which would wrap to -128."""
    torch.manual_seed(0)
    x = torch.randn(790, 320)
    matrix = torch.eye(320, dtype=torch.int8)
    products = torch.cat([product_by_digits(rows, matrix) for rows in x.split(16)])

    largest = x.abs().amax(-1, keepdim=True)
    assert ((products - x) / largest).abs().max() < 2**-21  # -128 for 128 would be off by 256 / (127 * 250**2): 2**-15


def test_it_is_for_few_float32_rows_of_a_large_matrix_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_sums_exactly", "_is_faster"):
        monkeypatch.setattr(int8_digits, name, lambda: True)
    large = torch.zeros(1024, 1024, dtype=torch.int8)

    assert is_worth_it(torch.zeros(2, 8, 1024), large)
    assert not is_worth_it(torch.zeros(2, 9, 1024), large)
    assert not is_worth_it(torch.zeros(1, 1024, dtype=torch.bfloat16), large)
    assert not is_worth_it(torch.zeros(1, 64), torch.zeros(64, 64, dtype=torch.int8))
    wide = torch.empty(2, 2**18, dtype=torch.int8)  # the sum of its products may not fit into 32 bits
    assert not is_worth_it(torch.zeros(1, 2**18), wide)


def test_a_processor_that_saturates_unpacks(monkeypatch: pytest.MonkeyPatch) -> None:
    exact_sums = torch._int_mm

    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return exact_sums(a, b).clamp(-(2**15), 2**15 - 1)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not int8_digits._sums_exactly.__wrapped__()

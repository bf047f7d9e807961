"""How far two answers are apart, how far honest ones may be, and who is outvoted."""

import itertools
from typing import get_args

import pytest
import torch

from petals_tune.swarm.deviation import (
    COMPUTED,
    Answer,
    Deviation,
    choose_outvoted,
    comparable,
    deviation,
    tolerance,
)
from petals_tune.wire.records import Arithmetic, Dtype
from petals_tune.wire.tensors import WIRE_FORMATS, as_received


def kind(dtype: str = "float32", quantization: str = "none", device: str = "cpu") -> Arithmetic:
    return Arithmetic(quantization=quantization, dtype=dtype, device=device)  # type: ignore[arg-type]


FLOAT32 = [kind()]


def answer(*values: float) -> Answer:
    return Answer(servers=(), tensors=(torch.tensor(values),))


def test_a_third_answer_tells_who_is_wrong_or_that_nobody_knows():
    good, bad, third = answer(1.0), answer(1.01), answer(1.0)
    assert choose_outvoted(bad, good, third, [False, True]) is bad
    assert choose_outvoted(good, bad, third, [True, False]) is bad
    assert choose_outvoted(good, bad, third, [False, False]) is None
    assert choose_outvoted(good, bad, third, [True, True]) is None, "the third one agrees with both"


def rounded(values: torch.Tensor, wire_format: str) -> Answer:
    return Answer(servers=(), tensors=(as_received(values, wire_format),))


@pytest.fixture
def hidden() -> torch.Tensor:
    """Eight rows of 64 positions, like those of a language model: one value of a row outweighs all others together."""
    drawn = torch.randn(8, 64, 96, generator=torch.Generator().manual_seed(0))
    drawn[:, 0, 7] = torch.linspace(700.0, 900.0, 8)
    return drawn


def apart(lie: torch.Tensor, truth: torch.Tensor, wire_format: str) -> Deviation:
    return deviation(rounded(lie, wire_format), rounded(truth, wire_format))


@pytest.mark.parametrize("wire_format", WIRE_FORMATS)
@pytest.mark.parametrize("dtypes", COMPUTED, ids=lambda each: "+".join(sorted(each)))
def test_honest_answers_are_within_the_tolerance_of_every_format(hidden, dtypes, wire_format):
    norms = hidden.norm(dim=-1, keepdim=True)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)) * norms / hidden.shape[-1] ** 0.5
    found = apart(hidden, hidden + 0.5 * COMPUTED[dtypes] * noise, wire_format)
    assert found.within(tolerance(map(kind, dtypes), [wire_format])), found


@pytest.mark.parametrize("wire_format", WIRE_FORMATS)
def test_honest_answers_of_a_chain_with_one_more_cut_are_within_its_tolerance(hidden, wire_format):
    inside = as_received(hidden, wire_format)
    found = apart(2 * inside, 2 * hidden, wire_format)
    assert found.within(tolerance(FLOAT32, [wire_format], cuts=1)), found


# The share of 8 rows x 64 positions that is scaled, and by how much, at the least, in each format.
EVERYWHERE, ONE_ROW, ONE_POSITION = (slice(None), slice(None)), (3, slice(None)), (3, 40)
FOUND = [
    *[("float32", where, 1.0011) for where in (EVERYWHERE, ONE_ROW, ONE_POSITION)],
    *[("float16", where, 1.003) for where in (EVERYWHERE, ONE_ROW, ONE_POSITION)],
    *[("bfloat16", where, 1.006) for where in (EVERYWHERE, ONE_ROW)],
    ("bfloat16", ONE_POSITION, 1.012),
    *[("blockwise8", where, 1.01) for where in (EVERYWHERE, ONE_ROW)],
    ("blockwise8", ONE_POSITION, 1.03),
]


@pytest.mark.parametrize(("wire_format", "where", "factor"), FOUND, ids=str)
def test_a_lie_about_everything_one_row_or_one_position_is_beyond_the_tolerance(hidden, wire_format, where, factor):
    lie = hidden.clone()
    lie[where] *= factor
    found = apart(lie, hidden, wire_format)
    assert not found.within(tolerance(FLOAT32, [wire_format])), found


def test_each_measure_sees_what_the_others_do_not(hidden):
    one_position, one_row, one_value = (hidden.clone() for _ in range(3))
    one_position[0, 5] *= 1.1
    one_row[2] *= 1.1
    one_value[0, 0, 7] *= 1.1
    assert apart(one_position, hidden, "float32").furthest == pytest.approx(0.1)
    assert apart(one_position, hidden, "float32").typical == 0
    assert apart(one_position, hidden, "float32").largest < 1e-3
    assert apart(one_row, hidden, "float32").typical == pytest.approx(0.1)
    assert apart(one_value, hidden, "float32").largest == pytest.approx(0.1, rel=0.3)


def test_positions_without_a_gradient_are_equal_and_those_with_next_to_none_count_little():
    nothing = torch.zeros(1, 10, 4)
    assert apart(nothing, nothing, "float32") == Deviation(largest=0.0, typical=0.0, furthest=0.0)
    assert apart(nothing + 1e-3, nothing, "float32").furthest > 1
    grad = torch.ones(1, 10, 4)
    grad[0, 0] = 1e-6  # what remains of larger numbers
    noisy = grad.clone()
    noisy[0, 0] += 1e-6
    assert apart(noisy, grad, "float32").furthest < 1e-3
    lie = grad.clone()
    lie[0, 0] += 1e-3
    assert apart(lie, grad, "float32").furthest > 0.05


def test_gradients_near_the_smallest_numbers_of_float16_are_compared_with_what_it_can_hold():
    grad = torch.full((1, 16, 576), 2e-5)
    noisy = rounded(grad + 1e-6, "float32")  # 5 %, and 16 of the smallest steps
    assert not deviation(noisy, rounded(grad, "float32"), ["bfloat16"]).within(
        Deviation(largest=1, typical=0.03, furthest=1)
    )
    assert deviation(noisy, rounded(grad, "float32"), ["float16"]).within(tolerance([kind("float16")], ["float32"]))
    lie = rounded(grad * 1.5, "float32")
    assert not deviation(lie, rounded(grad, "float32"), ["float16"]).within(tolerance([kind("float16")], ["float32"]))


def test_an_adapters_gradient_counts_as_one_vector():
    gradient = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    gradient[1, 3] = 1e-9
    noisy = gradient + 1e-6
    assert apart(noisy, gradient, "float32").within(tolerance(FLOAT32, ["float32"]))
    found = apart(gradient * 1.01, gradient, "float32")
    assert found.typical == pytest.approx(0.01, rel=1e-3)
    assert found.furthest == pytest.approx(0.01, rel=1e-3)


def test_every_pair_of_dtypes_has_a_limit_and_the_widest_pair_counts():
    dtypes = get_args(Dtype)
    assert set(COMPUTED) == {frozenset(pair) for pair in itertools.combinations_with_replacement(dtypes, 2)}

    def limit(*kinds: Arithmetic) -> float:
        return tolerance(kinds, ["float32"]).typical

    assert limit(kind()) == limit(kind(device="cuda"), kind()) < limit(kind("float16")) < limit(kind("bfloat16"))
    mixed = limit(kind("bfloat16"), kind())
    assert limit(kind("bfloat16")) < mixed == limit(kind("bfloat16"), kind(), kind("float16"))
    assert limit(kind("bfloat16", "int8"), kind(quantization="int8")) == mixed
    assert limit(kind("bfloat16", "nf4"), kind(quantization="nf4")) > mixed, "its weights are rounded to the dtype"
    assert limit(kind(quantization="nf4"), kind(quantization="nf4", device="cuda")) == limit(kind())
    assert limit(kind(quantization="int8_activations")) > mixed, "what is rounded to 8 bits jumps by a step"


def test_only_servers_of_the_same_weights_check_each_other():
    assert comparable(kind("float32", "int8"), kind("bfloat16", "int8", "cuda"))
    for other in ("none", "nf4", "int8_activations"):
        assert not comparable(kind(quantization="int8"), kind(quantization=other))

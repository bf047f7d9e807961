import contextlib
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petals_tune.errors import ProtocolError
from petals_tune.wire.tensors import WIRE_FORMATS, encoded_bytes, from_bytes, in_dtype, in_format, to_bytes
from tests.raising import raises

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
SHAPES = [(), (1,), (0,), (7,), (3, 5), (2, 0, 4), (2, 3, 4), (1, 2, 3, 4)]


def sent(tensor: torch.Tensor) -> torch.Tensor:
    return from_bytes(memoryview(to_bytes(tensor)))


def some(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_comes_out_as_it_went_in(dtype, shape):
    tensor = some(shape, dtype)
    back = sent(tensor)
    assert back.dtype is dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("wire_format", WIRE_FORMATS)
def test_a_tensor_that_is_not_contiguous_is_sent_by_its_values(wire_format):
    tensor = torch.randn(4, 6, 8)[:, ::2].transpose(0, 2)
    assert not tensor.is_contiguous()
    assert torch.equal(sent(in_format(tensor, wire_format)), sent(in_format(tensor.contiguous(), wire_format)))


def test_special_floats_are_carried_bit_for_bit():
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    assert torch.equal(sent(tensor).view(torch.int32), tensor.view(torch.int32))


def test_what_comes_out_has_memory_of_its_own():
    data = bytearray(to_bytes(torch.zeros(4)))
    back = from_bytes(memoryview(data))
    back += 1
    assert torch.equal(from_bytes(memoryview(data)), torch.zeros(4))


def test_a_gradient_is_not_carried():
    assert not sent(torch.ones(2, requires_grad=True)).requires_grad
    assert not in_format(torch.ones(2, requires_grad=True), "float32").requires_grad


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, 4), *(in_format(torch.zeros(3, 4), name) for name in ("blockwise8", "float16"))],
    ids=["plain", "8bit", "scaled"],
)
@pytest.mark.parametrize("change", [-1, 1, 4, -4])
def test_a_wrong_length_is_refused(tensor, change):
    data = to_bytes(tensor)
    wrong = data + bytes(change) if change > 0 else data[:change]
    with raises(ProtocolError, what="tensor"):
        from_bytes(memoryview(wrong))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="no whole header"),
        pytest.param(b"\x00", id="no whole header"),
        pytest.param(struct.pack(">BBI", 0, 2, 1), id="no whole header"),
        pytest.param(struct.pack(">BB5I", 0, 5, 1, 1, 1, 1, 1) + bytes(4), id="no whole header"),
        pytest.param(struct.pack(">BB", 7, 0) + bytes(4), id="unknown dtype code 7"),
        pytest.param(struct.pack(">BBI", 6, 1, 3) + b"\x00\x01\x02", id="bool"),
        pytest.param(struct.pack(">BB4I", 0, 4, *[2**32 - 1] * 4), id="larger than any memory"),
        pytest.param(struct.pack(">BB4I", 0, 4, 0, *[2**32 - 1] * 3), id="larger than any memory"),
        pytest.param(struct.pack(">BB4I", 255, 4, 0, *[2**32 - 1] * 3), id="larger than any memory"),
        pytest.param(struct.pack(">BB4I", 254, 4, 0, *[2**32 - 1] * 3), id="larger than any memory"),
        pytest.param(struct.pack(">BBIbe", 254, 1, 1, 127, 1.0), id="scale"),
        pytest.param(struct.pack(">BBIbe", 254, 1, 1, -127, 1.0), id="scale"),
        pytest.param(struct.pack(">BB2I", 0, 2, 2**20, 2**20), id="bytes, not 0"),
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_taken(data):
    with raises(ProtocolError, what="tensor"):
        from_bytes(memoryview(data))


@given(st.binary(max_size=64))
def test_any_bytes_are_a_tensor_or_a_protocol_error(data):
    with contextlib.suppress(ProtocolError):
        assert isinstance(from_bytes(memoryview(data)), torch.Tensor)


# Half of a step, 1/127 of the largest value, and what bfloat16 takes from the step; over all values together 0.5 %.
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4095,), (4096,), (4097,), (2, 3, 5000)], ids=str)
def test_eight_bits_err_by_half_a_percent_of_the_largest_of_the_32_values(shape):
    tensor = torch.randn(shape)
    tensor.flatten()[::64] *= 1000  # a value that is much larger than the others takes from 31 neighbours alone
    back = sent(in_format(tensor, "blockwise8"))
    assert back.dtype is torch.float32
    assert back.shape == tensor.shape
    width = shape[-1] if shape else 1
    for value, vector in zip(back.reshape(-1, width), tensor.reshape(-1, width), strict=True):
        for got, sent_block in zip(value.split(32), vector.split(32), strict=True):
            assert (got - sent_block).abs().max() <= 0.004 * sent_block.abs().max()


def test_eight_bits_of_normal_values_err_by_half_a_percent_in_all():
    tensor = torch.randn(4, 128, 512, generator=torch.Generator().manual_seed(0))
    back = sent(in_format(tensor, "blockwise8"))
    assert 0.003 < torch.linalg.vector_norm(back - tensor) / torch.linalg.vector_norm(tensor) < 0.006
    assert abs((back - tensor).mean()) < 5e-5 * tensor.std()


def test_what_was_decoded_from_eight_bits_is_encoded_to_the_same_bytes():
    tensor = torch.randn(3, 5, 100) * torch.logspace(-30, 30, 5)[:, None]
    once = to_bytes(in_format(tensor, "blockwise8"))
    assert to_bytes(in_format(from_bytes(memoryview(once)), "blockwise8")) == once


def test_eight_bits_are_about_a_quarter_of_float32():
    tensor = torch.randn(4, 128, 512)
    assert len(to_bytes(in_format(tensor, "blockwise8"))) < 0.267 * len(to_bytes(tensor))


def test_eight_bits_know_an_empty_tensor():
    assert sent(in_format(torch.zeros(2, 0, 3), "blockwise8")).shape == (2, 0, 3)


@pytest.mark.parametrize("wire_format", WIRE_FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_numbers_stay_non_finite_so_that_the_receiver_can_refuse_them(wire_format, value):
    tensor = torch.ones(5000)
    tensor[4321] = value
    assert not torch.isfinite(sent(in_format(tensor, wire_format))).all()


@pytest.mark.parametrize("wire_format", WIRE_FORMATS)
def test_a_format_casts_from_any_float(wire_format):
    tensor = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(sent(in_format(tensor, wire_format)).double(), tensor, atol=0.03, rtol=0.01)


# A float16 has 11 significant bits; in a vector, what is 2**29 times smaller than its largest value loses some of them.
@pytest.mark.parametrize("size", [2.0**exponent for exponent in (-120, -60, -24, -3, 0, 15, 17, 60, 120)])
def test_scaled_float16_keeps_eleven_bits_of_any_size(size):
    tensor = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0)) * size
    back = sent(in_format(tensor, "float16"))
    assert back.dtype is torch.float32
    small = tensor.abs() < tensor.abs().amax(dim=2, keepdim=True) * 2.0**-29
    assert not small.any()
    assert ((back - tensor).abs() <= tensor.abs() * 2.0**-11).all()


def test_scaling_is_exact_where_float16_is():
    values = torch.tensor([[1.0, -3.0, 0.0, 0.5], [1.5, 2.0, 0.25, -1.0]])
    scales = torch.tensor([[2.0**100], [2.0**-100]])
    assert torch.equal(sent(in_format(values * scales, "float16")), values * scales)


def test_the_largest_and_the_smallest_float_arrive():
    tensor = torch.tensor([[3.4e38], [2.0**-149]])  # float32 ends at 3.403e38
    back = sent(in_format(tensor, "float16"))
    assert back[0].isfinite()
    assert back[0] / tensor[0] == pytest.approx(1, rel=2**-10)
    assert torch.equal(back[1], tensor[1])


@pytest.mark.parametrize("wire_format", WIRE_FORMATS)
@pytest.mark.parametrize("width", [1, 8, 100, 576, 4096, 5000])
def test_a_vector_decodes_to_the_same_bits_whatever_is_sent_with_it(wire_format, width):
    tensor = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(0)) * 1e-7
    other = tensor.clone()
    other[0], other[1, 1], other[2, 0] = 1e30, float("nan"), 0.0
    alone = sent(in_format(tensor[1, :1], wire_format)).float()
    assert torch.equal(sent(in_format(tensor, wire_format))[1, :1].float(), alone)
    assert torch.equal(sent(in_format(other, wire_format))[1, :1].float(), alone)
    assert alone.any()


@pytest.mark.parametrize("wire_format", ["float16", "blockwise8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scaled_formats_know_all_shapes_and_tell_their_size(wire_format, shape):
    tensor = in_format(torch.ones(shape), wire_format)
    torch.testing.assert_close(
        sent(tensor), torch.ones(shape), rtol=0.004 if wire_format == "blockwise8" else 0, atol=0
    )
    assert len(to_bytes(tensor)) == 2 + 4 * len(shape) + encoded_bytes(tensor)


def every_float16() -> torch.Tensor:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    numbers = bits.view(torch.float16)
    return numbers[numbers.isfinite()]


@pytest.mark.parametrize("below", [1e9, 60_000.0, 40_000.0, 1.0, 1e-6])
def test_float16_numbers_arrive_as_they_are_whatever_is_beside_them(below):
    """The largest and the smallest of them in one vector: what a server in float16 answers."""
    numbers = every_float16()
    vector = numbers[numbers.abs() < below]
    assert torch.equal(sent(in_format(vector, "float16")), vector.float())


def test_no_number_becomes_infinite_by_its_scale():
    near = torch.linspace(65_000.0, 66_000.0, 2001)[:, None]  # float16 rounds to infinity from 65,520 on
    back = sent(in_format(near, "float16"))
    assert ((back - near).abs() <= near * 2.0**-11).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_sent_in_the_receivers_dtype_is_what_a_cast_there_makes(dtype):
    values = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 3, 500)[:, None]
    values[:, 5] *= 1e-4  # far below the others of its vector
    values[::7, 3] = 1e5
    wanted = values.to(getattr(torch, dtype))
    found = sent(in_dtype(values, dtype)).to(wanted.dtype)
    exact = wanted.isfinite().all(dim=1)
    assert torch.equal(found[exact], wanted[exact])
    assert torch.equal(found.isfinite().all(dim=1), exact), "what is too large is still too large there"
    if dtype == "float16":
        assert not torch.equal(sent(in_format(values, dtype)).to(wanted.dtype)[exact], wanted[exact]), "rounded twice"
        assert sent(in_dtype(values, dtype)).isfinite().all(), "and it is not the wire that makes it so"

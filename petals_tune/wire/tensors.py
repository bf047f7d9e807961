"""Tensors as bytes: in their own dtype, as scaled float16 or in scaled 8 bits. Sizes are checked before allocation.

Both scaled formats scale inside one vector along the last dimension, so that a row does not depend on the others in its
message. In float16 a vector has one scale, a power of two, which is exact: a cast alone would make infinity of
what is above 65,504, and zero of small gradients. Vectors of float16 numbers arrive as they are, their smallest ones
included.

In 8 bits every 32 values of a vector have a scale, their largest magnitude over 127, as bfloat16, and the values are
rounded to its multiples. Hidden states have a few channels that are a hundred times larger than the others (Dettmers et
al. 2022, arXiv:2208.07339): with one scale a vector they would round the others away. What it does to a training's loss
is measured by tests/benchmarks/wire_formats.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy
import torch

from petals_tune.errors import ConfigError, ProtocolError

WireFormat = Literal["float32", "float16", "bfloat16", "blockwise8"]
WIRE_FORMATS: tuple[str, ...] = get_args(WireFormat)
FormatOption = Literal["auto", "float32", "float16", "bfloat16", "blockwise8"]  # auto: the dtype of each server

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_BLOCKWISE8, _SCALED16 = 255, 254
_MAX_DIMS = 4
_MAX_NUMEL = 2**48  # an empty tensor has strides too, and torch fails where they overflow
_SCALED_EXPONENT = 16  # scaled vectors stay below 2**16, and
_ROUNDS_UP = 1 - 2**-12  # times 2**16 is 65,520, from where float16 rounds to infinity
_MAX_SHIFT = 126  # of a scale's exponent: the scale and its inverse are normal float32 numbers
_BLOCK = 32  # values that share a scale in 8 bits
_LARGEST_CODE = 127


class Blockwise8(torch.Tensor):
    """A float tensor that `to_bytes` encodes in 8 bits, with a scale for every 32 values along the last dimension."""


class Scaled16(torch.Tensor):
    """A float tensor that `to_bytes` encodes as float16, with one scale per vector along the last dimension."""


def in_format(tensor: torch.Tensor, wire_format: str) -> torch.Tensor:
    """Prepare `tensor` for `to_bytes`: cast it to the format's dtype, or mark it for 8 bits or scaled float16."""
    if wire_format == "blockwise8":
        return tensor.detach().as_subclass(Blockwise8)
    if wire_format == "float16":
        return tensor.detach().as_subclass(Scaled16)
    return tensor.detach().to(getattr(torch, wire_format))


def in_dtype(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Prepare `tensor` for a receiver that computes in `dtype` and casts it to that: it gets the same numbers.

    What float16 cannot hold is sent as it is, for the receiver to say so.
    """
    if dtype == "float16" and tensor.dtype is not torch.float16:
        # A scale alone would round what is below 2**-14 twice: here, and to the receiver's coarser steps.
        rounded = tensor.detach().to(torch.float16).to(tensor.dtype)
        tensor = rounded.where(rounded.isfinite(), tensor)
    return in_format(tensor, dtype)


def encoded_bytes(tensor: torch.Tensor) -> int:
    """How many bytes the values of `tensor` take on the wire."""
    if isinstance(tensor, Blockwise8):
        return tensor.numel() + 2 * _blocks(tensor.shape)
    if isinstance(tensor, Scaled16):
        return 2 * tensor.numel() + _vectors(tensor.shape)
    return tensor.nbytes


def format_bytes(shape: Sequence[int], wire_format: str) -> int:
    """How many bytes the values of a tensor of `shape` take on the wire in that format."""
    if wire_format == "blockwise8":
        return math.prod(shape) + 2 * _blocks(shape)
    if wire_format == "float16":
        return 2 * math.prod(shape) + _vectors(shape)
    return math.prod(shape) * int(getattr(torch, wire_format).itemsize)


def as_received(tensor: torch.Tensor, wire_format: str) -> torch.Tensor:
    """Encode and decode `tensor`: the values that a receiver of this format gets."""
    return from_bytes(memoryview(to_bytes(in_format(tensor, wire_format))))


def to_bytes(value: torch.Tensor) -> bytes:
    """Encode a tensor: dtype code, number of dimensions, the dimensions (u32 each), then the values."""
    return b"".join(to_parts(value))


def to_parts(value: torch.Tensor) -> tuple[bytes, bytes | memoryview]:
    """Encode a tensor as `to_bytes` does, in two parts: the header, and the values, in the tensor's memory if possible.

    They are copied where the tensor is a view of part of its memory: a row would keep its whole batch.
    """
    raw: Any
    if isinstance(value, Blockwise8):
        code, tensor = _BLOCKWISE8, value.as_subclass(torch.Tensor).cpu().float().contiguous()
        raw = _to_blockwise8(tensor) if tensor.numel() else b""
    elif isinstance(value, Scaled16):
        code, tensor = _SCALED16, value.as_subclass(torch.Tensor).cpu().float().contiguous()
        raw = _to_scaled16(tensor) if tensor.numel() else b""
    else:
        if value.dtype not in _CODES:
            raise ConfigError(
                f"{value.dtype} tensors cannot be sent; float32, float16 and bfloat16 can", seen=value.dtype
            )
        code, tensor = _CODES[value.dtype], value.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()
        raw = _memory_of(tensor) if tensor.numel() else b""
    return struct.pack(f">BB{tensor.dim()}I", code, tensor.dim(), *tensor.shape), raw


def decoded_bytes(data: memoryview) -> int:
    """Return the bytes of memory that `from_bytes` would take for a tensor; 0 where it refuses it."""
    if len(data) < 2 or data[0] not in (_BLOCKWISE8, _SCALED16):
        return len(data)
    shape = struct.unpack_from(f">{data[1]}I", data, 2) if len(data) >= 2 + 4 * data[1] else ()
    return 4 * min(math.prod(shape), len(data))  # a value takes a byte at least


def from_bytes(data: memoryview) -> torch.Tensor:
    """Decode a tensor into memory of its own. Raises ProtocolError where shape, dtype and length disagree."""
    if len(data) < 2 or data[1] > _MAX_DIMS or len(data) < 2 + 4 * data[1]:
        raise ProtocolError(f"a tensor of {len(data)} bytes has no whole header", what="tensor")
    code, dims = data[0], data[1]
    shape = struct.unpack_from(f">{dims}I", data, 2)
    if math.prod(size or 1 for size in shape) > _MAX_NUMEL:
        raise ProtocolError(f"a tensor of shape {shape} is larger than any memory", what="tensor")
    raw, numel = data[2 + 4 * dims :], math.prod(shape)
    if code == _BLOCKWISE8:
        return _from_blockwise8(raw, shape, numel)
    if code == _SCALED16:
        return _from_scaled16(raw, shape, numel)
    if code >= len(_DTYPES):
        raise ProtocolError(f"unknown dtype code {code}", what="tensor")
    dtype = _DTYPES[code]
    if len(raw) != numel * dtype.itemsize:
        raise ProtocolError(
            f"a {dtype} tensor of shape {shape} has {numel * dtype.itemsize} bytes, not {len(raw)}", what="tensor"
        )
    if dtype is torch.bool and numel and numpy.frombuffer(raw, numpy.uint8).max() > 1:
        raise ProtocolError("a bool tensor holds other values than 0 and 1", what="tensor")
    if numel == 0:
        return torch.empty(shape, dtype=dtype)
    return _copied(raw, dtype).view(shape)


def _memory_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, without a copy."""
    buffer: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(buffer)


def _copied(raw: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """Copy `raw` into a new flat tensor. NumPy releases the interpreter's lock meanwhile, bytearray() does not."""
    copy = torch.empty(len(raw), dtype=torch.uint8)  # aligned for any dtype
    numpy.copyto(copy.numpy(), numpy.frombuffer(raw, numpy.uint8))
    return copy.view(dtype)


def _to_blockwise8(tensor: torch.Tensor) -> bytes:
    """Encode as scales (bfloat16, one a block), then one byte per value."""
    blocks = _in_blocks(tensor)
    largest = torch.maximum(blocks.amax(2, keepdim=True), -blocks.amin(2, keepdim=True))
    scales = (largest / _LARGEST_CODE).to(torch.bfloat16).float()
    # The largest value becomes 127 scales: so what was decoded is encoded again to the same codes.
    codes = (blocks / scales.where(scales > 0, 1.0)).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    finite = blocks.isfinite().all(2, keepdim=True)
    if not finite.all():  # an integer is always finite, and the receiver has to refuse these
        scales, codes = scales.where(finite, torch.nan), codes.where(finite, 0.0)
    values = codes.to(torch.int8).flatten(1)[:, : _width(tensor.shape)].contiguous()
    return b"".join((_memory_of(scales.to(torch.bfloat16)), _memory_of(values)))


def _from_blockwise8(raw: memoryview, shape: tuple[int, ...], numel: int) -> torch.Tensor:
    scale_bytes = 2 * _blocks(shape)
    if len(raw) != scale_bytes + numel:
        raise ProtocolError(
            f"an 8-bit tensor of shape {shape} has {scale_bytes + numel} bytes, not {len(raw)}", what="tensor"
        )
    if numel == 0:
        return torch.empty(shape)
    vectors, width = _vectors(shape), _width(shape)
    scales = _copied(raw[:scale_bytes], torch.bfloat16).view(vectors, -1, 1)
    values = _in_blocks(_copied(raw[scale_bytes:], torch.int8).view(vectors, width).float())
    return values.mul_(scales).flatten(1)[:, :width].reshape(shape)


def _in_blocks(tensor: torch.Tensor) -> torch.Tensor:
    """View the vectors of `tensor` as (vectors, blocks, 32); zeros make the last block of each a whole one."""
    vectors = tensor.view(_vectors(tensor.shape), -1)
    if missing := -vectors.shape[1] % _BLOCK:
        vectors = torch.nn.functional.pad(vectors, (0, missing))
    return vectors.view(len(vectors), -1, _BLOCK)


def _blocks(shape: Sequence[int]) -> int:
    """Count the blocks of 32 values in all vectors; a vector's last one may be shorter."""
    return _vectors(shape) * -(-_width(shape) // _BLOCK)


def _width(shape: Sequence[int]) -> int:
    """Return the length of the vectors along the last dimension."""
    return shape[-1] if shape else 1


def _vectors(shape: Sequence[int]) -> int:
    """Count the vectors along the last dimension; 0 where they are empty."""
    return math.prod(shape[:-1]) if math.prod(shape) else 0


def _to_scaled16(tensor: torch.Tensor) -> bytes:
    """Encode as exponents of the scales (int8, one a vector), then float16 values times 2 to that exponent."""
    vectors = tensor.view(_vectors(tensor.shape), -1)
    largest = torch.maximum(vectors.amax(1, keepdim=True), -vectors.amin(1, keepdim=True))  # .abs() would be a copy
    mantissas, exponents = torch.frexp(largest.where(largest.isfinite(), 1.0))  # what is not finite stays so
    exponents = exponents + (mantissas >= _ROUNDS_UP)
    shifts = (_SCALED_EXPONENT - exponents).clamp(-_MAX_SHIFT, _MAX_SHIFT).to(torch.int8)
    values = (vectors * _power(shifts)).to(torch.float16)
    return b"".join((_memory_of(shifts), _memory_of(values)))


def _from_scaled16(raw: memoryview, shape: tuple[int, ...], numel: int) -> torch.Tensor:
    vectors = _vectors(shape)
    if len(raw) != vectors + 2 * numel:
        raise ProtocolError(
            f"a scaled float16 tensor of shape {shape} has {vectors + 2 * numel} bytes, not {len(raw)}", what="tensor"
        )
    if numel == 0:
        return torch.empty(shape)
    shifts = _copied(raw[:vectors], torch.int8).view(-1, 1)
    if int(shifts.min()) < -_MAX_SHIFT or int(shifts.max()) > _MAX_SHIFT:
        raise ProtocolError(f"a scale of a float16 tensor is beyond 2**{_MAX_SHIFT}", what="tensor")
    values = _copied(raw[vectors:], torch.float16).view(vectors, -1)
    return values.float().mul_(_power(-shifts)).view(shape)


def _power(exponents: torch.Tensor) -> torch.Tensor:
    """Return 2 to these exponents, exactly: a float32's exponent bits."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)

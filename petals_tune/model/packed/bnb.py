"""bitsandbytes' own checkpoints: int8 with a scale for each output, NF4 and FP4 with one for 64 weights.

A weight of 8 bits is its number times `SCB` of its row / 127. Those of 4 bits stand two a byte, their scales in
`absmax`, which may be quantized itself ("double quantization"), the rest as JSON in `quant_state`. bitsandbytes unpacks
them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from petals_tune.model.packed.base import REAL, PackedFormat, Part, check, require, row_slices, unknown
from petals_tune.model.stored import StoredTensor

_STATES = ("nf4", "fp4")
_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}  # of `bnb_4bit_quant_storage`, whose numbers mean nothing
_BLOCK_SIZES = {32, 64, 128, 256, 512, 1024, 2048, 4096}
_DTYPES = {"float32", "float16", "bfloat16"}


class BitsAndBytes(PackedFormat):
    method: ClassVar[str] = "bitsandbytes"
    endings: ClassVar[Mapping[str, Part]] = {
        ".SCB": Part(".weight", "SCB"),
        ".weight_format": Part(".weight", "layout"),
        ".absmax": Part("", "absmax"),
        ".quant_map": Part("", "quant_map"),
        ".nested_absmax": Part("", "nested_absmax"),
        ".nested_quant_map": Part("", "nested_quant_map"),
        **{f".quant_state.bitsandbytes__{kind}": Part("", f"quant_state.bitsandbytes__{kind}") for kind in _STATES},
    }

    def __init__(self, options: Mapping[str, Any]):
        unknown(options, bnb_4bit_quant_type=_STATES)

    def shape_of(self, parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        require(parts, "weight")
        weight = parts["weight"]
        if "SCB" in parts:
            if weight.kind != "I8" or len(weight.shape) != 2:
                raise weight.unfit("should be I8 (out, in)")
            check(parts["SCB"], REAL, weight.shape[:1])
            return weight.shape
        require(parts, "absmax", "quant_map")
        check(parts["quant_map"], "F32", (16,))
        state = next((parts[role] for role in parts if role.startswith("quant_state.")), None)
        if state is None:
            raise weight.unfit("lacks its quant_state")
        fields = _fields(state)
        shape: tuple[int, ...] = tuple(fields["shape"])
        scales = -(-math.prod(shape) // fields["blocksize"])
        if "nested_blocksize" in fields:  # the library's kernels trust these sizes
            require(parts, "nested_absmax", "nested_quant_map")
            check(parts["nested_absmax"], "F32", (-(-scales // fields["nested_blocksize"]),))
            check(parts["nested_quant_map"], "F32", (256,))
        check(parts["absmax"], "U8" if "nested_blocksize" in fields else REAL, (scales,))
        size_bytes = _BYTES.get(weight.kind, 0) * math.prod(weight.shape)
        if size_bytes != -(-math.prod(shape) // 2):
            raise weight.unfit(f"does not hold the {shape[0]} x {shape[1]} numbers of 4 bits of its quant_state")
        return shape

    def unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, name: str) -> None:
        if "SCB" in parts:
            if parts.get("layout", torch.zeros(())).any():
                raise ValueError("is in a layout of one kind of GPU: save it again with a newer bitsandbytes")
            scale = parts["SCB"].to(torch.float32)[:, None]
            for rows in row_slices(weight):
                weight[rows] = (parts["weight"][rows] * scale[rows]).mul_(7.874015718698502e-3)  # 1 / 127, as it has it
            return
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        state = QuantState.from_dict({role: part for role, part in parts.items() if role != "weight"}, weight.device)
        absmax = state.absmax
        if state.nested:
            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        packed, absmax, columns = parts["weight"].reshape(-1).view(torch.uint8), absmax.float(), weight.shape[1]
        size = state.blocksize
        for rows in row_slices(weight, multiple=size // math.gcd(columns, size)):
            start, stop = rows.start * columns, rows.stop * columns
            blocks, pairs = absmax[start // size : -(-stop // size)], packed[start // 2 : -(-stop // 2)]
            pairs = torch.nn.functional.pad(pairs, (0, len(blocks) * size // 2 - len(pairs)))  # the last block is cut
            # A row for each block of scales: of rows that end inside a block, its kernel for CPUs (0.50.2) takes wrong
            # scales.
            of_blocks = QuantState(
                absmax=blocks,
                shape=torch.Size((len(blocks), size)),
                blocksize=size,
                quant_type=state.quant_type,
                dtype=state.dtype,
            )
            weight[rows] = (
                dequantize_4bit(pairs[:, None], of_blocks).flatten()[: stop - start].unflatten(0, (-1, columns))
            )


def _fields(state: StoredTensor) -> dict[str, Any]:
    """Read the JSON of a quant_state. Raises UnsupportedModel where it is not that of a matrix."""
    try:
        fields: dict[str, Any] = json.loads(bytes(state[...].numpy()))
        shape = fields["shape"]
        is_known = (
            fields["quant_type"] in _STATES
            and fields["blocksize"] in _BLOCK_SIZES
            and fields["dtype"] in _DTYPES
            and len(shape) == 2
            and all(isinstance(size, int) and size > 0 for size in shape)
        )
        nested = {name for name in fields if name.startswith("nested_")}
        if nested:
            is_known &= fields["nested_blocksize"] in _BLOCK_SIZES and fields["nested_dtype"] == "float32"
            is_known &= isinstance(fields["nested_offset"], float | int)
        extra = fields.keys() - {"shape", "quant_type", "blocksize", "dtype"} - nested
        if not is_known or extra or len(nested) not in (0, 3):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise state.unfit("is no quant_state of a matrix") from None
    return fields

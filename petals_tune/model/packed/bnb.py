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

from petals_tune.model.packed.base import PackedFormat, Part, check_shape, require, row_slices, unknown
from petals_tune.model.stored import StoredTensor

_STATES = ("nf4", "fp4")
_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}  # of `bnb_4bit_quant_storage`, whose numbers mean nothing
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
_STATE_FIELDS = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}


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
            check_shape(parts["SCB"], weight.shape[:1])
            return weight.shape
        require(parts, "absmax", "quant_map")
        state = next((parts[role] for role in parts if role.startswith("quant_state.")), None)
        if state is None:
            raise weight.unfit("lacks its quant_state")
        try:
            fields = json.loads(bytes(state[...].numpy()))
            shape = tuple(fields["shape"])
            if not all(isinstance(fields[name], kind) for name, kind in _STATE_FIELDS.items()) or len(shape) != 2:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise state.unfit("is no quant_state of a matrix") from None
        if getattr(torch, fields["dtype"], None) not in (torch.float32, torch.float16, torch.bfloat16):
            raise state.unfit(f"names the dtype {fields['dtype']!r}")
        nested = [name for name in _NESTED_FIELDS if name in fields]
        if nested and len(nested) < len(_NESTED_FIELDS):
            raise state.unfit("says only a part of how its absmax is quantized")
        if nested:
            require(parts, "nested_absmax", "nested_quant_map")
        if (parts["absmax"].kind == "U8") != bool(nested):
            raise parts["absmax"].unfit("is not what its quant_state says")
        size_bytes = _BYTES.get(weight.kind, 0) * math.prod(weight.shape)
        if size_bytes != -(-math.prod(shape) // 2):
            raise weight.unfit(f"does not hold the {shape[0]} x {shape[1]} numbers of 4 bits of its quant_state")
        check_shape(parts["absmax"], (-(-math.prod(shape) // fields["blocksize"]),))
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

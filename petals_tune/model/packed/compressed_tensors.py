"""compressed-tensors (Kimi, and what llm-compressor writes): whole numbers of 2, 4 or 8 bits, or FP8, with scales.

With q the stored numbers, z the zero points (none: 0) and s the scales, a weight is (q - z) * s in the dtype of the
scales, and that of an FP8 expert in float32, as in the library. There is a scale for the whole tensor, each row
("channel"), each `group_size` inputs of a row, or each block of `block_structure`. `pack-quantized` stores q + 2^(bits
- 1) in 32-bit words along the inputs, and z so along the outputs. Formulas: `compressed_tensors.compressors`, and
transformers' `integrations/compressed_tensors.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from petals_tune.model.packed.base import (
    REAL,
    PackedFormat,
    Part,
    block_size,
    check,
    group_size,
    require,
    row_slices,
    unknown,
    words_to_numbers,
)
from petals_tune.model.stored import StoredTensor

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
_STRATEGIES = ("tensor", "channel", "group", "block")


class CompressedTensors(PackedFormat):
    method: ClassVar[str] = "compressed-tensors"
    endings: ClassVar[Mapping[str, Part]] = {
        ".weight_packed": Part(".weight", "words"),
        ".weight_scale": Part(".weight", "scale"),
        ".weight_shape": Part(".weight", "shape"),
        ".weight_zero_point": Part(".weight", "zero"),
        ".weight_g_idx": Part(".weight", "g_idx"),
        ".weight_global_scale": Part(".weight", "global scale"),
        ".input_scale": Part(".weight", "unused"),  # of kernels that round activations too
        ".input_zero_point": Part(".weight", "unused"),
        ".input_global_scale": Part(".weight", "unused"),
    }

    def __init__(self, options: Mapping[str, Any]):
        groups = options.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise ValueError(f"config_groups={groups!r}, where a table of groups can be read")
        unknown(options, format=[*_FORMATS, "mixed-precision"], transform_config=[None, {}])
        sparse = options.get("sparsity_config") or {}
        unknown(sparse, format=["dense"])
        self._groups: list[Mapping[str, Any]] = []
        for group in groups.values():
            unknown(group, format=[*_FORMATS, None])
            if weights := group.get("weights"):
                unknown(weights, strategy=[*_STRATEGIES, None], type=["int", "float"], num_bits=[2, 4, 8])
                group_size(weights), block_size(weights, "block_structure")  # they raise
                self._groups.append(weights)

    def shape_of(self, parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        require(parts, "scale")
        if foreign := next((parts[role] for role in ("g_idx", "global scale") if role in parts), None):
            raise foreign.unfit("cannot be read: give the model in another format")
        if "words" not in parts:
            require(parts, "weight")
            weight, scale = parts["weight"], parts["scale"]
            if weight.kind not in ("I8", "F8_E4M3"):
                raise weight.unfit("has a scale, and should be I8 or F8_E4M3")
            *stacked, rows, columns = weight.shape
            self._check_scale(scale, rows, columns, stacked)
            if "zero" in parts:
                check(parts["zero"], "I8", scale.shape)
            return weight.shape
        require(parts, "shape")
        check(parts["shape"], "I64 I32", (2,))
        words, stated = parts["words"], tuple(parts["shape"][...].tolist())
        if words.kind != "I32" or len(words.shape) != 2:
            raise words.unfit("should be I32 (out, in * bits / 32)")
        rows, columns = int(stated[0]), int(stated[1])
        bits = self._bits(words.shape[1], columns)
        if words.shape[0] != rows or bits is None:
            raise words.unfit(f"does not hold {rows} x {columns} numbers of any num_bits of config_groups")
        self._check_scale(parts["scale"], rows, columns, [])
        if "zero" in parts:
            check(parts["zero"], "I32", (-(-rows * bits // 32), *parts["scale"].shape[1:]))
        return rows, columns

    def unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, name: str) -> None:
        scale, zero, stored = parts["scale"], parts.get("zero"), parts.get("words")
        bits = 8
        if stored is None:
            stored = parts["weight"]
            if stored.is_floating_point() and ".experts." in name:
                scale = scale.to(torch.float32)
        else:
            bits = self._bits(stored.shape[1], weight.shape[1]) or 8
            if zero is not None:
                zero = words_to_numbers(zero, bits, along=0)[: weight.shape[0]] - 2 ** (bits - 1)
        height, width = self._block(tuple(scale.shape), *weight.shape)
        scale = scale.reshape(-(-weight.shape[0] // height), -(-weight.shape[1] // width))
        zero = None if zero is None else zero.to(scale.dtype).reshape(scale.shape)
        for rows in row_slices(weight):
            numbers = stored[rows]
            if numbers.dtype is torch.int32:
                numbers = words_to_numbers(numbers, bits)[:, : weight.shape[1]] - 2 ** (bits - 1)
            values, of_rows = numbers.to(scale.dtype), torch.arange(rows.start, rows.stop) // height
            if zero is not None:
                values = values - _widened(zero[of_rows], width, weight.shape[1])
            weight[rows] = values * _widened(scale[of_rows], width, weight.shape[1])

    def _bits(self, words: int, columns: int) -> int | None:
        """Return the bits of a number, of which `columns` fill so many words."""
        stated = {weights.get("num_bits", 8) for weights in self._groups}
        return next((bits for bits in sorted(stated) if -(-columns * bits // 32) == words), None)

    def _check_scale(self, scale: StoredTensor, rows: int, columns: int, stacked: list[int]) -> None:
        grids = {(-(-rows // height), -(-columns // width)) for height, width in self._blocks(rows, columns)}
        check(scale, REAL, *((*stacked, *grid) for grid in sorted(grids)), *(() if stacked else ((1,), ())))

    def _block(self, scale: tuple[int, ...], rows: int, columns: int) -> tuple[int, int]:
        """Return the rows and columns of one scale, by the shape of all scales."""
        blocks = self._blocks(rows, columns)
        return next(((h, w) for h, w in blocks if (-(-rows // h), -(-columns // w)) == scale), (rows, columns))

    def _blocks(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """List the blocks that config_groups allow for a matrix of this shape."""
        found = [(rows, columns), (1, columns)]
        for weights in self._groups:
            if (size := group_size(weights)) and columns % size == 0:
                found.append((1, size))
            if block := block_size(weights, "block_structure"):
                found.append(block)
        return found


def _widened(values: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    return values.repeat_interleave(width, dim=1)[:, :columns] if values.shape[1] > 1 else values

"""AWQ: whole numbers of 4 bits in 32-bit words along the outputs, with a scale and a zero point for 128 inputs.

With w (in, out) the numbers of `qweight` (in, out / 8), z those of `qzeros` (groups, out / 8) and s the `scales`
(groups, out), a weight is s[g] * (w - z[g]), in the dtype of the scales; g is the group of its input. A word's numbers
stand in the order 0, 2, 4, 6, 1, 3, 5, 7 (the layout `gemm`). Source: Lin et al. 2023, arXiv:2306.00978; layout:
AutoAWQ's `WQLinear_GEMM`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from petals_tune.model.packed.base import (
    REAL,
    PackedFormat,
    Part,
    check,
    group_size,
    require,
    row_slices,
    unknown,
    words_to_numbers,
)
from petals_tune.model.stored import StoredTensor

_BITS, _PER_WORD = 4, 8
_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], dtype=torch.int32)  # where a word has its first, second, ... output


class AWQ(PackedFormat):
    method: ClassVar[str] = "awq"
    endings: ClassVar[Mapping[str, Part]] = {
        ".qweight": Part(".weight", "words"),
        ".qzeros": Part(".weight", "zeros"),
        ".scales": Part(".weight", "scales"),
    }

    def __init__(self, options: Mapping[str, Any]):
        layout = str(options.get("version") or options.get("format") or "gemm").lower()
        unknown({"version": layout}, version=["gemm"])
        unknown(options, bits=[_BITS], w_bit=[_BITS], zero_point=[True])
        self._group_size = group_size(options, "q_group_size" if "q_group_size" in options else "group_size", 128)

    def shape_of(self, parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        require(parts, "words", "zeros", "scales")
        words = parts["words"]
        if words.kind != "I32" or len(words.shape) != 2:
            raise words.unfit("should be I32 (in, out / 8)")
        inputs, outputs = words.shape[0], words.shape[1] * _PER_WORD
        groups = -(-inputs // (self._group_size or inputs))
        check(parts["scales"], REAL, (groups, outputs))
        check(parts["zeros"], "I32", (groups, words.shape[1]))
        return outputs, inputs

    def unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, name: str) -> None:
        by_input, scales = weight.T, parts["scales"]
        zeros = words_to_numbers(parts["zeros"], _BITS, places=_PLACES)
        size = self._group_size or len(by_input)
        for rows in row_slices(by_input):
            groups = torch.arange(rows.start, rows.stop) // size
            numbers = words_to_numbers(parts["words"][rows], _BITS, places=_PLACES)
            by_input[rows] = (numbers - zeros[groups]).to(scales.dtype) * scales[groups]

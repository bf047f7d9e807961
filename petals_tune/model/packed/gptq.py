"""GPTQ: whole numbers in 32-bit words along the inputs, with a scale and a zero point for each group of inputs.

With w (in, out) the numbers of `qweight` (in * bits / 32, out), z those of `qzeros` (groups, out * bits / 32), s the
`scales` (groups, out) and g the group of an input, `g_idx` (in,), a weight is s[g] * (w - z[g]), in the dtype of the
scales. Checkpoints of the format `gptq` store z - 1, those of `gptq_v2` z. Source: Frantar et al. 2022,
arXiv:2210.17323; layout: `pack_block` of GPTQModel and AutoGPTQ.
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


class GPTQ(PackedFormat):
    method: ClassVar[str] = "gptq"
    endings: ClassVar[Mapping[str, Part]] = {
        ".qweight": Part(".weight", "words"),
        ".qzeros": Part(".weight", "zeros"),
        ".scales": Part(".weight", "scales"),
        ".g_idx": Part(".weight", "groups"),
    }

    def __init__(self, options: Mapping[str, Any]):
        stored_as = options.get("checkpoint_format") or options.get("format") or "gptq"
        unknown({"checkpoint_format": stored_as}, checkpoint_format=["gptq", "gptq_v2"])
        unknown(options, bits=[2, 4, 8], dynamic=[None, {}])
        self._bits: int = options.get("bits", 4)
        self._group_size = group_size(options, default=128)
        self._zeros_are_less = stored_as == "gptq"

    def shape_of(self, parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        require(parts, "words", "zeros", "scales")
        words, per_word = parts["words"], 32 // self._bits
        if words.kind != "I32" or len(words.shape) != 2:
            raise words.unfit("should be I32 (in * bits / 32, out)")
        inputs, outputs = words.shape[0] * per_word, words.shape[1]
        groups = -(-inputs // (self._group_size or inputs))
        check(parts["scales"], REAL, (groups, outputs))
        check(parts["zeros"], "I32", (groups, -(-outputs // per_word)))
        if "groups" in parts:
            check(parts["groups"], "I32 I64", (inputs,))
        return outputs, inputs

    def unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, name: str) -> None:
        by_input, scales, per_word = weight.T, parts["scales"], 32 // self._bits
        zeros = words_to_numbers(parts["zeros"], self._bits)[:, : weight.shape[0]]
        if self._zeros_are_less:
            zeros = (zeros + 1) & (2**self._bits - 1)
        if "groups" in parts:
            groups = parts["groups"].long()
        else:
            groups = torch.arange(len(by_input)) // (self._group_size or len(by_input))
        if not ((groups >= 0) & (groups < len(scales))).all():
            raise ValueError(f"names groups of inputs that are not among its {len(scales)}")
        for rows in row_slices(by_input, multiple=per_word):
            words = parts["words"][rows.start // per_word : rows.stop // per_word]
            numbers = words_to_numbers(words, self._bits, along=0)
            of_rows = groups[rows]
            by_input[rows] = (numbers - zeros[of_rows]).to(scales.dtype) * scales[of_rows]

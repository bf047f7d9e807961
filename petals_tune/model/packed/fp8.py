"""FP8 weights with a scale for each block (DeepSeek, Qwen, MiniMax), and FP4 experts among them.

Values: float8_e4m3fn times the float32 scale of its block, of `weight_block_size` rows and columns, the last ones cut.
DeepSeek V4 stores experts as two E2M1 floats a byte with a scale for 32 of them. Formulas: transformers'
`integrations/finegrained_fp8.py`, which reads the block's size from the scales and so wants sizes that divide evenly;
scales of cut blocks are as DeepSeek's own `weight_dequant` has them.
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
    fp4_values,
    fp8_values,
    require,
    row_slices,
    scale_values,
    unknown,
)
from petals_tune.model.stored import StoredTensor

_FP4_BLOCK = (1, 32)


class FP8(PackedFormat):
    method: ClassVar[str] = "fp8"
    endings: ClassVar[Mapping[str, Part]] = {
        "_scale_inv": Part("", "scale"),
        ".scale": Part(".weight", "scale"),  # DeepSeek V4
        ".qscale_weight": Part(".weight", "scale"),  # Mistral Large 4
        ".activation_scale": Part(".weight", "unused"),  # of kernels that round activations to FP8 too
        ".input_scale": Part(".weight", "unused"),
        ".qscale_act": Part(".weight", "unused"),
    }

    def __init__(self, options: Mapping[str, Any]):
        unknown(options, fmt=["e4m3"], scale_fmt=["float", "ue8m0", None])
        self._block = block_size({"weight_block_size": [128, 128], **options}, "weight_block_size")

    def parts_of(self, names: Any) -> dict[str, dict[str, str]]:
        names = list(names)
        return {weight: parts for weight, parts in super().parts_of(names).items() if self._is_scaled(parts)}

    @staticmethod
    def _is_scaled(parts: Mapping[str, str]) -> bool:
        """Other modules have a parameter that is called `scale`, and no weight beside it."""
        return "weight" in parts or not parts.get("scale", ".scale").endswith(".scale")

    def shape_of(self, parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        require(parts, "weight", "scale")
        weight, scale = parts["weight"], parts["scale"]
        if len(weight.shape) not in (2, 3):
            raise weight.unfit("has a scale, and should be a matrix, or one for each expert")
        *stacked, rows, columns = weight.shape
        if weight.kind == "I8":
            columns, block = 2 * columns, _FP4_BLOCK
        elif weight.kind == "F8_E4M3":
            block = self._block or (rows, columns)
        else:
            raise weight.unfit("has a scale, and should be F8_E4M3, or I8 for pairs of FP4")
        grid = (*stacked, -(-rows // block[0]), -(-columns // block[1]))
        is_one = self._block is None and weight.kind != "I8" and not stacked
        check(scale, f"{REAL} F8_E8M0 U8", grid, *([(), (1,)] if is_one else []))
        return (*stacked, rows, columns)

    def unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, name: str) -> None:
        stored, scale = parts["weight"], scale_values(parts["scale"])
        block = _FP4_BLOCK if stored.dtype is torch.int8 else self._block or (weight.shape[0], weight.shape[1])
        scale = scale.reshape(-(-weight.shape[0] // block[0]), -1)
        columns = scale.repeat_interleave(block[1], dim=1)[:, : weight.shape[1]]
        for rows in row_slices(weight):
            values = fp4_values(stored[rows]) if stored.dtype is torch.int8 else fp8_values(stored[rows])
            weight[rows] = values.mul_(columns[torch.arange(rows.start, rows.stop) // block[0]])

"""MXFP4 experts (gpt-oss): two E2M1 floats a byte, and a power of two for 32 of them.

`NAME_blocks` (experts, out, in / 32, 16) and `NAME_scales` (experts, out, in / 32) are the parameter NAME, which the
library holds as (experts, in, out). Formula: `convert_moe_packed_tensors` in transformers' `integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from petals_tune.model.packed.base import (
    PackedFormat,
    Part,
    check,
    fp4_values,
    require,
    row_slices,
    scale_values,
)
from petals_tune.model.stored import StoredTensor

_BYTES = 16  # of one block


class MXFP4(PackedFormat):
    method: ClassVar[str] = "mxfp4"
    endings: ClassVar[Mapping[str, Part]] = {"_blocks": Part("", "blocks"), "_scales": Part("", "scales")}

    def __init__(self, options: Mapping[str, Any]):
        pass  # what is packed has parts; the rest of the options is for kernels

    def shape_of(self, parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        require(parts, "blocks", "scales")
        blocks, scales = parts["blocks"], parts["scales"]
        if blocks.kind != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != _BYTES:
            raise blocks.unfit(f"should be U8 (experts, out, in / 32, {_BYTES})")
        check(scales, "U8", blocks.shape[:3])
        experts, outputs, groups, _ = blocks.shape
        return experts, groups * 2 * _BYTES, outputs

    def unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, name: str) -> None:
        by_output = weight.T
        for rows in row_slices(by_output):
            values = fp4_values(parts["blocks"][rows])
            by_output[rows] = values.mul_(scale_values(parts["scales"][rows])[..., None]).flatten(1)

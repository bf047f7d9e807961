"""(IA)3: trained factors for the outputs of a linear, or for the inputs of a feed-forward one.

Source: Liu et al. 2022, arXiv:2205.05638. A part's tensor is PEFT's: (out, 1) for outputs, (1, in) for inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch

from petals_tune.adapters.base import LinearMethod, PositionBytes, refusal, shapes
from petals_tune.wire.adapter import AdapterPart


class IA3(LinearMethod):
    name: ClassVar[str] = "ia3"
    usage: ClassVar[str] = "tuning=ia3 (peft.IA3Config)"
    peft_type: ClassVar[str | None] = "IA3"

    @functools.cached_property
    def peft_layers(self) -> tuple[type, type]:
        from peft.tuners.ia3 import IA3Layer, Linear

        return IA3Layer, Linear

    def tensors(self, layer: Any, adapter: str) -> list[torch.Tensor] | None:
        return [layer.ia3_l[adapter]] if adapter in layer.ia3_l else None

    def check_shapes(self, part: AdapterPart, inputs: int, outputs: int) -> None:
        if shapes(part) not in ([(outputs, 1)], [(1, inputs)]):
            raise refusal(
                part,
                f"IA3 on {(inputs, outputs)} needs factors (1, {inputs}) of its inputs or ({outputs}, 1) of its "
                f"outputs, not {shapes(part)}",
            )

    def is_at_input(self, part: AdapterPart) -> bool:
        return part.tensors[0].shape[1] > 1

    def change_input(self, part: AdapterPart, x: torch.Tensor, *, training: bool) -> torch.Tensor:
        factors = part.tensors[0].flatten()
        return (x.to(factors.dtype) * factors).to(x.dtype)

    def change_output(
        self, part: AdapterPart, x: torch.Tensor, output: torch.Tensor, *, training: bool
    ) -> torch.Tensor:
        return (output * part.tensors[0].flatten()).to(output.dtype)

    def stack_kind(self, part: AdapterPart) -> Hashable | None:
        return "float32" if part.tensors[0].dtype is torch.float32 else None

    def empty_stack(self, part: AdapterPart, slots: int) -> list[torch.Tensor]:
        return [part.tensors[0].new_ones(slots, 1, part.tensors[0].numel())]

    def put(self, stack: Sequence[torch.Tensor], slot: int, part: AdapterPart) -> bool:
        stack[0][slot] = part.tensors[0].flatten()
        return True

    def change_rows(self, stack: Sequence[torch.Tensor], x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return (output * stack[0]).to(output.dtype)

    def position_bytes(self, part: AdapterPart, *, training: bool) -> PositionBytes:
        features = part.tensors[0].numel()
        return PositionBytes(kept=4 * features, working=4 * 3 * features)

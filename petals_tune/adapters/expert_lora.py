"""LoRA on the experts of a mixture: each has an A and a B of its own, in two tensors for all.

PEFT's `target_parameters`. A part's tensors are PEFT's: A (E r, in), whose rows are those of one expert after the
other, and B (out, r E), whose columns take the experts by turns. Its module is the path of the parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from petals_tune.adapters.base import (
    AdapterMethod,
    ExpertShape,
    PositionBytes,
    chosen_adapters,
    expert_parameters,
    refusal,
    shapes,
)
from petals_tune.errors import UnsupportedAdapter
from petals_tune.wire.adapter import AdapterPart

_Matrices = tuple[torch.Tensor, torch.Tensor]  # of one expert: A (r, in), B (out, r)


class ExpertLoRA(AdapterMethod):
    name: ClassVar[str] = "expert_lora"
    usage: ClassVar[str] = "tuning=lora with tuning.target_parameters (experts)"
    on_experts: ClassVar[bool] = True

    @functools.cached_property
    def _peft_layer(self) -> type:
        from peft.tuners.lora.layer import ParamWrapper

        return ParamWrapper

    def owns(self, layer: nn.Module) -> bool:
        return isinstance(layer, self._peft_layer)

    def collect(
        self, layer: Any, *, block: int, path: str, names: Sequence[str] | None
    ) -> Iterator[tuple[AdapterPart, list[torch.Tensor]]]:
        # Wrappers of several parameters of one module are nested.
        module, name = path.replace(".base_layer", ""), layer.parameter_name
        where = f"block {block}, {module}.{name}"
        if not any(each.name == name and layer.num_experts > 1 for each in expert_parameters(layer.get_base_layer())):
            raise UnsupportedAdapter(
                f"{where} has no matrices of several experts; name linears in target_modules",
                key="tuning.target_parameters",
                seen=name,
            )
        if layer.merged:
            raise UnsupportedAdapter(
                f"{where}: LoRA was merged, and the block's weights are on the servers; call unmerge_adapter()",
                key="tuning",
                seen="merged",
            )
        for adapter in chosen_adapters(layer, names):
            if adapter in layer.lora_A:
                tensors = [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
                part = AdapterPart(
                    block=block,
                    method=self.name,
                    module=f"{module}.{name}",
                    scaling=float(layer.scaling[adapter]),
                    tensors=[tensor.detach() for tensor in tensors],
                )
                yield part, tensors

    def check(self, part: AdapterPart, module: nn.Module, hidden_size: int) -> None:
        shape: ExpertShape | None = getattr(module, "for_adapters", None)
        if shape is None:
            raise refusal(part, "there are no experts there")
        found, experts = shapes(part), shape.experts
        fits = len(found) == 2 and found[0][1:] == (shape.inputs,) and found[1] == (shape.outputs, found[0][0])
        if not fits or not found[0][0] or found[0][0] % experts:
            raise refusal(
                part,
                f"LoRA on {experts} experts of {(shape.inputs, shape.outputs)} needs A ({experts} r, {shape.inputs}) "
                f"and B ({shape.outputs}, {experts} r), not {found}",
            )
        if part.dropout:
            raise refusal(part, "dropout of experts' inputs is not LoRA's; PEFT refuses it too")

    def is_at_input(self, part: AdapterPart) -> bool:
        return False

    def split(self, part: AdapterPart, shape: ExpertShape) -> Sequence[_Matrices]:
        a, b = part.tensors
        rank = len(a) // shape.experts
        of_a = a.view(shape.experts, rank, shape.inputs).unbind()
        of_b = b.view(shape.outputs, rank, shape.experts).unbind(-1)
        if shape.swapped:
            return [(right.t(), left.t()) for left, right in zip(of_a, of_b, strict=True)]
        return list(zip(of_a, of_b, strict=True))

    def change_product(self, part: AdapterPart, own: Any, x: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        a, b = own
        return product + (F.linear(F.linear(x.to(a.dtype), a), b) * part.scaling).to(product.dtype)

    def position_bytes(self, part: AdapterPart, *, training: bool) -> PositionBytes:
        """Of one expert that a row passes, as if it had the ranks of all: how many there are is not known here."""
        (_, inputs), outputs = part.tensors[0].shape, part.tensors[1].shape[0]
        rank = min(inputs, outputs, len(part.tensors[0]))
        return PositionBytes(kept=4 * (inputs + rank), working=4 * (2 * inputs + rank + 3 * outputs))

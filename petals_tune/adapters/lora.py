"""LoRA on linears: W x + (B A x) scaling.

Source: Hu et al. 2021, arXiv:2106.09685. A part's tensors are A (r, in) and B (out, r).
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from petals_tune.adapters.base import LinearMethod, PositionBytes, UnsupportedOption, refusal, shapes
from petals_tune.errors import UnsupportedAdapter
from petals_tune.wire.adapter import AdapterPart

_READS_WEIGHTS = "reads the blocks' weights, which are on the servers"


def _option(name: str, config: Any) -> object:
    return getattr(config, name, None)  # younger than the oldest PEFT that works


def _with_target_parameters(name: str, config: Any) -> object:
    return _option("target_parameters", config) and getattr(config, name)


class LoRA(LinearMethod):
    name: ClassVar[str] = "lora"
    usage: ClassVar[str] = "tuning=lora (peft.LoraConfig)"
    peft_type: ClassVar[str | None] = "LORA"
    unsupported: ClassVar[Sequence[UnsupportedOption]] = (
        UnsupportedOption(
            lambda c: c.use_dora, "use_dora=True", _READS_WEIGHTS, "use_dora=False, with use_rslora=True or a larger r"
        ),
        UnsupportedOption(
            lambda c: c.init_lora_weights not in (True, False, "gaussian"),
            "init_lora_weights={config.init_lora_weights!r}",
            _READS_WEIGHTS,
            'init_lora_weights=true or "gaussian"',
        ),
        UnsupportedOption(
            lambda c: c.bias != "none", "bias={config.bias!r}", "trains biases of the blocks", "bias=none"
        ),
        UnsupportedOption(lambda c: c.lora_bias, "lora_bias=True", "puts biases on LoRA's layers", "lora_bias=False"),
        UnsupportedOption(
            lambda c: c.layer_replication,
            "layer_replication",
            "makes blocks that no server holds",
            "layer_replication=null",
        ),
        *(
            UnsupportedOption(
                partial(_with_target_parameters, name),
                f"{name}={{config.{name}}}",
                "is not for target_parameters, as in PEFT",
                instead,
            )
            for name, instead in (("lora_dropout", "lora_dropout=0.0"), ("fan_in_fan_out", "fan_in_fan_out=False"))
        ),
        UnsupportedOption(
            lambda c: c.megatron_config, "megatron_config", "is for Megatron's own layers", "megatron_config=null"
        ),
        *(
            UnsupportedOption(partial(_option, name), name, "changes what LoRA computes", f"{name} to its default")
            for name in (
                "use_qalora",
                "use_bdlora",
                "velora_config",
                "monteclora_config",
                "kasa_config",
                "arrow_config",
                "alora_invocation_tokens",
            )
        ),
    )

    @functools.cached_property
    def peft_layers(self) -> tuple[type, type]:
        from peft.tuners.lora import Linear, LoraLayer

        return LoraLayer, Linear

    def owns(self, layer: nn.Module) -> bool:
        return super().owns(layer) and type(layer).__name__ != "ParamWrapper"  # `ExpertLoRA` has these

    def tensors(self, layer: Any, adapter: str) -> list[torch.Tensor] | None:
        return [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight] if adapter in layer.lora_A else None

    def options(self, layer: Any, adapter: str) -> dict[str, Any]:
        return {
            "scaling": float(layer.scaling[adapter]),
            "dropout": float(getattr(layer.lora_dropout[adapter], "p", 0.0)),
        }

    def check_layer(self, where: str, layer: Any) -> None:
        super().check_layer(where, layer)
        for variant in layer.lora_variant.values():
            if variant is not None:
                kind = type(variant).__name__
                raise UnsupportedAdapter(f"{where}: {kind} changes what LoRA computes", key="tuning", seen=kind)
        for name, linear in layer.lora_B.items():
            if linear.bias is not None:
                raise UnsupportedAdapter(
                    f"{where}: adapter {name!r} has a bias; set lora_bias=False", key="tuning.lora_bias"
                )

    def check_shapes(self, part: AdapterPart, inputs: int, outputs: int) -> None:
        found = shapes(part)
        fits = len(found) == 2 and found[0][1:] == (inputs,) and found[1] == (outputs, found[0][0])
        if not fits or not found[0][0]:
            raise refusal(part, f"LoRA on {(inputs, outputs)} needs A (r, {inputs}) and B ({outputs}, r), not {found}")

    def is_at_input(self, part: AdapterPart) -> bool:
        return False

    def change_output(
        self, part: AdapterPart, x: torch.Tensor, output: torch.Tensor, *, training: bool
    ) -> torch.Tensor:
        a, b = part.tensors
        inside = F.dropout(x.to(a.dtype), part.dropout, training=training)
        return output + (F.linear(F.linear(inside, a), b) * part.scaling).to(output.dtype)

    def stack_kind(self, part: AdapterPart) -> Hashable | None:
        """The rank, rounded up to a power of two: a stack takes no more than twice what its parts do.

        Products of fewer bits round differently in another order, so parts in other types go alone.
        """
        a, _ = part.tensors
        is_float = all(tensor.dtype is torch.float32 for tensor in part.tensors)
        return _stacked_rank(len(a)) if is_float else None

    def empty_stack(self, part: AdapterPart, slots: int) -> list[torch.Tensor]:
        """(G, in, r) and (G, r, out), scaled."""
        (rank, inputs), outputs = part.tensors[0].shape, part.tensors[1].shape[0]
        shapes = (slots, inputs, _stacked_rank(rank)), (slots, _stacked_rank(rank), outputs)
        return [part.tensors[0].new_zeros(shape) for shape in shapes]

    def put(self, stack: Sequence[torch.Tensor], slot: int, part: AdapterPart) -> bool:
        (a, b), rank = (each[slot] for each in stack), len(part.tensors[0])
        a[:, :rank], a[:, rank:] = part.tensors[0].t(), 0.0
        b[:rank], b[rank:] = part.tensors[1].t() * part.scaling, 0.0
        return bool(b.isfinite().all())

    def change_rows(self, stack: Sequence[torch.Tensor], x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        a, b = stack
        inside = torch.bmm(x.to(a.dtype), a)
        if output.dtype is b.dtype:
            return torch.baddbmm(output, inside, b)
        return output + torch.bmm(inside, b).to(output.dtype)

    def position_bytes(self, part: AdapterPart, *, training: bool) -> PositionBytes:
        (rank, inputs), outputs = part.tensors[0].shape, part.tensors[1].shape[0]
        copies = 2 if training and part.dropout else 1  # the mask, and what it leaves of the input
        return PositionBytes(kept=4 * (copies * inputs + rank), working=4 * (2 * inputs + rank + 3 * outputs))


def _stacked_rank(rank: int) -> int:
    return 1 << (rank - 1).bit_length()

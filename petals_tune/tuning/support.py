"""From PEFT's layers on a weightless block to what a server can run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from petals_tune.wire.adapter import AdapterPart, AdapterVersion


def collect_adapter(blocks: Sequence[tuple[int, nn.Module]]) -> tuple[AdapterVersion | None, list[torch.Tensor]]:
    """The active LoRA of `blocks` (pairs of number and module) as (a version of it, its tensors).

    The tensors are the client's own parameters, in the order of the version's parts.
    """
    parts, tensors = [], []
    for number, block in blocks:
        for path, layer in block.named_modules():
            if not isinstance(layer, LoraLayer) or layer.disable_adapters:
                continue
            for name in layer.active_adapters:
                if name not in layer.lora_A:
                    continue
                pair = [layer.lora_A[name].weight, layer.lora_B[name].weight]
                dropout = layer.lora_dropout[name]
                parts.append(
                    AdapterPart(
                        block=number,
                        method="lora",
                        module=path,
                        scaling=float(layer.scaling[name]),
                        dropout=float(getattr(dropout, "p", 0.0)),
                        tensors=[tensor.detach() for tensor in pair],
                    )
                )
                tensors += pair
    if not parts:
        return None, []
    return AdapterVersion(version=_digest(parts), parts=tuple(parts)), tensors


def _digest(parts: Sequence[AdapterPart]) -> str:
    """Names the content: a version that was seen before needs no second upload."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(repr((part.block, part.method, part.module, part.scaling, part.dropout)).encode())
        for tensor in part.tensors:
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()

"""One forward for the experts of all families, which multiplies by the experts alone that rows were sent to.

transformers describes an experts module by attributes (`use_experts_implementation` in its integrations/moe.py):
`has_gate`, `has_bias`, `has_post_expert_norm` and `_apply_gate`. Families without them keep their own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from petals_tune.blocks.experts.stack import ExpertStack


def use_expert_forward(model: nn.Module) -> None:
    """Replace the forwards of experts modules that hold stacks, in place."""
    for module in model.modules():
        is_described = hasattr(type(module), "_apply_gate")
        if is_described and any(isinstance(child, ExpertStack) for child in module.children()):
            module.forward = partial(experts_forward, module)


def experts_forward(
    experts: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum (N, H) of the outputs of K experts a row, for rows `hidden` (N, H).

    `top_k_index` (N, K) has the experts' numbers; one that is no expert's adds nothing. `top_k_weights` is (N, K).
    """
    rows, choices = top_k_index.shape
    chosen, order = top_k_index.reshape(-1).sort(stable=True)
    total = experts.num_experts
    counts = torch.bincount(chosen.clamp(max=total), minlength=total + 1).tolist()  # waits for a GPU, once
    has_gate = getattr(experts, "has_gate", True)
    inside = _products(experts, "gate_up_proj" if has_gate else "up_proj", hidden[order // choices], chosen, counts)
    inside = experts._apply_gate(inside) if has_gate else experts.act_fn(inside)
    output = _products(experts, "down_proj", inside, chosen, counts)
    if getattr(experts, "has_post_expert_norm", False):
        output = experts.post_expert_norm(output)
    weighted = output * top_k_weights.reshape(-1)[order][:, None]
    if counts[total]:
        weighted = weighted.masked_fill((chosen >= total)[:, None], 0)
    return weighted[order.argsort()].view(rows, choices, -1).sum(1).to(hidden.dtype)


def _products(experts: Any, name: str, x: torch.Tensor, chosen: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The product of each row of `x` (rows, in) with the matrix `name` of its expert, and its bias: (rows, out).

    `chosen` (rows,) has the experts' numbers in order, `counts` the rows of each; the last are no expert's.
    """
    stack: ExpertStack = getattr(experts, name)
    last, hit = len(counts) - 1, [number for number, count in enumerate(counts) if count]
    products = [
        stack(own, number) if number < last else own.new_zeros(len(own), stack.features[1])
        for number, own in zip(hit, x.split([counts[number] for number in hit]), strict=True)
    ]
    product = torch.cat(products)
    has_bias = getattr(experts, "has_bias", False)
    return product + getattr(experts, f"{name}_bias")[chosen.clamp(max=last - 1)] if has_bias else product

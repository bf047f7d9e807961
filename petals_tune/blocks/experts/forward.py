"""One forward for the experts of all families, which multiplies by the experts alone that rows were sent to.

transformers describes an experts module by attributes (`use_experts_implementation` in its integrations/moe.py):
`has_gate`, `has_bias`, `has_post_expert_norm` and `_apply_gate`. Families without them keep their own forward.
"""

from __future__ import annotations

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
    total = max(experts.num_experts, int(experts.down_proj.shape[0]))
    counts = torch.bincount(chosen.clamp(max=total), minlength=total + 1).tolist()  # waits for a GPU, once
    outputs: list[torch.Tensor] = []
    for number, own in enumerate(hidden[order // choices].split(counts)):
        if number == total:
            outputs.append(torch.zeros_like(own))
        elif len(own):
            outputs.append(_one_expert(experts, number, own))
    output = torch.cat(outputs)
    if getattr(experts, "has_post_expert_norm", False):
        output = experts.post_expert_norm(output)
    weighted = output * top_k_weights.reshape(-1)[order][:, None]
    return weighted[order.argsort()].view(rows, choices, -1).sum(1).to(hidden.dtype)


def _one_expert(experts: Any, number: int, x: torch.Tensor) -> torch.Tensor:
    """The output (rows, H) of one expert."""
    has_gate, has_bias = getattr(experts, "has_gate", True), getattr(experts, "has_bias", False)
    inside = _product(experts, "gate_up_proj" if has_gate else "up_proj", number, x, has_bias)
    inside = experts._apply_gate(inside) if has_gate else experts.act_fn(inside)
    return _product(experts, "down_proj", number, inside, has_bias)


def _product(experts: Any, name: str, number: int, x: torch.Tensor, has_bias: bool) -> torch.Tensor:
    product = getattr(experts, name)(x, number)
    return product + getattr(experts, f"{name}_bias")[number] if has_bias else product

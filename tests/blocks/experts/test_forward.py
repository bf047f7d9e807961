from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation

from petals_tune.blocks.experts.forward import experts_forward, use_expert_forward
from petals_tune.blocks.experts.stack import expert_stacks, replace_by_stacks
from petals_tune.blocks.quantization import find_scheme
from tests.models import relative_error

E, H, F = 5, 6, 8  # experts, hidden size, size inside
EVERY = list(itertools.product([True, False], repeat=4))


def described_experts(*, has_gate: bool, has_bias: bool, is_transposed: bool, has_post_expert_norm: bool) -> nn.Module:
    """A module as transformers describes those of its families, with random weights."""

    class Experts(nn.Module):
        def __init__(self, config: PretrainedConfig):
            super().__init__()
            self.num_experts, self.act_fn, self.post_expert_norm = E, nn.SiLU(), nn.LayerNorm(H)
            up, inside = ("gate_up_proj", 2 * F) if has_gate else ("up_proj", F)
            for name, outputs, inputs in ((up, inside, H), ("down_proj", H, F)):
                shape = (E, inputs, outputs) if is_transposed else (E, outputs, inputs)
                setattr(self, name, nn.Parameter(torch.randn(shape)))
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, outputs)))

        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            raise AssertionError("not called here")

    decorated: Any = use_experts_implementation(
        has_gate=has_gate, has_bias=has_bias, is_transposed=is_transposed, has_post_expert_norm=has_post_expert_norm
    )(Experts)
    return decorated(PretrainedConfig())


def with_stacks(experts: nn.Module) -> nn.Module:
    weights = {name: weight for name, weight in experts.named_parameters() if name.endswith("_proj")}
    replace_by_stacks(experts, find_scheme("none"))
    for name, stack in expert_stacks(experts).items():
        stack.fill(weights[name].detach().__getitem__, "cpu")
    return experts


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of four rows, their experts and the weights of these; nobody goes to expert 2."""
    index = torch.tensor([[0, 4], [4, 3], [1, 0], [4, 1]])
    return torch.randn(4, H, requires_grad=True), index, torch.rand(4, 2, requires_grad=True)


@pytest.mark.parametrize(("has_gate", "has_bias", "is_transposed", "has_post_expert_norm"), EVERY)
def test_it_is_the_librarys_function(has_gate, has_bias, is_transposed, has_post_expert_norm):
    torch.manual_seed(0)
    experts = described_experts(
        has_gate=has_gate,
        has_bias=has_bias,
        is_transposed=is_transposed,
        has_post_expert_norm=has_post_expert_norm,
    )
    hidden, index, weights = routed()
    wanted = batched_mm_experts_forward(experts, hidden, index, weights)
    grad = torch.randn(wanted.shape)
    wanted_grads = torch.autograd.grad(wanted, (hidden, weights), grad)
    found = experts_forward(with_stacks(experts), hidden, index, weights)
    assert relative_error(found, wanted) <= 1e-6
    for mine, its in zip(torch.autograd.grad(found, (hidden, weights), grad), wanted_grads, strict=True):
        assert relative_error(mine, its) <= 1e-6


def test_a_number_that_is_no_experts_adds_nothing():
    torch.manual_seed(0)
    plain = partial(described_experts, has_gate=True, has_bias=False, is_transposed=False, has_post_expert_norm=False)
    experts = with_stacks(plain())
    hidden, index, weights = routed()
    found = experts_forward(experts, hidden, torch.where(index == 4, E, index), weights)
    wanted = experts_forward(experts, hidden, index, torch.where(index == 4, 0, weights))
    assert torch.allclose(found, wanted)


def test_modules_without_stacks_keep_their_forward():
    experts = described_experts(has_gate=True, has_bias=False, is_transposed=False, has_post_expert_norm=False)
    use_expert_forward(nn.Sequential(experts))
    assert "forward" not in vars(experts)
    use_expert_forward(nn.Sequential(with_stacks(experts)))
    assert "forward" in vars(experts)

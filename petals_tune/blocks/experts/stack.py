"""Weights of experts, held in the place of a parameter of three dimensions, and multiplied one expert at a time.

transformers keeps the matrices of all experts of a layer in one parameter (E, out, in), or (E, in, out) in some
families. A stack takes its name in the module, so that the names of adapters fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from petals_tune.adapters.base import ExpertParameter, expert_parameters
from petals_tune.blocks.quantization.base import Quantization


class ExpertStack(nn.Module):
    """Frozen matrices (out, in) of E experts. Without tensors until it is filled: its shape alone is needed before."""

    numbers: torch.Tensor  # as the scheme stores them, by experts
    scales: torch.Tensor

    def __init__(self, parameter: ExpertParameter, scheme: Quantization):
        super().__init__()
        self.shape = torch.Size(parameter.shape)  # of the parameter whose place it takes
        self.transposed = parameter.transposed
        self.for_adapters = parameter.for_adapters
        self.scheme = scheme
        self._is_hf_initialized = True  # or transformers would initialize it while it loads

    @property
    def features(self) -> tuple[int, int]:
        """(inputs, outputs) of one expert."""
        _, first, second = self.shape
        return (first, second) if self.transposed else (second, first)

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """x (rows, in) W^T (rows, out) by the matrix W (out, in) of an expert, differentiable in x."""
        inputs, outputs = self.features
        return self.scheme.multiply(x, self.numbers[expert], self.scales[expert], (outputs, inputs))

    def fill(self, matrix_of: Callable[[int], torch.Tensor], device: torch.device | str) -> None:
        """Quantize what `matrix_of` gives for each expert, in the parameter's layout: one is in memory in full."""
        for expert in range(self.shape[0]):
            matrix = matrix_of(expert).to(device)
            numbers, scales = self.scheme.quantize_matrix(matrix.t() if self.transposed else matrix)
            if expert == 0:
                self.put(*(each.new_empty(self.shape[0], *each.shape) for each in (numbers, scales)))
            self.numbers[expert], self.scales[expert] = numbers, scales

    def put(self, numbers: torch.Tensor, scales: torch.Tensor) -> None:
        """Hold these tensors: of all experts, quantized before."""
        self.register_buffer("numbers", numbers)
        self.register_buffer("scales", scales)

    # Families with a forward of their own index the parameter and multiply: what comes of it stands for a matrix.

    def __getitem__(self, expert: Any) -> _Matrix:
        return _Matrix(self, int(expert))

    def view(self, *shape: Any) -> ExpertStack:
        """The stack itself: DBRX's parameter has two dimensions and is viewed as three."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`torch.bmm` of x (E, rows, in) with the stack, as Llama 4 does."""
        if func is not torch.bmm or not args[1].transposed:
            raise TypeError(f"{func} of quantized experts is not known here")
        x, stack = args
        return torch.stack([stack(part, number) for number, part in enumerate(x)])


class _Matrix:
    """The matrix of one expert in the layout of the parameter, or its transpose (`flipped`): multiplied, never made."""

    def __init__(self, stack: ExpertStack, expert: int, *, flipped: bool = False):
        self._stack, self._expert, self._flipped = stack, expert, flipped

    @property
    def T(self) -> _Matrix:  # torch's name
        return _Matrix(self._stack, self._expert, flipped=not self._flipped)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x, matrix, *bias = args
        from_left = {F.linear: False, torch.matmul: True, torch.Tensor.matmul: True}
        if func not in from_left or (from_left[func] ^ matrix._flipped) is not matrix._stack.transposed:
            raise TypeError(f"{func} of a quantized expert is not known here")
        product = matrix._stack(x, matrix._expert)
        return product + bias[0] if bias and bias[0] is not None else product


def expert_stacks(module: nn.Module) -> dict[str, ExpertStack]:
    """The stacks in a module, by their paths."""
    return {path: inner for path, inner in module.named_modules() if isinstance(inner, ExpertStack)}


def replace_by_stacks(block: nn.Module, scheme: Quantization) -> None:
    """Put empty stacks in the place of the parameters of experts in a block, which may be on the meta device."""
    for module in list(block.modules()):
        for parameter in list(expert_parameters(module)):
            delattr(module, parameter.name)
            setattr(module, parameter.name, ExpertStack(parameter, scheme))
            module._is_hf_initialized = True  # type: ignore[assignment]  # transformers would initialize the parameter

"""Weights of experts, held in the place of a parameter of three dimensions, and multiplied one expert at a time.

transformers keeps the matrices of all experts of a layer in one parameter (E, out, in), or (E, in, out) in some
families. A stack takes its name in the module, so that the names of adapters fit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from petals_tune.blocks.kernels import FrozenProduct
from petals_tune.blocks.quantization.base import Quantization

# Experts that multiply from the left of (in, out), and have no attribute that says so.
_TRANSPOSED = {("Llama4TextExperts", "gate_up_proj"), ("Llama4TextExperts", "down_proj"), ("DbrxExpertGLU", "w2")}

# (x (rows, in), number of the expert) -> what is added to the product (rows, out); None: nothing in this call.
Addition = Callable[[torch.Tensor, int], torch.Tensor | None]


class ExpertStack(nn.Module):
    """Frozen matrices (out, in) of E experts. `transposed`: the parameter whose place it takes is (E, in, out)."""

    addition: Addition | None = None  # of the adapters in the current call

    def __init__(self, shape: tuple[int, int, int], *, transposed: bool):
        super().__init__()
        self.shape = torch.Size(shape)  # of the parameter
        self.transposed = transposed
        self._is_hf_initialized = True  # or transformers would initialize it while it loads

    @property
    def features(self) -> tuple[int, int]:
        """(inputs, outputs) of one expert."""
        _, first, second = self.shape
        return (first, second) if self.transposed else (second, first)

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def multiply(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """x (rows, in) W^T (rows, out) by the frozen matrix W (out, in) of an expert, differentiable in x."""

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """The product of rows `x` (rows, in) with the matrix of one expert and what adapters add to it (rows, out)."""
        product = self.multiply(x, expert)
        added = None if self.addition is None else self.addition(x, expert)
        return product if added is None else product + added.to(product.dtype)

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


class FloatStack(ExpertStack):
    """The parameter itself, whose experts are multiplied one by one: for adapters on experts in full."""

    def __init__(self, weight: nn.Parameter, shape: tuple[int, int, int], *, transposed: bool):
        super().__init__(shape, transposed=transposed)
        self.weight = weight

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def multiply(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        matrix = self.weight.view(self.shape)[expert]
        return FrozenProduct.apply(x, None, lambda: matrix.t() if self.transposed else matrix)


class QuantizedStack(ExpertStack):
    """Quantized matrices. Without tensors until it is filled: its shape alone is needed before."""

    numbers: torch.Tensor
    scales: torch.Tensor

    def __init__(self, shape: tuple[int, int, int], *, transposed: bool, scheme: Quantization):
        super().__init__(shape, transposed=transposed)
        self.scheme = scheme

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    def multiply(self, x: torch.Tensor, expert: int) -> torch.Tensor:
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


def expert_parameters(module: nn.Module) -> Iterator[tuple[str, tuple[int, int, int], bool]]:
    """(name, (E, rows, columns), transposed) of each parameter of a module that holds the matrices of experts."""
    kind = type(module).__name__
    if "Expert" not in kind:
        return
    for name, parameter in module.named_parameters(recurse=False):
        shape = tuple(parameter.shape)
        if len(shape) == 2 and (experts := getattr(module, "moe_num_experts", 0)):  # DBRX
            shape = (experts, shape[0] // experts, shape[1])
        if len(shape) == 3:
            transposed = bool(getattr(module, "is_transposed", False)) or (kind, name) in _TRANSPOSED
            yield name, shape, transposed


def expert_stacks(module: nn.Module) -> dict[str, QuantizedStack]:
    """The quantized stacks in a module, by their paths."""
    return {path: inner for path, inner in module.named_modules() if isinstance(inner, QuantizedStack)}


def replace_by_stacks(block: nn.Module, scheme: Quantization) -> None:
    """Put empty stacks in the place of the parameters of experts in a block, which may be on the meta device."""
    for module in list(block.modules()):
        for name, shape, transposed in list(expert_parameters(module)):
            delattr(module, name)
            setattr(module, name, QuantizedStack(shape, transposed=transposed, scheme=scheme))
            module._is_hf_initialized = True  # type: ignore[assignment]  # transformers would initialize the parameter

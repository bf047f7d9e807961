"""Base class of the quantization schemes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from petals_tune.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig


class Quantization(ABC):
    """How the weights of linears are stored and multiplied. Instances have no state; what is no linear stays as it is.

    This class is the base of schemes by bitsandbytes, whose modules transformers puts in place of linears while it
    loads a model.
    """

    name: ClassVar[str]  # in the configuration, and in a server's record
    stored_as: ClassVar[str] = ""  # the scheme whose quantized blocks on the disk it uses; "": its own
    on_request: ClassVar[bool] = False  # clients use servers in this scheme only where they name it

    @abstractmethod
    def loading_config(self, dtype: torch.dtype) -> BitsAndBytesConfig | None:
        """What transformers is given to quantize full weights while it loads them; `dtype` is the computation's."""

    def stored_config(self, dtype: torch.dtype) -> BitsAndBytesConfig | None:
        """What transformers is given to load weights that are stored quantized; None where they are stored in full."""
        return self.loading_config(dtype)

    @abstractmethod
    def weight_bytes(self, inputs: int, outputs: int, dtype: torch.dtype) -> float:
        """What the weight of a linear takes, with its scales."""

    def weight_copies(self, device: str) -> int:
        """How many copies of the weights are in memory on `device` once a session has generated."""
        return 1

    @abstractmethod
    def scales(self, weight: nn.Parameter) -> list[torch.Tensor]:
        """The tensors that are kept beside the quantized numbers of `weight`."""

    @abstractmethod
    def quantize_matrix(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize one expert's `matrix` (out, in): (its numbers, their scales)."""

    @abstractmethod
    def multiply(
        self, x: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        """x (..., in) W^T (..., out) by a quantized matrix W of `shape` (out, in), with the arithmetic of a linear.

        Differentiable in x alone; the backward unpacks W again.
        """

    def keeps_hidden_input(self, module: nn.Module) -> bool:
        """Does `module` keep its input for the backward where autograd's saved-tensor hooks do not see it?"""
        return False

    def fast_class(self, linear: nn.Linear) -> type[nn.Linear] | None:
        """A class with a faster forward that the quantized `linear` can be given; None where there is none."""
        return None

    def set_mode(self, model: nn.Module, *, training: bool) -> None:
        """Turn dropout on or off. bitsandbytes' linears stay in training mode always.

        In eval mode, those of int8 quantize the activations too: it is less exact, and on a CPU the result of a row
        depends on the rows beside it.
        """
        model.train(training)
        for module in model.modules():
            if type(module).__module__.startswith("bitsandbytes."):
                module.train(True)

    def is_available(self, device: str) -> bool:
        """Can the weights be quantized and multiplied on `device` here?"""
        from bitsandbytes import supported_torch_devices

        return device.partition(":")[0] in supported_torch_devices

    def check_available(self, device: str) -> None:
        """Raises ConfigError where the scheme cannot be used on `device`."""
        if not self.is_available(device):
            raise ConfigError(
                f"quantization={self.name} cannot be used on device={device}; quantization=none works everywhere",
                key="quantization",
                seen=self.name,
            )

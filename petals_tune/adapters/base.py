"""Base classes of the adapter methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from petals_tune.errors import RequestRefused, UnsupportedAdapter
from petals_tune.wire.adapter import AdapterPart


@dataclass(frozen=True)
class UnsupportedOption:
    """An option of a PEFT config that remote blocks do not honour."""

    is_set: Callable[[Any], object]  # asked of the config
    what: str  # formatted with the config: the option as it is typed
    why: str
    instead: str


class PositionBytes(NamedTuple):
    """Upper bounds of the memory of one part, for each position of a row."""

    kept: int  # by the graph, for the backward
    working: int  # beside that, while the part is applied or differentiated


class ExpertShape(NamedTuple):
    """A parameter with the matrices of experts, as PEFT takes it for LoRA: a change of it is B A, or (B A)^T."""

    experts: int
    inputs: int
    outputs: int
    swapped: bool  # PEFT takes the parameter's inputs for outputs: x is multiplied by B A from the left


class AdapterMethod(ABC):
    """One way to adapt a block. Instances have no state.

    The client's half turns PEFT's layers on blocks without weights into parts, and imports PEFT on use: servers do not.
    The server's half applies parts to the real blocks, by hooks on a part's module: a linear, the matrices of experts,
    or the block itself.
    """

    name: ClassVar[str]  # on the wire
    usage: ClassVar[str]  # how a user chooses it
    peft_type: ClassVar[str | None] = None  # of the configs that put it on blocks; None: it is no method of PEFT's
    unsupported: ClassVar[Sequence[UnsupportedOption]] = ()
    first_step_only: ClassVar[bool] = False  # of a generation session
    on_experts: ClassVar[bool] = False  # its modules are matrices of experts, of which each row passes some
    once_a_module: ClassVar[bool] = False  # a module takes one part of this method at most

    # The client's half.

    def check_config(self, config: Any) -> None:
        """Raises UnsupportedAdapter for an option that blocks on servers cannot honour."""
        for option in self.unsupported:
            if option.is_set(config):
                what = option.what.format(config=config)
                raise UnsupportedAdapter(
                    f"tuning.{what} {option.why}; set {option.instead}", key=f"tuning.{what.partition('=')[0]}"
                )

    @abstractmethod
    def owns(self, layer: nn.Module) -> bool:
        """Is `layer` one that this method put on a block?"""

    @abstractmethod
    def collect(
        self, layer: Any, *, block: int, path: str, names: Sequence[str] | None
    ) -> Iterator[tuple[AdapterPart, list[torch.Tensor]]]:
        """The adapters `names` of a layer, each with the client's own parameters in the order of the part's tensors.

        `path` is the layer's inside its block; without `names`, PEFT's active adapters count. Raises UnsupportedAdapter
        for what a server would not run.
        """

    # The server's half.

    @abstractmethod
    def check(self, part: AdapterPart, module: nn.Module, hidden_size: int) -> None:
        """Raises RequestRefused for a part that does not fit `module`; its tensors are finite floats."""

    @abstractmethod
    def is_at_input(self, part: AdapterPart) -> bool:
        """Does the part change the input of its module, and not the output?"""

    def change_input(self, part: AdapterPart, x: torch.Tensor, *, training: bool) -> torch.Tensor:
        """The input to use instead of `x`."""
        raise NotImplementedError

    def change_output(
        self, part: AdapterPart, x: torch.Tensor, output: torch.Tensor, *, training: bool
    ) -> torch.Tensor:
        """The output to use instead of `output`, which the module computed from `x`."""
        raise NotImplementedError

    def stack_kind(self, part: AdapterPart) -> Hashable | None:
        """What parts have in common that can be in one stack at a module; None: this one cannot be in any."""
        return None

    def empty_stack(self, part: AdapterPart, slots: int) -> list[torch.Tensor]:
        """The tensors (G, ...) of a stack with `slots` slots, for parts of the kind of `part`."""
        raise NotImplementedError

    def put(self, stack: Sequence[torch.Tensor], slot: int, part: AdapterPart) -> bool:
        """Copy `part` into a slot; False where its numbers would not be the same there."""
        raise NotImplementedError

    def change_rows(self, stack: Sequence[torch.Tensor], x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What to use instead of `output` (G, P, out), which the module computed from `x` (G, P, in).

        Row g is changed by the part in slot g alone. Of a part at the input, `output` is the input.
        """
        raise NotImplementedError

    def split(self, part: AdapterPart, shape: ExpertShape) -> Sequence[Any]:
        """What the part has for each expert: made once for all experts that a call multiplies by."""
        raise NotImplementedError

    def change_product(self, part: AdapterPart, own: Any, x: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """The product to use instead of that of rows `x` with one expert's matrix; `own` is what `split` has for it."""
        raise NotImplementedError

    @abstractmethod
    def position_bytes(self, part: AdapterPart, *, training: bool) -> PositionBytes:
        """What the part adds to the memory of a forward and its backward; part of what bounds a request's memory."""

    def least_positions(self, part: AdapterPart) -> int:
        """The shortest sequence that the part can be applied to."""
        return 0


class LinearMethod(AdapterMethod):
    """A method of PEFT's whose layers wrap linears."""

    @property
    @abstractmethod
    def peft_layers(self) -> tuple[type, type]:
        """PEFT's base class of the method's layers, and the class for linears."""

    @abstractmethod
    def tensors(self, layer: Any, adapter: str) -> list[torch.Tensor] | None:
        """The client's parameters of one adapter; None where the layer has none of that name."""

    def options(self, layer: Any, adapter: str) -> dict[str, Any]:
        """Further fields of the part."""
        return {}

    def check_layer(self, where: str, layer: Any) -> None:
        """Raises UnsupportedAdapter for what a server would not run."""
        base, merged = layer.get_base_layer(), layer.merged
        if type(layer) is not self.peft_layers[1] or linear_features(base) is None:
            raise UnsupportedAdapter(
                f"{where} is a {type(base).__name__}; {self.peft_type} on remote blocks is for linears: name these in "
                "target_modules",
                key="tuning.target_modules",
                seen=type(base).__name__,
            )
        if merged:
            raise UnsupportedAdapter(
                f"{where}: {self.peft_type} was merged, and the block's weights are on the servers; call "
                "unmerge_adapter()",
                key="tuning",
                seen="merged",
            )

    def owns(self, layer: nn.Module) -> bool:
        return isinstance(layer, self.peft_layers[0])

    def collect(
        self, layer: Any, *, block: int, path: str, names: Sequence[str] | None
    ) -> Iterator[tuple[AdapterPart, list[torch.Tensor]]]:
        self.check_layer(f"block {block}, {path}", layer)
        for adapter in chosen_adapters(layer, names):
            if (tensors := self.tensors(layer, adapter)) is not None:
                part = AdapterPart(
                    block=block,
                    method=self.name,
                    module=path,
                    tensors=[tensor.detach() for tensor in tensors],
                    **self.options(layer, adapter),
                )
                yield part, tensors

    def check(self, part: AdapterPart, module: nn.Module, hidden_size: int) -> None:
        features = linear_features(module)
        if features is None:
            raise refusal(part, f"there is no linear for a {self.name!r} there")
        self.check_shapes(part, *features)

    @abstractmethod
    def check_shapes(self, part: AdapterPart, inputs: int, outputs: int) -> None:
        """Raises RequestRefused for tensors that do not fit a linear of these features."""


def chosen_adapters(layer: Any, names: Sequence[str] | None) -> Sequence[str]:
    """Return `names`, or where they are None, the adapters that are active in a layer of PEFT's."""
    if names is not None:
        return names
    active: Sequence[str] = () if layer.disable_adapters else layer.active_adapters
    return active


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear, quantized or not, or of GPT-2's Conv1D; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        inputs, outputs = module.get_parameter("weight").shape
        return inputs, outputs
    return None


# Experts whose inputs are rows of their matrices, without an attribute that says so.
_TRANSPOSED = {("Llama4TextExperts", "gate_up_proj"), ("Llama4TextExperts", "down_proj"), ("DbrxExpertGLU", "w2")}


class ExpertParameter(NamedTuple):
    """A parameter of a module that holds the matrices of experts, (E, out, in) or `transposed`, (E, in, out)."""

    name: str
    shape: tuple[int, int, int]
    transposed: bool
    is_transposed: bool  # the module's attribute of that name, which PEFT reads; some families lack it

    @property
    def for_adapters(self) -> ExpertShape:
        experts, first, second = self.shape
        inputs, outputs = (first, second) if self.is_transposed else (second, first)
        return ExpertShape(experts, inputs, outputs, self.transposed and not self.is_transposed)


def expert_parameters(module: nn.Module) -> Iterator[ExpertParameter]:
    """The parameters of a module of transformers that hold the matrices of experts."""
    kind = type(module).__name__
    if "Expert" not in kind:
        return
    is_transposed = bool(getattr(module, "is_transposed", False))
    for name, parameter in module.named_parameters(recurse=False):
        shape = tuple(parameter.shape)
        if len(shape) == 2 and (experts := getattr(module, "moe_num_experts", 0)):  # DBRX
            shape = (experts, shape[0] // experts, shape[1])
        if len(shape) == 3:
            yield ExpertParameter(name, shape, is_transposed or (kind, name) in _TRANSPOSED, is_transposed)


def shapes(part: AdapterPart) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in part.tensors]


def refusal(part: AdapterPart, reason: str) -> RequestRefused:
    where = f"adapter on block {part.block} {part.module}".rstrip()
    return RequestRefused(f"{where}: {reason}", reason="adapter", block=part.block, module=part.module)

"""GPUs that do not exist: CPU numbers in tensors that say they are on cuda:0 or cuda:1 and refuse to mix with others.

    with pretended_gpus():                  # moves and factories obey `device=` in here
        put_on(model, "cuda:0")
        model(inputs.to("cuda:0"))          # an operation on tensors of two devices raises RuntimeError

What CUDA allows is allowed: copies between devices, numbers (0-dim tensors) of the CPU beside tensors of a GPU, and
indices in host memory. Streams, kernels and memory are not modelled; numbers are a CPU's.

    with counted_waits() as waits:          # what would make the host wait for a GPU, each with its place in the code
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from petals_tune import copies
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.loading import LoadedBlocks
from petals_tune.remote.skeleton import is_placeholder

CPU = torch.device("cpu")
_MAY_MIX = {"_to_copy", "copy_", "index", "index_put_", "index_put", "_index_put_impl_"}
# Operations whose result the host needs to go on: a number, or how many there are.
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "repeat_interleave"}

_waits: list[str] | None = None  # of the `counted_waits` that lasts


def _waited(why: str) -> None:
    if _waits is not None:
        ours = [
            each for each in traceback.extract_stack() if each.filename != __file__ and "/torch/" not in each.filename
        ]
        _waits.append(f"{why} at {ours[-1].filename}:{ours[-1].lineno}")


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Yields what would have made the host wait for a GPU within the block, in any thread, but for an inner block."""
    global _waits
    before, _waits = _waits, []
    try:
        yield _waits
    finally:
        _waits = before


class GpuTensor(torch.Tensor):
    """A tensor that holds a CPU tensor and says that it is on `gpu`."""

    values: torch.Tensor
    gpu: torch.device

    # Autograd asks the C++ tensor, which is on the CPU: without CUDA, its threads for cuda:0 do not exist.
    device = property(lambda self: self.gpu)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: torch.Tensor, gpu: torch.device) -> GpuTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=CPU,
            requires_grad=values.requires_grad,
        )
        made.values, made.gpu = values.detach(), gpu
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GpuTensor({tuple(self.shape)}, {self.dtype}, {self.gpu})"

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert a {self.gpu} tensor to numpy: copy it to host memory first")

    def untyped_storage(self) -> Any:
        return self.values.untyped_storage()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def item(self) -> Any:
        _waited("item")
        return self.values.item()

    def tolist(self) -> Any:
        _waited("tolist")
        return self.values.tolist()

    def __bool__(self) -> bool:
        _waited("bool")
        return bool(self.values)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # Autograd makes zeros for the unused parts of a split where the C++ tensor is: here those without rows.
        mixing = [each for each in tensors if isinstance(each, GpuTensor) or (each.dim() > 0 and each.numel())]
        devices = {tensor.device for tensor in mixing}
        if len(devices) > 1 and name not in _MAY_MIX:
            shapes = [(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]
            raise RuntimeError(f"expected all tensors to be on the same device: {func} of {shapes}")
        gpu = next(tensor.gpu for tensor in tensors if isinstance(tensor, GpuTensor))
        if gpu in _failed:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be ...")
        if kwargs.get("device") is not None:
            if name != "_to_copy":  # a cast, by autograd where it names the device: moves are made by `_Move`
                gpu = torch.device(kwargs["device"])
            kwargs["device"] = CPU
        to_or_from_host = name == "copy_" and len({tensor.device for tensor in args[:2]}) > 1
        by_mask = name in ("index", "index_put_") and any(each.dtype is torch.bool for each in tree_leaves(args[1]))
        if name in _WAITS or by_mask or (to_or_from_host and not kwargs.get("non_blocking") and not args[2:]):
            _waited(name)
        args_inside = tree_map(_inside, args)
        if name == "histc":  # which CUDA has for integers too
            args_inside = (args_inside[0].float(), *args_inside[1:])
        output = func(*args_inside, **tree_map(_inside, kwargs))
        if name == "copy_":
            return args[0]
        if gpu == CPU or name == "_local_scalar_dense":
            return output
        own = {id(tensor.values): tensor for tensor in tensors if isinstance(tensor, GpuTensor)}  # of in-place results

        def outside(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or isinstance(value, GpuTensor):
                return value
            return own[id(value)] if id(value) in own else GpuTensor(value, gpu)

        return tree_map(outside, output)


def _inside(value: Any) -> Any:
    return value.values if isinstance(value, GpuTensor) else value


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        ctx.back = tensor.device
        return _placed(_inside(tensor.detach()).clone(), device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _placed(_inside(grad), ctx.back), None


def _placed(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    return values if device.type == "cpu" else GpuTensor(values, _numbered(device))


def _numbered(device: Any) -> torch.device:
    """`cuda` is `cuda:0`."""
    device = torch.device(device)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to` of a machine with GPUs."""
    target, dtype = kwargs.get("device"), kwargs.get("dtype")
    for each in args:
        if isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, torch.Tensor):
            target, dtype = each.device, each.dtype
        elif isinstance(each, torch.device | str):
            target = each
    if target is not None and torch.device(target).type == "meta":
        return _TO(tensor, *args, **kwargs)
    if target is not None and _numbered(target) != _numbered(tensor.device):
        if CPU in (_numbered(target), tensor.device) and not kwargs.get("non_blocking"):
            _waited("to")
        tensor = _Move.apply(tensor, _numbered(target))
    return tensor if dtype is None or dtype is tensor.dtype else _TO(tensor, dtype)


_TO = torch.Tensor.to


class _Factories(TorchFunctionMode):
    """Functions with `device=`, in this thread."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if not _is_gpu(device) or isinstance(args[0] if args else None, GpuTensor):
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor):
            _waited(func.__name__)
        output = func(*args, **{**kwargs, "device": "cpu"})
        return tree_map(lambda x: _placed(x, _numbered(device)) if isinstance(x, torch.Tensor) else x, output)


def _is_gpu(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


class _Stream:
    def synchronize(self) -> None:
        _waited("synchronize")


class _Patches:
    """What is another in torch while any thread has pretended GPUs: backwards run without a mode, moves included."""

    def __init__(self) -> None:
        self._lock, self._users, self._stack = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                moves = {"to": _to, "cpu": lambda tensor: _to(tensor, CPU), "pin_memory": lambda tensor: tensor}
                self._stack.enter_context(mock.patch.multiple(torch.Tensor, **moves))
                self._stack.enter_context(mock.patch.object(copies, "pinned_like", _ordinary_memory))
                self._stack.enter_context(
                    mock.patch.multiple(
                        torch.cuda,
                        default_generators=(torch.default_generator, torch.default_generator),
                        get_device_capability=lambda device=None: (8, 0),
                        get_device_name=lambda device=None: "pretended GPU",
                        current_stream=lambda device=None: _Stream(),
                    )
                )

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stack.close()


def _ordinary_memory(tensor: torch.Tensor) -> torch.Tensor:
    """There is no pinned memory without CUDA."""
    return torch.empty(tensor.shape, dtype=tensor.dtype)


_patches = _Patches()


@contextmanager
def pretended_gpus() -> Iterator[None]:
    """While this lasts, this thread has two GPUs."""
    with _patches, _Factories():
        yield


_failed: set[torch.device] = set()


@contextmanager
def failed_gpu(device: str) -> Iterator[None]:
    """While this lasts, a pretended GPU computes nothing: as CUDA's does after an error that is not of one call."""
    _failed.add(torch.device(device))
    try:
        yield
    finally:
        _failed.clear()


def put_on(model: nn.Module, device: str = "cuda:0") -> nn.Module:
    """Move parameters, buffers and bitsandbytes' scales to a pretended GPU, in place; frozen ones stay frozen."""
    gpu = _numbered(device)
    moved: dict[int, torch.Tensor] = {}  # tied weights stay tied

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, GpuTensor):  # of a block that is on another GPU
            return tensor
        return moved.setdefault(id(tensor), GpuTensor(tensor.detach(), gpu))

    for module in model.modules():
        if hasattr(module, "init_8bit_state") and not isinstance(module.weight, GpuTensor):
            module.init_8bit_state()
            module.state.CB, module.state.SCB = move(module.state.CB), move(module.state.SCB)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not is_placeholder(parameter) and not isinstance(parameter, GpuTensor):
                found = moved.get(id(parameter))
                if found is None:
                    found = nn.Parameter(GpuTensor(parameter.detach(), gpu), requires_grad=parameter.requires_grad)
                    found.CB, found.quant_state = None, _state_on(getattr(parameter, "quant_state", None), move)
                    moved[id(parameter)] = found
                module._parameters[name] = found
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and not is_placeholder(buffer):
                module._buffers[name] = move(buffer)
    return model


def _state_on(state: Any, move: Any) -> Any:
    if state is not None:
        state.absmax, state.code = move(state.absmax), move(state.code)
    return state


class GpuEngine(Engine):
    """An engine whose blocks are on pretended GPUs, whatever thread calls it."""

    def __init__(self, loaded: LoadedBlocks, devices: Sequence[str] = ()):
        """`devices`: of each block, as `load_blocks` puts them; all are on cuda:0 where none are given."""
        devices = devices or ["cuda:0"] * len(loaded.span)
        with pretended_gpus():
            for block, device in zip(loaded.blocks, devices, strict=True):
                put_on(block, device)
            put_on(loaded.model, devices[0])
            super().__init__(loaded)

    @classmethod
    def on_two_cards(cls, loaded: LoadedBlocks) -> GpuEngine:
        """One half of the blocks on each."""
        return cls(loaded, [f"cuda:{2 * number // len(loaded.span)}" for number in range(len(loaded.span))])

    def forward(self, *args: Any, **options: Any) -> Any:
        with pretended_gpus():
            return super().forward(*args, **options)

    def backward(self, *args: Any, **options: Any) -> Any:
        with pretended_gpus():
            return super().backward(*args, **options)

    def step(self, *args: Any) -> Any:
        # Some operations on tensors that wrap others fail in inference mode, inside torch.
        step: Any = Engine.step
        with pretended_gpus(), torch.no_grad():
            return step.__wrapped__(self, *args)

    def step_alone(self, *args: Any) -> Any:
        with pretended_gpus():
            return super().step_alone(*args)

    def prepare_adapter(self, *args: Any) -> Any:
        with pretended_gpus():
            return super().prepare_adapter(*args)

    def check_alive(self) -> None:
        with pretended_gpus():
            super().check_alive()

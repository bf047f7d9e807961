"""Memory of devices: how much is free, how many blocks fit, and errors that say that it was not enough."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import nn

from petals_tune.adapters.base import expert_parameters, linear_features
from petals_tune.blocks.quantization import Quantization
from petals_tune.errors import ConfigError

_GB = 2**30
SPARE = 0.1  # of the free memory: for the rest of the machine; on a GPU, for what its allocator cuts into pieces
COMPUTE_SHARE = 1 / 8  # of the memory, to compute one request, where no limit is set
RECEIVING_SHARE = 1 / 4  # of the host's memory, for requests and replies under way, where no limit is set
# A control group's limit and use, of version 2 and of version 1, as a container sees its own.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def free_bytes(device: str) -> int:
    """Memory that is free on `device` now; inside a container, of what the container may use."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    if device == "mps":  # shares the machine's
        return max(min(free, total_bytes(device) - torch.mps.driver_allocated_memory()), 0)
    for limit, used in _CGROUPS:
        if limit.is_file() and (limit_bytes := limit.read_text().strip()) != "max":
            free = min(free, int(limit_bytes) - int(used.read_text()))
    return max(free, 0)


def total_bytes(device: str) -> int:
    """Memory of `device`; inside a container, what the container may use."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[1]
    if device == "mps":
        return torch.mps.recommended_max_memory()
    total = psutil.virtual_memory().total
    for limit, _ in _CGROUPS:
        if limit.is_file() and (limit_bytes := limit.read_text().strip()) != "max":
            total = min(total, int(limit_bytes))
    return total


def usable_bytes(free: int) -> int:
    """What of `free` memory is used for blocks and budgets."""
    return int(free * (1 - SPARE))


def compute_bytes(devices: Sequence[str], max_gb: float | None) -> int:
    """Memory on any of `devices` to compute one request: `max_gb`; None: a share of all that the smallest has."""
    return int(min(map(total_bytes, devices)) * COMPUTE_SHARE if max_gb is None else max_gb * _GB)


def receiving_bytes(max_gb: float | None) -> int:
    """Host memory for requests and replies under way: `max_gb`; None: a share of all that there is."""
    return int(total_bytes("cpu") * RECEIVING_SHARE if max_gb is None else max_gb * _GB)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough; not all that say so have a class of their own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    texts = (
        "CUBLAS_STATUS_ALLOC_FAILED",
        "DefaultCPUAllocator: can't allocate memory",
        *("CUDA error: out of memory", "HIP error: out of memory", "MPS backend out of memory"),
    )
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def describe_out_of_memory(error: BaseException, devices: Sequence[str]) -> str:
    """How much was asked for, where the error tells, and how much is free: "out of memory: asked for 2.00 GiB, ..."."""
    text = str(error)
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    free = re.search(r"of which ([\d.]+ \w+) is free", text)  # when it was asked for; later, more may be
    left = [free[1]] if free else [f"{free_bytes(device) / _GB:.2f} GiB on {device}" for device in devices]
    return f"out of memory: asked for {asked[1] if asked else 'some'}, free {', '.join(left)}"


def give_back_freed_memory() -> None:
    """Return freed memory to the system: glibc and torch's CUDA allocator keep it, and a block in full is worth it."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Return freed memory of glibc's heap to the system: it keeps what was allocated in pieces of less than 32 MB."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def block_bytes(block: nn.Module, *, quantization: Quantization, dtype: torch.dtype) -> int:
    """Bytes of a block (on the meta device) once it is quantized."""
    quantized = 0.0
    weights: set[int] = set()
    for module in block.modules():
        if (features := linear_features(module)) is not None:
            weights.add(id(module.get_parameter("weight")))
            quantized += quantization.weight_bytes(*features, dtype)
        for parameter in expert_parameters(module):
            weights.add(id(module.get_parameter(parameter.name)))
            experts, first, second = parameter.shape
            inputs, outputs = (first, second) if parameter.transposed else (second, first)
            quantized += experts * quantization.weight_bytes(inputs, outputs, dtype)
    others = [tensor for tensor in (*block.parameters(), *block.buffers()) if id(tensor) not in weights]
    return int(quantized) + sum(tensor.numel() for tensor in others) * dtype.itemsize


def loading_bytes(block: nn.Module, dtype: torch.dtype) -> int:
    """Bytes beside the blocks while one is read: its largest matrix, of a linear or of one expert, and a copy of it."""
    largest = 0
    for module in block.modules():
        if (features := linear_features(module)) is not None:
            largest = max(largest, features[0] * features[1])
        for parameter in expert_parameters(module):
            _, first, second = parameter.shape
            largest = max(largest, first * second)
    return 2 * largest * dtype.itemsize


def blocks_that_fit(free: Sequence[int], budgets: int, one_block: int, working: int, total_blocks: int) -> int:
    """How many blocks of `one_block` bytes fit into the `free` memory of each device.

    Every device has room for all `budgets` for leases and caches, since clients may use its blocks alone.
    `working`: what one request takes while it is computed, or what reading a block does. Raises ConfigError
    where not even one block fits.
    """
    rooms = [usable_bytes(each) - budgets - working for each in free]
    if max(rooms) < one_block:
        raise ConfigError(
            f"{max(free) / _GB:.1f} GB of memory are free, and a server of one block needs "
            f"{(one_block + working + budgets) / (1 - SPARE) / _GB:.1f} GB: {budgets / _GB:.1f} GB for leases and "
            f"caches, {one_block / _GB:.2f} GB for the block and {working / _GB:.2f} GB to load and compute it\n"
            "  lower limits.max_lease_gb, limits.max_cache_gb or limits.max_compute_gb, or say num_blocks=1 to try it",
            key="num_blocks",
        )
    return min(sum(max(room, 0) // one_block for room in rooms), total_blocks)


def spread(blocks: int, devices: Sequence[str], one_block: int) -> list[str]:
    """The device of each of `blocks` blocks in a row: a run on each device, sized by its free memory.

    Each block goes where most is left, so that the fullest device, whose memory bounds the budgets, has the most left
    that it can have.
    """
    left = [usable_bytes(free_bytes(device)) for device in devices]
    counts = [0] * len(devices)
    for _ in range(blocks):
        emptiest = left.index(max(left))
        counts[emptiest] += 1
        left[emptiest] -= one_block
    return [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]

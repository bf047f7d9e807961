"""How many blocks fit into this machine's free memory."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

import psutil
import torch
from torch import nn

from petals_tune.adapters.base import expert_parameters, linear_features
from petals_tune.blocks.quantization import Quantization
from petals_tune.errors import ConfigError

_GB = 2**30
SPARE = 0.1  # of the free memory, for the rest of the machine
COMPUTE_SHARE = 1 / 8  # of the memory, to compute one request, where no limit is set
# A control group's limit and use, of version 2 and of version 1, as a container sees its own.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def find_device(device: str) -> str:
    """`device`; for `auto`, the CUDA GPU with the most free memory where torch can use one, and the CPU elsewhere.

    Raises ConfigError where torch cannot compute on `device` here.
    """
    if device == "auto":
        gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
        device = max(gpus, key=free_bytes, default="cpu")
    check_device(device)
    return device


def device_name(device: str) -> str:
    """The device with its hardware, as in "cuda:0, NVIDIA H100"."""
    hardware = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return f"{device}, {hardware}"


@functools.cache
def _processor() -> str:
    """Return the processor's name and its widest vectors; a container's host name would change at every start."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return f"{' '.join(sorted(names)) or platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def check_device(device: str) -> None:
    """Raises ConfigError where torch cannot compute on `device` here."""
    try:
        torch.device(device)
    except RuntimeError:  # its text lists two dozen devices, most of them never built
        raise ConfigError(
            f"device={device} is no device that torch knows: write auto, cpu, cuda or, of several GPUs, cuda:1",
            key="device",
            seen=device,
        ) from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's build without CUDA asserts that it has it
        reason = str(error).strip().split("\n", 1)[0]
        raise ConfigError(
            f"device={device}: torch {torch.__version__} cannot use it here: {reason}\n"
            "  device=cpu works everywhere; a GPU needs its driver (does nvidia-smi list it?) and torch's build for it "
            "(https://pytorch.org/get-started/locally)",
            key="device",
            seen=device,
        ) from None


def free_bytes(device: str) -> int:
    """Memory that is free on `device` now; inside a container, of what the container may use."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    for limit, used in _CGROUPS:
        if limit.is_file() and (limit_bytes := limit.read_text().strip()) != "max":
            free = min(free, int(limit_bytes) - int(used.read_text()))
    return max(free, 0)


def total_bytes(device: str) -> int:
    """Memory of `device`; inside a container, what the container may use."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[1]
    total = psutil.virtual_memory().total
    for limit, _ in _CGROUPS:
        if limit.is_file() and (limit_bytes := limit.read_text().strip()) != "max":
            total = min(total, int(limit_bytes))
    return total


def compute_bytes(device: str, max_gb: float | None) -> int:
    """Memory on `device` to compute one request: `max_gb`; None: a share of all."""
    return int(total_bytes(device) * COMPUTE_SHARE if max_gb is None else max_gb * _GB)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a request did not fit; cuBLAS and torch's allocator of host memory have no class."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    texts = ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def give_back_freed_memory() -> None:
    """Return freed memory to the system: glibc and torch's CUDA allocator keep it, and a block in full is worth it."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
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


def blocks_that_fit(free: int, budgets: int, one_block: int, working: int, total_blocks: int) -> int:
    """How many blocks of `one_block` bytes fit into `free` beside `budgets` for leases and caches.

    `working`: what one request takes while it is computed, or one block in full while it is loaded. Raises ConfigError
    where not even one block fits.
    """
    room = int(free * (1 - SPARE)) - budgets - working
    if room < one_block:
        raise ConfigError(
            f"{free / _GB:.1f} GB of memory are free, and a server of one block needs "
            f"{(one_block + working + budgets) / (1 - SPARE) / _GB:.1f} GB: {budgets / _GB:.1f} GB for leases and "
            f"caches, {one_block / _GB:.2f} GB for the block and {working / _GB:.2f} GB to load and compute it\n"
            "  lower limits.max_lease_gb, limits.max_cache_gb or limits.max_compute_gb, or say num_blocks=1 to try it",
            key="num_blocks",
        )
    return min(room // one_block, total_blocks)

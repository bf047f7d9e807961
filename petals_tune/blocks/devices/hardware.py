"""Devices of this machine: those that an option names, what they are, and whether they still work."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from petals_tune.blocks.memory import free_bytes, is_out_of_memory
from petals_tune.errors import ConfigError, DeviceFailed

_TYPES = ("cpu", "cuda", "mps")


def find_devices(option: str | Sequence[str]) -> tuple[str, ...]:
    """The devices that the option `device` names, CUDA's with their numbers.

    `auto` is the CUDA GPU with the most free memory where torch can use one, and the CPU elsewhere; one, since a
    machine's other GPUs may have other uses. AMD's GPUs are CUDA's to torch. Raises ConfigError where torch cannot
    compute on one of them here, and for several that are not different GPUs.
    """
    if option == "auto":
        gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
        return (max(gpus, key=free_bytes, default="cpu"),)
    named = [option] if isinstance(option, str) else list(option)
    found = tuple(_usable(device) for device in named)
    if not found or (len(found) > 1 and (len({*found}) < len(found) or not all(map(_is_cuda, found)))):
        raise ConfigError(
            f"device=[{','.join(named)}]: several devices are different GPUs, as in 'device=[cuda:0,cuda:1]'",
            key="device",
            seen=named,
        )
    return found


def _usable(device: str) -> str:
    """The full name of `device`: `cuda` is `cuda:0`. Raises ConfigError where torch cannot compute on it here."""
    try:
        parsed = torch.device(device)
    except RuntimeError:  # its text lists two dozen devices, most of them never built
        parsed = None
    if parsed is None or parsed.type not in _TYPES:
        raise ConfigError(
            f"device={device} is no device for blocks: write auto, cpu, cuda or, of several GPUs, cuda:1",
            key="device",
            seen=device,
        )
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
    return f"cuda:{parsed.index or 0}" if parsed.type == "cuda" else parsed.type


def is_accelerator(device: str) -> bool:
    """Whether `device` has memory and failures of its own: any but the CPU."""
    return device != "cpu"


def _is_cuda(device: str) -> bool:
    return device.startswith("cuda")


def device_name(device: str) -> str:
    """The device with its hardware, as in "cuda:0, NVIDIA H100"."""
    hardware = torch.cuda.get_device_name(device) if _is_cuda(device) else _processor()
    return f"{device}, {hardware}"


def device_kind(device: str) -> str:
    """The kind of a device, whose arithmetic it has: cpu, cuda, rocm, mps, ..."""
    kind = device.partition(":")[0]
    return "rocm" if kind == "cuda" and torch.version.hip else kind


@functools.cache
def _processor() -> str:
    """Return the processor's name and its widest vectors; a container's host name would change at every start."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return f"{' '.join(sorted(names)) or platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def has_bfloat16(device: str) -> bool:
    """Whether `device` computes in bfloat16 itself. Cards before NVIDIA's Ampere (2020) emulate it, slowly."""
    if _is_cuda(device):
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def check_alive(devices: Iterable[str]) -> None:
    """Compute one number on each of `devices`. Raises DeviceFailed for one that cannot any more.

    After some of CUDA's errors (a launch that failed, an assertion in a kernel, memory that ECC gave up, a card that is
    gone) every later call of the process fails too; after others only the one call did. Their texts do not tell which.
    """
    for device in filter(is_accelerator, devices):
        try:
            torch.ones(1, device=device).add(1).item()
        except RuntimeError as error:
            if is_out_of_memory(error):
                continue
            reason = str(error).strip().split("\n", 1)[0]
            raise DeviceFailed(
                f"{device} has failed, and computes nothing more in this process: {reason}\n"
                "  start the server again; where it fails again, look at the card (nvidia-smi, dmesg)",
                device=device,
            ) from error

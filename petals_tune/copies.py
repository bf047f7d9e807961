"""Copies between host memory and a GPU: through pinned memory, and with one synchronisation for all that comes back.

The host waits for a GPU where it needs a number of it. A copy from ordinary memory waits as well, in either direction,
since the driver can read and write pinned pages alone without the CPU. For other devices, `Tensor.to` copies.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def to_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Copy a tensor to `device`, and cast it there. The host does not wait for a copy to a GPU."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        # torch keeps the pinned memory until the copy is done, and reuses it for later ones.
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype or tensor.dtype)


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copy tensors to host memory, without their graphs. The host waits once for each GPU that they are on."""
    copied = [_begin_to_host(tensor.detach()) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return copied


def _begin_to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return pinned_like(tensor).copy_(tensor, non_blocking=True)


def pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    """Pinned host memory for a copy of a tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def finite_flags(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Are all numbers of `tensors` finite? One flag () for each device, there: `to_host` fetches it with the rest."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor.detach().isfinite().all())
    return [torch.stack(flags).all() if len(flags) > 1 else flags[0] for flags in by_device.values()]

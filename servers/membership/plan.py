"""What a server can host, from the model, the swarm and its own machine: how many blocks, and how fast."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch

from petals_tune.blocks import memory
from petals_tune.blocks.devices.hardware import is_accelerator
from petals_tune.blocks.loading import BlockLayout
from petals_tune.blocks.quantization import find_scheme
from petals_tune.errors import ConfigError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.net.peer import Peer
from petals_tune.wire.records import ServerRecord, Throughput
from petals_tune.wire.span import BlockSpan
from servers.membership import throughput
from servers.options import Limits, Serve
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.fair_queue import Priority
from servers.stores.budgets import Budgets

_GB = 2**30

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The model and this server's part in it, which stay the same while it runs."""

    model: str  # digest
    total_blocks: int
    length: int  # number of blocks to host
    block_bytes: int  # of the largest block of the model, as it is hosted
    throughput: Throughput
    matrix_library: str  # that computes float32 products; "" on a GPU


async def make_plan(
    options: Serve,
    devices: Sequence[str],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    here: Peer,
    compute: ComputeThread,
) -> Plan:
    """Read the model and the directory, and measure this server's throughput.

    Raises ConfigError where `num_blocks` is more than there are or not even one block fits, and UnsupportedModel.
    """
    layout = await asyncio.to_thread(BlockLayout.of, checkpoint)
    model = await asyncio.to_thread(lambda: checkpoint.digest)
    total_blocks = layout.family.total_blocks
    snapshot = await here.directory.snapshot(model, BlockSpan(0, total_blocks))
    others = [server for server in snapshot.servers if server.peer != here.id]
    keep = partial(throughput.keep_library, devices[0], folder=_throughput_folder(options))
    matrix_library = await compute.run(Priority.FORWARD, keep)  # before anything is measured or loaded
    return Plan(
        model=model,
        matrix_library=matrix_library,
        total_blocks=total_blocks,
        length=number_of_blocks(options, devices, layout, dtype),
        block_bytes=max(hosted_bytes(options, devices, layout, dtype)),
        throughput=await _throughput(
            options, devices, checkpoint, dtype, here, compute, others, model, layout.meta_model.config.hidden_size
        ),
    )


def hosted_bytes(options: Serve, devices: Sequence[str], layout: BlockLayout, dtype: torch.dtype) -> list[int]:
    """Memory that each block of the model takes once it is hosted."""
    scheme = find_scheme(options.quantization)
    copies = scheme.weight_copies(devices[0])
    blocks = layout.family.blocks_of(layout.meta_model)
    return [copies * memory.block_bytes(block, quantization=scheme, dtype=dtype) for block in blocks]


def number_of_blocks(options: Serve, devices: Sequence[str], layout: BlockLayout, dtype: torch.dtype) -> int:
    """Return how many blocks to host: as many as the options say, or as fit beside the budgets.

    Raises ConfigError for more blocks than the model has, or than GPUs have memory for. On a CPU they are not refused:
    weights that are mapped from a file need not be in memory.
    """
    total_blocks, sizes = layout.family.total_blocks, hosted_bytes(options, devices, layout, dtype)
    if options.num_blocks is not None and options.num_blocks > total_blocks:
        raise ConfigError(
            f"num_blocks={options.num_blocks} are more than the {total_blocks} blocks of {options.model.source}",
            key="num_blocks",
            seen=options.num_blocks,
        )
    free = [memory.free_bytes(device) for device in devices]
    if (span := options.span) is not None or options.num_blocks is not None:
        least = sizes[span.start : span.stop] if span is not None else sorted(sizes)[: options.num_blocks]
        if all(map(is_accelerator, devices)) and sum(least) > sum(free):
            fit = sum(memory.usable_bytes(each) // max(sizes) for each in free)
            raise ConfigError(
                f"{len(least)} blocks take {sum(least) / _GB:.1f} GB in {options.quantization}, and "
                f"{sum(free) / _GB:.1f} GB are free on {', '.join(devices)}: host at most {fit} (num_blocks={fit}), or "
                "take quantization=nf4, or several GPUs, as in 'device=[cuda:0,cuda:1]'",
                key="num_blocks" if span is None else "blocks",
                seen=len(least),
            )
        return min(len(least), total_blocks)
    loading = max(memory.loading_bytes(block, dtype) for block in layout.family.blocks_of(layout.meta_model))
    return memory.blocks_that_fit(
        free,
        options.limits.budgets.total_bytes,
        max(sizes),
        # Nothing is computed yet while blocks are loaded.
        max(loading, memory.compute_bytes(devices, options.limits.max_compute_gb)),
        total_blocks,
    )


def fit_budgets(limits: Limits, devices: Sequence[str], least_compute_bytes: int) -> tuple[Budgets, int]:
    """(budgets for what is kept, memory to compute one request) within what is free now, once the blocks are loaded.

    `devices` are those with blocks. Each has room for all budgets, since clients may use its blocks alone: so the one
    with the least free memory decides. Where it has less than `limits` say, all are smaller by the same factor, and a
    warning says so. Raises ConfigError where less than `least_compute_bytes` would be left to compute a request.

    On a CPU the limits are as given: what other programs leave free there changes from moment to moment.
    """
    budgets, compute = limits.budgets, memory.compute_bytes(devices, limits.max_compute_gb)
    if not all(map(is_accelerator, devices)):
        return budgets, compute
    free = {device: memory.free_bytes(device) for device in devices}
    fullest = min(devices, key=lambda device: free[device])
    share = memory.usable_bytes(free[fullest]) / (budgets.total_bytes + compute)
    if share >= 1:
        return budgets, compute
    budgets, compute = budgets.times(share), int(compute * share)
    if compute < least_compute_bytes:
        raise ConfigError(
            f"{free[fullest] / _GB:.2f} GB are free on {fullest} beside the blocks: too little to compute a request "
            "and to keep graphs and caches; host fewer (num_blocks), or lower limits.max_lease_gb and max_cache_gb",
            key="num_blocks",
        )
    logger.warning(
        "%.2f GB are free on %s beside the blocks: limits.max_lease_gb=%.2f, max_cache_gb=%.2f, max_adapter_gb=%.2f "
        "and max_compute_gb=%.2f are what fits; host fewer blocks for more",
        *(free[fullest] / _GB, fullest),
        *(size / _GB for size in (budgets.leases, budgets.sessions, budgets.adapters, compute)),
    )
    return budgets, compute


async def _throughput(
    options: Serve,
    devices: Sequence[str],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    here: Peer,
    compute: ComputeThread,
    others: Sequence[ServerRecord],
    model: str,
    hidden_size: int,
) -> Throughput:
    if isinstance(options.throughput, float):
        return Throughput(step=options.throughput, batch=options.throughput)
    measured = []
    for device in devices:
        measure = partial(
            throughput.measure_computing,
            checkpoint,
            quantization=options.quantization,
            dtype=dtype,
            device=device,
            folder=_throughput_folder(options),
            again=options.throughput == "measure",
        )
        measured.append(await compute.run(Priority.FORWARD, measure))
    slowest = Throughput(step=min(each.step for each in measured), batch=min(each.batch for each in measured))
    network = await throughput.measure_sending(here, others, model, hidden_size * dtype.itemsize)
    return msgspec.structs.replace(slowest, network=network)


def _throughput_folder(options: Serve) -> Path:
    return options.disk_cache.folder / "throughput"

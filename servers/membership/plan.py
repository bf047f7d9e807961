"""What a server can host, from the model, the swarm and its own machine: how many blocks, and how fast."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch

from petals_tune.blocks import memory
from petals_tune.blocks.loading import BlockLayout
from petals_tune.blocks.quantization import find_scheme
from petals_tune.blocks.quantization.unquantized import Unquantized
from petals_tune.errors import ConfigError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.net.peer import Peer
from petals_tune.wire.records import ServerRecord, Throughput
from petals_tune.wire.span import BlockSpan
from servers.membership import throughput
from servers.options import Serve
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.fair_queue import Priority


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The model and this server's part in it, which stay the same while it runs."""

    model: str  # digest
    total_blocks: int
    length: int  # number of blocks to host
    throughput: Throughput
    matrix_library: str  # that computes float32 products; "" on a GPU


async def make_plan(
    options: Serve,
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
    keep = partial(throughput.keep_library, options.device, folder=_throughput_folder(options))
    matrix_library = await compute.run(Priority.FORWARD, keep)  # before anything is measured or loaded
    return Plan(
        model=model,
        matrix_library=matrix_library,
        total_blocks=total_blocks,
        length=number_of_blocks(options, layout, dtype),
        throughput=await _throughput(
            options, checkpoint, dtype, here, compute, others, model, layout.meta_model.config.hidden_size
        ),
    )


def number_of_blocks(options: Serve, layout: BlockLayout, dtype: torch.dtype) -> int:
    """Return how many blocks to host: as many as the options say, or as fit beside the budgets. Raises ConfigError."""
    total_blocks = layout.family.total_blocks
    if options.num_blocks is not None and options.num_blocks > total_blocks:
        raise ConfigError(
            f"num_blocks={options.num_blocks} are more than the {total_blocks} blocks of {options.model.source}",
            key="num_blocks",
            seen=options.num_blocks,
        )
    if options.num_blocks is not None:
        return options.num_blocks
    if options.span is not None:
        return min(len(options.span), total_blocks)
    block_bytes = partial(memory.block_bytes, layout.meta_block(0), dtype=dtype)
    scheme = find_scheme(options.quantization)
    return memory.blocks_that_fit(
        memory.free_bytes(options.device),
        options.limits.budgets.total_bytes,
        block_bytes(quantization=scheme) * scheme.weight_copies(options.device),
        # Nothing is computed yet while blocks are loaded.
        max(
            block_bytes(quantization=Unquantized()), memory.compute_bytes(options.device, options.limits.max_compute_gb)
        ),
        total_blocks,
    )


async def _throughput(
    options: Serve,
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
    measure = partial(
        throughput.measure_computing,
        checkpoint,
        quantization=options.quantization,
        dtype=dtype,
        device=options.device,
        folder=_throughput_folder(options),
        again=options.throughput == "measure",
    )
    measured = await compute.run(Priority.FORWARD, measure)
    network = await throughput.measure_sending(here, others, model, hidden_size * dtype.itemsize)
    return msgspec.structs.replace(measured, network=network)


def _throughput_folder(options: Serve) -> Path:
    return options.disk_cache.folder / "throughput"

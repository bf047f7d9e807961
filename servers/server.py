"""One server: join, load, announce, serve, drain, leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from petals_tune.checkpoint import Checkpoint
from petals_tune.swarm.directory import Directory
from petals_tune.swarm.p2p import LOOPBACK, start_dht, start_p2p
from petals_tune.wire.messages import PROTOCOL
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan
from servers.compute import ComputeThread
from servers.engine import Engine
from servers.handler import Handler
from servers.leases import LeaseStore
from servers.trim import load_blocks, torch_dtype

logger = logging.getLogger(__name__)

ANNOUNCE_S = 60.0  # an announcement lasts so long, and is renewed three times in it


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What one server hosts, and within which limits."""

    source: str
    blocks: BlockSpan
    initial_peers: tuple[str, ...] = ()
    quantization: str = "int8"
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    host_maddrs: tuple[str, ...] = (LOOPBACK,)
    announce_maddrs: tuple[str, ...] = ()
    identity_path: str | None = None
    max_lease_bytes: int = 2**31
    max_lease_age_s: float = 600.0
    max_message_bytes: int = 2**30
    drain_s: float = 30.0
    stop: asyncio.Event = field(default_factory=asyncio.Event)


async def serve(options: ServerOptions, on_ready: Callable[[ServerRecord, Engine], None]) -> None:
    """Run a server until `options.stop` is set; then withdraw, finish what runs, and leave."""
    async with AsyncExitStack() as stack:
        p2p = await start_p2p(
            options.initial_peers,
            host_maddrs=options.host_maddrs,
            announce_maddrs=options.announce_maddrs,
            identity_path=options.identity_path,
        )
        stack.push_async_callback(p2p.shutdown)
        node = await start_dht(p2p, options.initial_peers, client_mode=False)
        stack.push_async_callback(node.shutdown)

        checkpoint = Checkpoint(options.source)
        dtype = torch_dtype(options.dtype, checkpoint.config, options.device)
        trimmed = await asyncio.to_thread(
            load_blocks,
            checkpoint,
            options.blocks,
            quantization=options.quantization,
            dtype=dtype,
            device=options.device,
        )
        engine = Engine(trimmed)
        compute = ComputeThread(options.threads)
        stack.callback(compute.stop)
        leases = LeaseStore(max_bytes=options.max_lease_bytes, max_age_s=options.max_lease_age_s)
        record = ServerRecord(
            peer=str(p2p.peer_id),
            addresses=tuple(str(address) for address in await p2p.get_visible_maddrs()),
            model=checkpoint.digest,
            model_name=options.source,
            blocks=options.blocks,
            total_blocks=trimmed.family.total_blocks,
            quantization=options.quantization,  # type: ignore[arg-type]  # checked when the blocks were loaded
            dtype=str(dtype).removeprefix("torch."),
        )
        handler = Handler(engine, compute, leases, record, max_message_bytes=options.max_message_bytes)
        await p2p.add_binary_stream_handler(PROTOCOL, handler.serve)
        directory = Directory(node)
        await directory.announce(record, lasts_s=ANNOUNCE_S)
        on_ready(record, engine)
        while not options.stop.is_set():
            try:
                await asyncio.wait_for(options.stop.wait(), ANNOUNCE_S / 3)
            except TimeoutError:
                await directory.announce(record, lasts_s=ANNOUNCE_S)
        handler.draining = True
        await directory.withdraw(record)
        try:
            await asyncio.wait_for(handler.drained(), options.drain_s)
        except TimeoutError:
            logger.warning("requests that ran for more than %g s after the stop were left unfinished", options.drain_s)

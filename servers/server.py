"""One server: join, load, announce, serve, drain, leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack

from petals_tune.checkpoint import Checkpoint
from petals_tune.swarm.directory import Directory
from petals_tune.swarm.members import Members, load_identity
from petals_tune.swarm.p2p import start_dht, start_p2p, stop_dht, stop_p2p
from petals_tune.wire.messages import PROTOCOL
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.signing import SigningKey
from servers.adapters import AdapterCache, GradientSums
from servers.compute import ComputeThread, Priority
from servers.engine import Engine
from servers.handler import Handler, Stores
from servers.leases import LeaseStore
from servers.options import Serve
from servers.sessions import SessionStore
from servers.trim import load_blocks, torch_dtype

logger = logging.getLogger(__name__)

_GB = 2**30
ANNOUNCE_S = 60.0  # an announcement lasts so long, and is renewed three times in it


async def serve(options: Serve, on_ready: Callable[[ServerRecord, Engine], None], stop: asyncio.Event) -> None:
    """Run a server until `stop` is set; then withdraw, finish what runs, and leave."""
    limits, initial_peers = options.limits, options.swarm.initial_peers
    async with AsyncExitStack() as stack:
        identity = SigningKey.new()
        if options.identity_path is not None:
            identity = load_identity(options.identity_path, make=True)
        members = None
        if options.swarm.key is not None:
            members = Members.with_key(options.swarm.key, options.swarm.token, identity)
        p2p = await start_p2p(
            initial_peers,
            host_maddrs=options.swarm.host_maddrs,
            announce_maddrs=options.swarm.announce_maddrs,
            identity=identity,
        )
        stack.push_async_callback(stop_p2p, p2p)
        node = await start_dht(p2p, initial_peers, client_mode=False, identity=identity, members=members)
        stack.push_async_callback(stop_dht, node)

        checkpoint = Checkpoint(options.model.source)
        dtype = torch_dtype(options.dtype, checkpoint.config, options.device)
        trimmed = await asyncio.to_thread(
            load_blocks,
            checkpoint,
            options.span,
            quantization=options.quantization,
            dtype=dtype,
            device=options.device,
        )
        engine = Engine(trimmed)
        compute = ComputeThread(options.threads)
        stack.callback(compute.stop)
        stores = Stores(
            leases=LeaseStore(max_bytes=int(limits.max_lease_gb * _GB), max_age_s=limits.max_lease_age_s),
            sessions=SessionStore(
                max_bytes=int(limits.max_cache_gb * _GB),
                max_idle_s=limits.max_session_idle_s,
                token_bytes=await compute.run(Priority.STEP, engine.measure_token_bytes),
            ),
            adapters=AdapterCache(max_bytes=int(limits.max_adapter_gb * _GB)),
            sums=GradientSums(max_bytes=int(limits.max_adapter_gb * _GB)),
        )
        record = ServerRecord(
            peer=str(p2p.peer_id),
            addresses=tuple(str(address) for address in await p2p.get_visible_maddrs()),
            model=checkpoint.digest,
            model_name=options.model.source,
            blocks=options.span,
            total_blocks=trimmed.family.total_blocks,
            quantization=options.quantization,
            dtype=str(dtype).removeprefix("torch."),
        )
        handler = Handler(engine, compute, stores, record, limits.of_requests(), members)
        await p2p.add_binary_stream_handler(PROTOCOL, handler.serve)
        directory = Directory(node)
        await directory.announce(record, lasts_s=ANNOUNCE_S)
        on_ready(record, engine)
        while not stop.is_set():
            try:
                await asyncio.wait_for(stop.wait(), ANNOUNCE_S / 3)
            except TimeoutError:
                await directory.announce(record, lasts_s=ANNOUNCE_S)
        handler.draining = True
        await directory.withdraw(record)
        try:
            await asyncio.wait_for(handler.drained(), limits.drain_s)
        except TimeoutError:
            logger.warning("requests that ran for more than %g s after the stop were left unfinished", limits.drain_s)

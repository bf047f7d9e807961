"""One server: join, choose blocks, load, announce, serve, move, drain, leave."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import msgspec
from tqdm import tqdm

from petals_tune import __version__
from petals_tune.blocks import memory
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.loading import BlockLayout, load_blocks, torch_dtype
from petals_tune.blocks.quantization import find_scheme
from petals_tune.blocks.quantization.unquantized import Unquantized
from petals_tune.errors import SwarmMismatch
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.net.directory import Directory
from petals_tune.net.peer import Peer, joined
from petals_tune.net.transport import Connection
from petals_tune.wire.messages import PROTOCOL
from petals_tune.wire.records import ServerRecord, ServerState, Throughput, mismatch_text, same_model
from petals_tune.wire.span import BlockSpan
from servers.membership import placement, throughput
from servers.metrics import Metrics
from servers.options import Serve
from servers.requests.hand_over import Neighbours
from servers.requests.handler import Handler, Stores
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.fair_queue import Priority
from servers.stores.adapters import AdapterCache, GradientSums
from servers.stores.leases import LeaseStore
from servers.stores.sessions import SessionStore

logger = logging.getLogger(__name__)

_GB = 2**30
PLACING_ROUNDS = 5  # how often a server changes its mind before it loads
LOOKS_AGAIN_S = (0.5, 2.0)  # after announcing where it will be: who chose the same meanwhile?

OnReady = Callable[[ServerRecord, Engine], None]


async def serve(options: Serve, on_ready: OnReady, stop: asyncio.Event) -> None:
    """Run a server until `stop` is set; then withdraw, finish what runs, and leave. `on_ready` is told of each load.

    Raises ConfigError, UnsupportedModel, ServerUnreachable, or SwarmMismatch where the swarm serves another model.
    """
    memory.check_device(options.device)
    find_scheme(options.quantization).check_available(options.device)
    swarm = options.swarm
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(
            joined(
                swarm.initial_peers,
                host_maddrs=swarm.host_maddrs,
                announce_maddrs=swarm.announce_maddrs,
                identity_path=options.identity_path,
                key=swarm.key,
                token=swarm.token,
                relays=swarm.relay,
                reach=swarm.reach,
            )
        )
        compute = ComputeThread(options.threads)
        stack.callback(compute.stop)
        announcer = _Announcer(here.directory, lasts_s=swarm.announce_s)
        metrics = None
        if options.metrics_port is not None:
            metrics = Metrics()
            await stack.enter_async_context(metrics.served(options.metrics_host, options.metrics_port))
        server = _Server(options, here, compute, announcer, metrics)
        if metrics is not None:
            metrics.watch(server)
        try:
            await here.while_daemon_lives(server.run(on_ready, stop), stop)
        finally:
            if here.daemon_lives:  # or nobody would hear it
                await announcer.withdraw()


class _Stopped(Exception):
    """The server was told to stop while it loaded."""


class _Announcer:
    """This server's record in the DHT, renewed until it is withdrawn."""

    def __init__(self, directory: Directory, *, lasts_s: float):
        self.directory, self._lasts_s = directory, lasts_s
        self.record: ServerRecord | None = None
        self.renewed: Callable[[ServerRecord], ServerRecord] = lambda record: record  # what changes meanwhile
        self._renewal: asyncio.Task[None] | None = None

    async def say(self, record: ServerRecord) -> None:
        self.record = record
        await self.directory.announce(record, lasts_s=self._lasts_s)
        if self._renewal is None:
            self._renewal = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        while self.record is not None:
            await asyncio.sleep(self._lasts_s / 3)
            if self.record is not None:
                self.record = self.renewed(self.record)
                await self.directory.announce(self.record, lasts_s=self._lasts_s)

    async def withdraw(self) -> None:
        if self.record is not None:
            record, self.record = self.record, None
            await self.directory.withdraw(record)
        if self._renewal is not None:
            self._renewal.cancel()


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What stays the same while a server lives."""

    layout: BlockLayout
    model: str
    length: int  # blocks that it hosts
    throughput: Throughput


class _Server:
    """Hosts one span after the other. Lives on the event loop."""

    def __init__(
        self, options: Serve, here: Peer, compute: ComputeThread, announcer: _Announcer, metrics: Metrics | None
    ):
        self._options, self._here, self.compute, self._announcer = options, here, compute, announcer
        self._peer, self._metrics = here.id, metrics
        announcer.renewed = self._renewed
        self._checkpoint = Checkpoint(options.model.source, options.disk_cache)
        self._dtype = torch_dtype(options.dtype, self._checkpoint.config, options.device)
        self._facts: _Facts
        self._neighbours: Neighbours
        self.handler: Handler | None = None

    async def run(self, on_ready: OnReady, stop: asyncio.Event) -> None:
        self._facts = await self._found()
        await self._here.transport.accept(PROTOCOL, self._serve)
        self._neighbours = Neighbours(self._here, self._facts.model)
        here: BlockSpan | None = self._options.span or await self._placed(None)
        try:
            while here is not None:
                here = await self._host(here, on_ready, stop)
        finally:
            await self._neighbours.close()

    async def _found(self) -> _Facts:
        """Look at the model, the swarm and this machine."""
        options, checkpoint = self._options, self._checkpoint
        layout = await asyncio.to_thread(BlockLayout.of, checkpoint)
        model = await asyncio.to_thread(lambda: checkpoint.digest)
        ours = await self._others(model)
        total_blocks = layout.family.total_blocks
        length = options.num_blocks or (len(options.span) if options.span else None)
        if length is None:
            length = self._as_many_as_fit(layout)
        return _Facts(
            layout=layout,
            model=model,
            length=min(length, total_blocks),
            throughput=await self._throughput(ours, model, layout.meta_model.config.hidden_size),
        )

    async def _throughput(self, others: Sequence[ServerRecord], model: str, hidden_size: int) -> Throughput:
        options = self._options
        if isinstance(options.throughput, float):
            return Throughput(step=options.throughput, batch=options.throughput)
        measure = partial(
            throughput.computing,
            self._checkpoint,
            quantization=options.quantization,
            dtype=self._dtype,
            device=options.device,
            folder=options.disk_cache.folder / "throughput",
            again=options.throughput == "measure",
        )
        measured = await self.compute.run(Priority.FORWARD, measure)
        network = await throughput.sending(self._here, others, model, hidden_size)
        return msgspec.structs.replace(measured, network=network)

    def _as_many_as_fit(self, layout: BlockLayout) -> int:
        limits = self._options.limits
        sizes = partial(memory.block_bytes, layout.meta_block(0), dtype=self._dtype)
        scheme = find_scheme(self._options.quantization)
        return memory.blocks_that_fit(
            memory.free_bytes(self._options.device),
            int((limits.max_lease_gb + limits.max_cache_gb + limits.max_adapter_gb) * _GB),
            sizes(quantization=scheme) * scheme.weight_copies(self._options.device),
            sizes(quantization=Unquantized()),
            layout.family.total_blocks,
        )

    async def _others(self, model: str) -> list[ServerRecord]:
        """The other servers of `model` that are online. Raises SwarmMismatch where there are only those of another."""
        snapshot = await self._announcer.directory.snapshot()
        servers = [server for server in (*snapshot.servers, *snapshot.joining) if server.peer != self._peer]
        if servers and not any(same_model(server.model, model) for server in servers):
            raise SwarmMismatch(
                f"{mismatch_text(servers, model, whose=f'model.source={self._options.model.source}')}\n"
                "  host the model that the swarm serves, or start another swarm: leave swarm.initial_peers out"
            )
        return [server for server in snapshot.servers if server.peer != self._peer and same_model(server.model, model)]

    async def _placed(self, here: BlockSpan | None) -> BlockSpan:
        """The blocks that this server shall host, `here` or others, announced.

        It looks again after announcing, a random moment later: servers that chose the same at the same time part.
        """
        announced = here
        for _ in range(PLACING_ROUNDS):
            target = await self._wish(here, announced)
            if target == announced:
                break
            announced = target
            await self._say(target, "online" if target == here else "joining")
            if self._options.swarm.initial_peers or here is not None:
                await asyncio.sleep(random.uniform(*LOOKS_AGAIN_S))
        assert announced is not None
        return announced

    async def _wish(self, here: BlockSpan | None, announced: BlockSpan | None) -> BlockSpan:
        snapshot = await self._announcer.directory.snapshot()
        ours = [
            [s for s in servers if s.peer != self._peer and same_model(s.model, self._facts.model)]
            for servers in (snapshot.servers, snapshot.joining)
        ]
        total_blocks = self._facts.layout.family.total_blocks
        others = placement.block_throughputs([*ours[0], *ours[1]], total_blocks)
        if here is None:
            return placement.best_span(others, self._facts.length, otherwise=announced)
        return (
            placement.better_span(
                others,
                placement.block_replicas(ours[0], total_blocks),
                here,
                self._facts.throughput.of_span(len(here)),
                balance_quality=self._options.balance_quality,
            )
            or here
        )

    async def _host(self, span: BlockSpan, on_ready: OnReady, stop: asyncio.Event) -> BlockSpan | None:
        """Load `span` and serve it. Returns the span to host next; None where `stop` was set."""
        await self._say(span, "joining")
        try:
            engine = await self._loaded(span, stop)
        except _Stopped:
            return None
        stores = await self._made_stores(engine)
        record = msgspec.structs.replace(self._record(span, "online"), free_cache_bytes=stores.sessions.free_bytes)
        self.handler = handler = Handler(
            engine,
            self.compute,
            stores,
            record,
            self._options.limits.of_requests(),
            self._here.members,
            on_reply=None if self._metrics is None else self._metrics.replied,
            neighbours=self._neighbours,
        )
        await self._announcer.say(record)
        on_ready(record, engine)
        there = await self._until_moved(span, stop)
        handler.draining = True
        if there is None:
            await self._announcer.withdraw()
        else:
            logger.warning("moves from blocks %s to %s, which need this server more", span, there)
        try:
            await asyncio.wait_for(handler.drained(), self._options.limits.drain_s)
        except TimeoutError:
            logger.warning(
                "requests that ran for more than %g s after the stop were left unfinished", self._options.limits.drain_s
            )
        self.handler = None
        await handler.close()
        return there

    async def _loaded(self, span: BlockSpan, stop: asyncio.Event) -> Engine:
        """Raises _Stopped after the block during which `stop` was set."""

        def on_block(block: int) -> None:
            bar.update()
            if stop.is_set():
                raise _Stopped

        gc.collect()  # the blocks before these, where there were any
        with tqdm(total=len(span), desc=f"loading blocks {span}", unit="block", disable=None) as bar:
            load = partial(
                load_blocks,
                self._checkpoint,
                span,
                quantization=self._options.quantization,
                dtype=self._dtype,
                device=self._options.device,
                disk=self._options.disk_cache,
                on_block=on_block,
            )
            return Engine(await self.compute.run(Priority.FORWARD, load))

    async def _until_moved(self, here: BlockSpan, stop: asyncio.Event) -> BlockSpan | None:
        while True:
            pause_s = None if self._options.span else self._options.balance_period_s * random.uniform(0.5, 1.5)
            try:
                await asyncio.wait_for(stop.wait(), pause_s)
                return None
            except TimeoutError:
                if (there := await self._placed(here)) != here:
                    return there

    async def _made_stores(self, engine: Engine) -> Stores:
        limits = self._options.limits
        return Stores(
            leases=LeaseStore(max_bytes=int(limits.max_lease_gb * _GB), max_age_s=limits.max_lease_age_s),
            sessions=SessionStore(
                max_bytes=int(limits.max_cache_gb * _GB),
                max_idle_s=limits.max_session_idle_s,
                token_bytes=await self.compute.run(Priority.STEP, engine.measure_token_bytes),
            ),
            adapters=AdapterCache(max_bytes=int(limits.max_adapter_gb * _GB)),
            sums=GradientSums(max_bytes=int(limits.max_adapter_gb * _GB)),
        )

    async def _say(self, span: BlockSpan, state: ServerState) -> None:
        await self._announcer.say(self._record(span, state))

    def _record(self, span: BlockSpan, state: ServerState) -> ServerRecord:
        return ServerRecord(
            peer=self._peer,
            addresses=self._here.addresses,
            model=self._facts.model,
            model_name=self._options.model.source,
            revision=self._checkpoint.revision,
            blocks=span,
            total_blocks=self._facts.layout.family.total_blocks,
            quantization=self._options.quantization,
            dtype=str(self._dtype).removeprefix("torch."),
            throughput=self._facts.throughput,
            state=state,
            version=__version__,
            public_name=self._options.public_name,
        )

    def _renewed(self, record: ServerRecord) -> ServerRecord:
        free = None if self.handler is None else self.handler.stores.sessions.free_bytes
        return msgspec.structs.replace(record, free_cache_bytes=free, addresses=self._here.addresses)

    @property
    def record(self) -> ServerRecord | None:
        """What is announced now; None before there is anything, and once it was withdrawn."""
        return self._announcer.record

    async def _serve(self, connection: Connection) -> None:
        if self.handler is None:
            connection.close()  # it loads: whoever comes now read an old announcement
        else:
            await self.handler.serve(connection)

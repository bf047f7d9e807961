"""One server from start to end: join, choose blocks, load, announce, serve, move, drain, leave."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import cast

import msgspec
from tqdm import tqdm

from petals_tune import __version__
from petals_tune.blocks import memory
from petals_tune.blocks.devices.hardware import check_alive, device_kind, find_devices
from petals_tune.blocks.engine import Engine
from petals_tune.blocks.footprint import Pass
from petals_tune.blocks.loading import load_blocks, torch_dtype
from petals_tune.blocks.passes import TORCH_ERRORS
from petals_tune.blocks.quantization import find_scheme
from petals_tune.errors import ConfigError, PetalsTuneError
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.convert import NEEDED
from petals_tune.net.peer import Peer, joined
from petals_tune.net.transport import Connection
from petals_tune.wire.records import MAX_TEXT, PROTOCOL, Dtype, ServerRecord, ServerState
from petals_tune.wire.span import BlockSpan
from servers.membership.announcer import Announcer
from servers.membership.needed import needed_model
from servers.membership.placer import Placer
from servers.membership.plan import Plan, fit_budgets, make_plan
from servers.membership.round_trips import RoundTrips
from servers.membership.throughput import BATCH_TOKENS
from servers.metrics import Metrics
from servers.options import Serve
from servers.requests.hand_over import Neighbours
from servers.requests.handler import Handler
from servers.scheduling.compute_thread import ComputeThread
from servers.scheduling.fair_queue import Priority
from servers.stores.stores import Stores

logger = logging.getLogger(__name__)

OnReady = Callable[[ServerRecord, Engine], None]


async def serve(options: Serve, on_ready: OnReady, stop: asyncio.Event) -> None:
    """Run a server until `stop` is set; then withdraw, finish what runs, and leave. Each load ends with `on_ready`.

    Raises ConfigError, UnsupportedModel, ServerUnreachable, and DeviceFailed where a GPU computes nothing any more.
    """
    devices = find_devices(options.device)
    find_scheme(options.quantization).check_available(devices[0])
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
                direct=swarm.direct,
            )
        )
        if options.model.source == NEEDED:
            options = dataclasses.replace(options, model=await needed_model(here.directory, options.disk_cache))
        compute = ComputeThread(options.threads)
        stack.callback(compute.stop)
        announcer = Announcer(here.directory, lasts_s=swarm.announce_s)
        metrics = None
        if options.metrics_port is not None:
            metrics = Metrics()
            await stack.enter_async_context(metrics.serving(options.metrics_host, options.metrics_port))
        server = _Server(options, devices, here, compute, announcer, metrics)
        if metrics is not None:
            metrics.watch(server)
        try:
            with explain_errors(devices):
                await here.while_daemon_lives(server.run(on_ready, stop), stop)
        finally:
            if here.daemon_lives:  # the way to the DHT
                await announcer.withdraw()


@contextmanager
def explain_errors(devices: Sequence[str]) -> Iterator[None]:
    """Raise torch's errors while blocks are measured or loaded as ours, where they are the memory's or the device's."""
    try:
        yield
    except PetalsTuneError:
        raise
    except TORCH_ERRORS as error:
        if memory.is_out_of_memory(error):
            raise ConfigError(
                f"blocks do not fit: {memory.describe_out_of_memory(error, devices)}; host fewer (num_blocks), or take "
                "quantization=nf4",
                key="num_blocks",
            ) from error
        check_alive(devices)
        raise


class _Stopped(Exception):
    """The server was told to stop while it loaded."""


class _Server:
    """Hosts one span of blocks after the other. Used by the event loop alone."""

    def __init__(
        self,
        options: Serve,
        devices: Sequence[str],
        here: Peer,
        compute: ComputeThread,
        announcer: Announcer,
        metrics: Metrics | None,
    ):
        self._options, self._here, self.compute, self._announcer = options, here, compute, announcer
        self._devices = devices
        self._peer, self._metrics = here.id, metrics
        announcer.refresh = self._refresh
        self._checkpoint = Checkpoint(options.model.source, options.disk_cache, options.model.revision)
        self._dtype = torch_dtype(options.dtype, self._checkpoint.config, *devices)
        self._plan: Plan
        self._placer: Placer
        self._neighbours: Neighbours
        self._round_trips: RoundTrips
        self.handler: Handler | None = None

    async def run(self, on_ready: OnReady, stop: asyncio.Event) -> None:
        """Plan, accept streams, and host blocks until `stop` is set."""
        options = self._options
        self._plan = plan = await make_plan(
            options, self._devices, self._checkpoint, self._dtype, self._here, self.compute
        )
        self._placer = Placer(
            self._announcer.directory,
            self._announce,
            own_peer=self._peer,
            plan=plan,
            balance_quality=options.balance_quality,
            alone=not options.swarm.initial_peers,
        )
        await self._here.transport.accept(PROTOCOL, self._serve)
        self._neighbours = Neighbours(self._here, plan.model, BlockSpan(0, plan.total_blocks))
        self._round_trips = RoundTrips(self._here, plan.model)
        span: BlockSpan | None = options.span or await self._placer.place(None)
        try:
            while span is not None:
                span = await self._host(span, on_ready, stop)
        finally:
            await self._neighbours.close()

    async def _host(self, span: BlockSpan, on_ready: OnReady, stop: asyncio.Event) -> BlockSpan | None:
        """Load `span` and serve it. Return the span to host next; None where `stop` was set.

        Raises DeviceFailed once requests fail because a device does.
        """
        await self._announce(span, "joining")
        try:
            engine = await self._load(span, stop)
        except _Stopped:
            return None
        limits = self._options.limits
        least_bytes = engine.footprint.training_bytes(Pass(span=span), 1, BATCH_TOKENS)
        budgets, compute_bytes = fit_budgets(limits, list(engine.spans_by_device), least_bytes)
        engine.passes.hooks.stacks.max_bytes = budgets.stacks
        stores = Stores.within(
            budgets,
            max_lease_age_s=limits.max_lease_age_s,
            max_session_idle_s=limits.max_session_idle_s,
            sizes=engine.cache_sizes,
        )
        record = msgspec.structs.replace(self._record(span, "online"), free_cache_bytes=stores.sessions.free_bytes)
        self.handler = handler = Handler(
            engine,
            self.compute,
            stores,
            record,
            limits.of_requests(max_compute_bytes=compute_bytes),
            self._here.members,
            on_reply=None if self._metrics is None else self._metrics.count_request,
            neighbours=self._neighbours,
        )
        self._neighbours.blocks = BlockSpan(max(span.start - 1, 0), min(span.stop + 1, self._plan.total_blocks))
        await self._announcer.announce(record)
        on_ready(record, engine)
        async with self._round_trips.measuring(span):
            next_span = await self._wait_for_move(span, stop, handler)
        handler.draining = True
        if next_span is None:
            await self._announcer.withdraw()
        else:
            logger.warning("moves from blocks %s to %s, which need this server more", span, next_span)
        await self._drain(handler)
        if handler.failure is not None:
            raise handler.failure
        return next_span

    async def _drain(self, handler: Handler) -> None:
        """Wait for running requests, at most `limits.drain_s`, and close the streams."""
        drain_s = self._options.limits.drain_s
        try:
            await asyncio.wait_for(handler.wait_until_idle(), drain_s)
        except TimeoutError:
            logger.warning("requests that ran for more than %g s after the stop were left unfinished", drain_s)
        self.handler = None
        await handler.close()

    async def _load(self, span: BlockSpan, stop: asyncio.Event) -> Engine:
        """Load blocks `span`. Raises _Stopped after the block during which `stop` was set."""

        def on_block(block: int) -> None:
            bar.update()
            if stop.is_set():
                raise _Stopped

        gc.collect()  # frees the blocks hosted before
        memory.give_back_freed_memory()
        with tqdm(total=len(span), desc=f"loading blocks {span}", unit="block", disable=None) as bar:
            load = partial(
                load_blocks,
                self._checkpoint,
                span,
                quantization=self._options.quantization,
                dtype=self._dtype,
                device=memory.spread(len(span), self._devices, self._plan.block_bytes),
                disk=self._options.disk_cache,
                on_block=on_block,
            )
            engine = Engine(await self.compute.run(Priority.FORWARD, load))
            await self.compute.run(Priority.FORWARD, lambda: engine.footprint)  # measured before requests need it
            await self.compute.run(Priority.FORWARD, memory.give_back_freed_memory)
            return engine

    async def _wait_for_move(self, here: BlockSpan, stop: asyncio.Event, handler: Handler) -> BlockSpan | None:
        """Return the span to move to once other blocks need this server more; None once it has to end."""
        while True:
            pause_s = (
                None if self._options.span else self._options.balance_period_s * random.SystemRandom().uniform(0.5, 1.5)
            )
            if await _first_of(stop, handler.failed, timeout_s=pause_s):
                return None
            if (better := await self._placer.place(here)) != here:
                return better

    async def _announce(self, span: BlockSpan, state: ServerState) -> None:
        await self._announcer.announce(self._record(span, state))

    def _record(self, span: BlockSpan, state: ServerState) -> ServerRecord:
        return ServerRecord(
            peer=self._peer,
            addresses=self._here.addresses,
            model=self._plan.model,
            model_name=self._options.model.source[-MAX_TEXT:],
            revision=self._checkpoint.commit,
            blocks=span,
            total_blocks=self._plan.total_blocks,
            quantization=self._options.quantization,
            dtype=cast(Dtype, str(self._dtype).removeprefix("torch.")),
            device=device_kind(self._devices[0]),  # several are of one kind
            matrix_library=self._plan.matrix_library,
            throughput=self._plan.throughput,
            state=state,
            version=__version__,
            public_name=self._options.public_name,
        )

    def _refresh(self, record: ServerRecord) -> ServerRecord:
        free = None if self.handler is None else self.handler.stores.sessions.free_bytes
        return msgspec.structs.replace(
            record,
            free_cache_bytes=free,
            addresses=self._here.addresses,
            round_trips_s=self._round_trips.to_followers_s,
        )

    @property
    def record(self) -> ServerRecord | None:
        """The record that is announced now; None before the first one and once it was withdrawn."""
        return self._announcer.record

    async def _serve(self, connection: Connection) -> None:
        if self.handler is None:
            connection.close()  # it loads: whoever comes now has read an old announcement
        else:
            await self.handler.serve(connection)


async def _first_of(*events: asyncio.Event, timeout_s: float | None) -> bool:
    """Wait until one of `events` is set; False where none was in time."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        done, _ = await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for task in waiting:
            task.cancel()

"""Metrics of one server for Prometheus, and its health for a supervisor, over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Protocol

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from petals_tune.wire.messages import Forward, Message, Refusal, Step
from petals_tune.wire.records import ServerRecord
from servers.http_server import http_server
from servers.requests.handler import Handler
from servers.scheduling.compute_thread import ComputeThread

# From a step on a GPU to a long batch on a CPU.
_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_LAG_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)
LAG_EVERY_S = 0.02  # between two looks how late the event loop is


class Watched(Protocol):
    """What the metrics read of a server."""

    handler: Handler | None
    compute: ComputeThread

    @property
    def record(self) -> ServerRecord | None: ...


class Metrics(Collector):
    """Counters of one server, and gauges that are read at each scrape.

    Scrapes are answered on the event loop that serves the clients, so an answer also shows that this is alive.
    """

    def __init__(self) -> None:
        self._server: Watched | None = None
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)
        self._requests = Counter(
            "petals_tune_requests", "Requests, by what was refused", ["request", "refused"], registry=self._registry
        )
        self._seconds = Histogram(
            "petals_tune_request_seconds",
            "From a whole request to its reply, waiting included",
            ["request"],
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._lag = Histogram(
            "petals_tune_loop_lag_seconds",
            "How long something that is due waits for the event loop, at any moment",
            buckets=_LAG_BUCKETS_S,
            registry=self._registry,
        )
        self._tokens = Counter(
            "petals_tune_tokens", "Rows x positions that went forward", ["request"], registry=self._registry
        )

    def watch(self, server: Watched) -> None:
        self._server = server

    def count_request(self, request: Message, reply: Message, elapsed_s: float) -> None:
        """Count a request that was answered after `elapsed_s`."""
        kind = type(request).__name__
        refused = reply.error if isinstance(reply, Refusal) else ""
        self._requests.labels(kind, refused).inc()
        self._seconds.labels(kind).observe(elapsed_s)
        if isinstance(request, Forward | Step) and not refused:
            self._tokens.labels(kind).inc(request.hidden.shape[0] * request.hidden.shape[1])

    def collect(self) -> Iterable[Metric]:
        server = self._server
        if server is None or server.record is None:
            return
        record, handler = server.record, server.handler
        facts = {"peer": record.peer, "model": record.model_name, "blocks": str(record.blocks)}
        more = {"quantization": record.quantization, "dtype": record.dtype, "device": record.device}
        more["version"] = record.version
        yield InfoMetricFamily("petals_tune_server", "What this server announces", value={**facts, **more})
        yield GaugeMetricFamily("petals_tune_online", "1: announced and serving", value=record.state == "online")
        yield GaugeMetricFamily("petals_tune_blocks", "Blocks that it hosts", value=len(record.blocks))
        yield GaugeMetricFamily(
            "petals_tune_waiting", "Functions that wait to be run", value=server.compute.queue_length
        )
        if handler is not None:
            stores = handler.stores
            yield GaugeMetricFamily("petals_tune_streams", "Open streams of clients", value=handler.streams)
            yield GaugeMetricFamily(
                "petals_tune_direct_streams", "Of these on direct connections", value=handler.direct_streams
            )
            yield GaugeMetricFamily(
                "petals_tune_message_bytes", "Memory of requests and replies", value=handler.message_bytes
            )
            yield GaugeMetricFamily("petals_tune_sessions", "Sessions kept", value=len(stores.sessions))
            yield GaugeMetricFamily("petals_tune_leases", "Graphs kept for backwards", value=len(stores.leases))
            yield GaugeMetricFamily("petals_tune_lease_bytes", "What they take", value=stores.leases.used_bytes)
            yield GaugeMetricFamily("petals_tune_cache_bytes", "What sessions take", value=stores.sessions.used_bytes)
            yield GaugeMetricFamily("petals_tune_cache_free_bytes", "Room for more", value=stores.sessions.free_bytes)

    @asynccontextmanager
    async def serving(self, host: str, port: int) -> AsyncIterator[int]:
        """Serve /metrics and /health; yields the port. Raises ConfigError where it is taken."""
        app = web.Application()
        app.add_routes([web.get("/metrics", self._metrics), web.get("/health", self._health)])
        measuring = asyncio.create_task(self._measure_lag())
        try:
            async with http_server(app, host, port, key="metrics_port") as bound_port:
                yield bound_port
        finally:
            measuring.cancel()

    async def _measure_lag(self) -> None:
        """Count how late the loop is at each multiple of LAG_EVERY_S, those that it misses while it stands included."""
        due_s = time.monotonic()
        while True:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            now_s = time.monotonic()
            while due_s <= now_s:
                self._lag.observe(now_s - due_s)
                due_s += LAG_EVERY_S

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def _health(self, _: web.Request) -> web.Response:
        record = None if self._server is None else self._server.record
        if record is None:
            return web.Response(status=503, text="starting or leaving\n")
        well = record.state == "online"
        return web.Response(status=200 if well else 503, text=f"{record.state}: blocks {record.blocks}\n")

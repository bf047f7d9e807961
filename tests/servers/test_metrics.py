"""What Prometheus and a supervisor read of a handler; of a whole server, in tests/e2e/test_health.py."""

import asyncio
import time
from types import SimpleNamespace

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from petals_tune.wire.messages import OpenSession, Refusal
from servers.metrics import Metrics
from tests.servers.peers import SPAN, House, forward, record_of


async def read(port: int, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as answer:
        return answer.status, await answer.text()


async def samples(port: int) -> dict[str, float]:
    """Value by name and labels, as in `name{label=value}`."""
    found = {}
    for family in text_string_to_metric_families((await read(port, "/metrics"))[1]):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


async def test_what_is_kept_and_served_is_counted(engine):
    house, metrics = House(engine), Metrics()
    metrics.watch(SimpleNamespace(handler=house.handler, compute=engine[1], record=record_of()))
    async with metrics.serving("127.0.0.1", 0) as port, house.client() as peer:
        await peer.ask(forward(keep=True))
        await peer.ask(OpenSession(span=SPAN, rows=1, max_length=4))
        seen = await samples(port)
        assert seen["petals_tune_online{}"] == 1
        assert seen["petals_tune_blocks{}"] == len(SPAN)
        assert (seen["petals_tune_streams{}"], seen["petals_tune_sessions{}"], seen["petals_tune_leases{}"]) == (
            1,
            1,
            1,
        )
        assert seen["petals_tune_message_bytes{}"] == house.handler.message_bytes
        assert seen["petals_tune_lease_bytes{}"] == house.stores.leases.used_bytes > 0
        assert seen["petals_tune_cache_bytes{}"] == 256 * len(SPAN) * 4, "256 bytes a token and block"
        assert seen["petals_tune_cache_free_bytes{}"] == 2**20 - seen["petals_tune_cache_bytes{}"]


async def test_requests_are_counted_by_what_they_ask_and_what_was_refused():
    metrics = Metrics()
    metrics.count_request(forward(rows=2, positions=3), forward(), 0.3)
    metrics.count_request(forward(rows=2, positions=3), Refusal(error="ServerBusy", text=""), 0.1)
    async with metrics.serving("127.0.0.1", 0) as port:
        seen = await samples(port)
    assert seen["petals_tune_requests_total{refused=,request=Forward}"] == 1
    assert seen["petals_tune_requests_total{refused=ServerBusy,request=Forward}"] == 1
    assert seen["petals_tune_tokens_total{request=Forward}"] == 6, "what was refused is not computed"
    assert seen["petals_tune_request_seconds_count{request=Forward}"] == 2
    assert seen["petals_tune_request_seconds_sum{request=Forward}"] == pytest.approx(0.4)


async def test_a_supervisor_learns_whether_it_serves():
    metrics, server = Metrics(), SimpleNamespace(handler=None, compute=SimpleNamespace(queue_length=0), record=None)
    async with metrics.serving("127.0.0.1", 0) as port:
        assert (await read(port, "/health"))[0] == 503
        metrics.watch(server)
        assert (await read(port, "/health"))[0] == 503
        server.record = record_of()
        assert await read(port, "/health") == (200, f"online: blocks {SPAN}\n")


async def test_a_loop_that_stands_still_is_seen_for_as_long_as_it_stood():
    metrics = Metrics()
    async with metrics.serving("127.0.0.1", 0) as port:
        await asyncio.sleep(0.1)
        before = await samples(port)
        time.sleep(1.2)  # what is to be measured
        await asyncio.sleep(0.1)
        after = await samples(port)

    def late(bucket: str) -> float:
        name, everything = f"petals_tune_loop_lag_seconds_bucket{{le={bucket}}}", "petals_tune_loop_lag_seconds_count{}"
        return (after[everything] - before[everything]) - (after[name] - before[name])

    assert late("1.0") >= 9, "what came due in its first 0.2 s"
    assert late("0.2") >= 49, "in its first second"

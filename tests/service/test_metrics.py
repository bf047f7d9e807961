"""Metrics in Prometheus' text, read by its own parser."""

import asyncio
import time

from prometheus_client.parser import text_string_to_metric_families

from petals_tune.service.metrics import Asker, Metrics
from petals_tune.service.users.slots import Slots

ASKER = Asker(owner="anna", interface="openai", model="tiny")
MODEL = {"interface": "openai", "model": "tiny"}


def samples(metrics):
    families = text_string_to_metric_families(metrics.text().decode())
    return {(each.name, tuple(sorted(each.labels.items()))): each.value for f in families for each in f.samples}


def value(metrics, name, **labels):
    return samples(metrics)[f"petals_tune_service_{name}", tuple(sorted(labels.items()))]


def test_tokens_and_requests_are_counted_by_interface_and_model():
    metrics = Metrics(Slots(1))
    metrics.count_tokens(ASKER, "read", 5)
    metrics.count_tokens(ASKER, "read", 6)
    with metrics.in_flight(ASKER):
        assert value(metrics, "in_flight", **MODEL) == 1
    assert value(metrics, "in_flight", **MODEL) == 0
    assert value(metrics, "tokens_total", kind="read", **MODEL) == 11
    assert not any("anna" in str(each) for each in samples(metrics))


def test_seconds_to_the_first_token():
    metrics = Metrics(Slots(1))
    metrics.count_first_token(ASKER, time.monotonic() - 3)
    assert value(metrics, "first_token_seconds_count", **MODEL) == 1
    assert 3 <= value(metrics, "first_token_seconds_sum", **MODEL) < 60
    assert value(metrics, "first_token_seconds_bucket", le="2.0", **MODEL) == 0


async def test_who_waits_for_a_slot_is_seen():
    slots = Slots(1)
    metrics = Metrics(slots)
    async with slots.held("anna"):
        waiting = asyncio.create_task(slots.held("ben").__aenter__())
        await asyncio.sleep(0)
        assert value(metrics, "waiting") == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert value(metrics, "waiting") == 0


def test_two_services_in_one_process_count_apart():
    one, other = Metrics(Slots(1)), Metrics(Slots(1))
    one.count_response("openai", 200)
    assert value(one, "responses_total", interface="openai", status="200") == 1
    assert not any(name == "petals_tune_service_responses_total" for name, _ in samples(other))

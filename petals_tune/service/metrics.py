"""Metrics of the service for Prometheus: by interface and model, never by key or content."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from petals_tune.service.users.slots import Slots

# From a short prompt on a GPU to a long one on CPUs behind a slow line, with a wait for a slot.
_BUCKETS_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


@dataclass(frozen=True, kw_only=True)
class Asker:
    """For whom something is computed."""

    owner: str
    interface: str  # "openai" or "tinker"
    model: str  # as metrics name it: what belongs to one key has the name of none


class Metrics:
    """Counters of one service. Used by one event loop."""

    def __init__(self, slots: Slots):
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        by_model = ("interface", "model")
        self._tokens = Counter(
            "petals_tune_service_tokens",
            "Tokens of prompts (read), of answers (written) and of training (trained)",
            (*by_model, "kind"),
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "petals_tune_service_in_flight",
            "Requests to a model that are worked on, those that wait included",
            by_model,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "petals_tune_service_first_token_seconds",
            "From a request to the first token of its answer, waiting included",
            by_model,
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._responses = Counter(
            "petals_tune_service_responses",
            "Responses, by the interface of their paths and their status",
            ("interface", "status"),
            registry=self._registry,
        )
        waiting = Gauge("petals_tune_service_waiting", "Answers that wait for a slot", registry=self._registry)
        waiting.set_function(slots.waiting)

    @contextmanager
    def in_flight(self, asker: Asker) -> Iterator[None]:
        """A request is worked on within the block."""
        gauge = self._in_flight.labels(asker.interface, asker.model)
        gauge.inc()
        try:
            yield
        finally:
            gauge.dec()

    def count_tokens(self, asker: Asker, kind: str, tokens: int) -> None:
        """Count tokens that were "read", "written" or "trained"."""
        self._tokens.labels(asker.interface, asker.model, kind).inc(tokens)

    def count_first_token(self, asker: Asker, since_s: float) -> None:
        """Count an answer that begins now; it was asked for when time.monotonic() was `since_s`."""
        self._first_token.labels(asker.interface, asker.model).observe(time.monotonic() - since_s)

    def count_response(self, interface: str, status: int) -> None:
        self._responses.labels(interface, str(status)).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    @property
    def route(self) -> Route:
        """GET /metrics; needs a key like everything else."""

        async def metrics(request: Request) -> Response:
            return Response(self.text(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

        return Route("/metrics", metrics)

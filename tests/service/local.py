"""A service on 127.0.0.1 over a plain model in this process: what is tested is the service, not the swarm."""

from __future__ import annotations

import copy
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from starlette.routing import BaseRoute
from starlette.types import ASGIApp
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from petals_tune.data.chat_format import ChatFormat
from petals_tune.model.convert import embedded_model
from petals_tune.service.decoding.decoder import Decoder
from petals_tune.service.metrics import Metrics
from petals_tune.service.openai.routes import OpenAI
from petals_tune.service.served import Offer, Served
from petals_tune.service.users.fairness import Fairness
from petals_tune.service.users.keys import Keys
from petals_tune.service.users.slots import Slots
from petals_tune.service.web.app import application
from tests.service.port import served


class PlainText:
    """A text of the embedded model."""

    def __init__(self, model: PlainModel, adapter: str | None, cache: DynamicCache):
        self._model, self._adapter, self._cache = model, adapter, cache
        model.open_sessions += 1

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        with self._model.lock:
            self._model.steps += 1
            self._model.tokens += len(ids)
            output = self._model.model(torch.tensor([list(ids)]), past_key_values=self._cache, use_cache=True)
        logits = output.logits[0, -1]
        if self._adapter == "loud":
            logits[LOUD] += 100
        return logits

    def fork(self) -> PlainText:
        return PlainText(self._model, self._adapter, copy.deepcopy(self._cache))

    def close(self) -> None:
        self._model.open_sessions -= 1


class PlainModel:
    """The embedded model, in one thread at a time. `adapter="loud"` adds to the logit of one token."""

    def __init__(self) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
        self.open_sessions, self.steps, self.tokens = 0, 0, 0
        self.lock = threading.Lock()

    def open(self, adapter: str | None, max_length: int, cancelled: threading.Event) -> PlainText:
        return PlainText(self, adapter, DynamicCache())

    def all_logits(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(torch.tensor([list(ids)])).logits[0]

    def hidden(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        with torch.inference_mode():
            return self.model.model(torch.tensor([list(ids)])).last_hidden_state[0]


LOUD = 17  # a token


@dataclass
class PlainOffers:
    found: list[Offer] = field(
        default_factory=lambda: [
            Offer(name="base", adapter=None, created=1),
            Offer(name="loud", adapter="loud", created=2),
            Offer(name="bens", adapter="loud", created=3, owner="ben"),
        ]
    )

    def of(self, owner: str) -> list[Offer]:
        return [offer for offer in self.found if offer.owner in (None, owner)]


@dataclass(kw_only=True)
class Running:
    url: str
    steps: PlainModel
    tokenizer: Any
    offers: PlainOffers


@contextmanager
def running_service(
    steps: PlainModel,
    *,
    keys: Keys | None = None,
    routes: Sequence[BaseRoute] = (),
    offers: PlainOffers | None = None,
) -> Iterator[Running]:
    """A service on a free port, until the end of the block."""
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model())
    offers, vocabulary = offers or PlainOffers(), steps.model.config.vocab_size

    @asynccontextmanager
    async def opened() -> AsyncIterator[ASGIApp]:
        slots = Slots(64)
        fairness, metrics = Fairness(slots=slots, most_in_flight=64, most_waiting=64), Metrics(slots)
        ends = frozenset({tokenizer.eos_token_id})
        decoder = Decoder(steps, tokenizer, fairness, metrics, vocabulary=vocabulary, ends=ends)
        offered = Served(
            offers=[offers],
            decoder=decoder,
            reader=steps,
            tokenizer=tokenizer,
            format=ChatFormat(tokenizer),
            most_positions=steps.model.config.max_position_embeddings,
        )
        all_routes = [*OpenAI(offered, fairness, metrics).routes, *routes]
        yield application(all_routes, keys or Keys(owners=None), metrics=metrics)
        decoder.close()

    with served(opened) as running:
        yield Running(url=running.url, steps=steps, tokenizer=tokenizer, offers=offers)

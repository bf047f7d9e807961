"""A plain model whose adapters say given texts, one of them a token each time that a test lets it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache

from petals_tune.model.convert import embedded_model
from petals_tune.service.served import Offer
from tests.service.local import PlainModel, PlainOffers, PlainText

HOSTILE = "<img src=x onerror=document.title=666> <b>bold</b> [link](javascript:alert(1))"
CODE = "Two ways:\n\n1. `map`\n2. a **loop**\n\n```python\nprint('<hi>')\n```\nDone."
SLOW = " ".join(["one", "two", "three", *["more"] * 200])
TEXTS = {"hostile": HOSTILE, "code": CODE, "slow": SLOW}


class SpokenText(PlainText):
    """A text that goes on with given tokens."""

    def __init__(self, model: SpokenModel, adapter: str):
        super().__init__(model, adapter, DynamicCache())
        self._spoken, self._next = model, iter(model.said[adapter])

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        if self._adapter == "slow":
            assert self._spoken.allowed.acquire(timeout=30)
            self._spoken.steps_of_slow += 1
        logits = torch.zeros(self._spoken.model.config.vocab_size)
        logits[next(self._next)] = 100
        return logits


class SpokenModel(PlainModel):
    """The embedded model; its adapters `hostile`, `code` and `slow` say TEXTS."""

    def __init__(self) -> None:
        super().__init__()
        tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model())
        end: int = tokenizer.eos_token_id
        self.said = {name: [*tokenizer(text, add_special_tokens=False).input_ids, end] for name, text in TEXTS.items()}
        self.allowed = threading.Semaphore(0)  # tokens of `slow`
        self.steps_of_slow = 0

    def open(self, adapter: str | None, max_length: int, cancelled: threading.Event) -> PlainText:
        return SpokenText(self, adapter) if adapter in TEXTS else super().open(adapter, max_length, cancelled)


def offers() -> PlainOffers:
    names = {"base": None, "loud": "loud", **{name: name for name in TEXTS}}
    return PlainOffers([Offer(name=name, adapter=adapter, created=1) for name, adapter in names.items()])

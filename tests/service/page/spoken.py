"""A plain model whose adapters say given texts, one of them a token each time that a test lets it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from petals_tune.model.convert import embedded_model
from petals_tune.service.served import Offer
from tests.service.local import PlainOffers, PlainSession, PlainSteps

HOSTILE = "<img src=x onerror=document.title=666> <b>bold</b> [link](javascript:alert(1))"
CODE = "Two ways:\n\n1. `map`\n2. a **loop**\n\n```python\nprint('<hi>')\n```\nDone."
SLOW = "one two three four five six seven eight nine ten"
TEXTS = {"hostile": HOSTILE, "code": CODE, "slow": SLOW}


class SpokenSteps(PlainSteps):
    """The embedded model; its adapters `hostile`, `code` and `slow` say TEXTS."""

    def __init__(self) -> None:
        super().__init__()
        tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model())
        self._end: int = tokenizer.eos_token_id
        self._said = {name: tokenizer(text, add_special_tokens=False).input_ids for name, text in TEXTS.items()}
        self._place: dict[int, int] = {}  # by the id of a session
        self.allowed = threading.Semaphore(0)  # tokens of `slow`
        self.steps_of_slow = 0

    def logits(self, session: PlainSession, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        if adapter not in self._said:
            return super().logits(session, ids, adapter)
        place = self._place[id(session)] = 0 if len(ids) > 1 else self._place[id(session)] + 1
        if adapter == "slow":
            assert self.allowed.acquire(timeout=30)
            self.steps_of_slow += 1
        said = [*self._said[adapter], self._end]
        logits = torch.zeros(self.model.config.vocab_size)
        logits[said[place]] = 100
        return logits


def offers() -> PlainOffers:
    names = {"base": None, "loud": "loud", **{name: name for name in TEXTS}}
    return PlainOffers([Offer(name=name, adapter=adapter, created=1) for name, adapter in names.items()])

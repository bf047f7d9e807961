"""How an answer is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from petals_tune.errors import ConfigError

MOST_STOP = 256  # characters: it is looked for at every token
MOST_BIAS = 100.0  # of a logit; at this size a token is always taken, or never


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Options of one answer. Constructing them checks their values: raises ConfigError that names the option."""

    max_tokens: int
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int | None = None  # None: another answer each time
    stop: Sequence[str] = ()  # texts that end an answer and are no part of it
    stop_ids: frozenset[int] = frozenset()  # tokens that end an answer
    ends_stop: bool = True  # so do those of the model and its chat template
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    frequency_penalty: float = 0.0  # taken from a token's logit for each time that it stands in the answer
    presence_penalty: float = 0.0  # taken once
    logprobs: int | None = None  # so many most likely tokens beside each chosen one; None: not even its own
    grammar: str | None = None  # of the answer, as llguidance writes it (grammar.py)

    def __post_init__(self) -> None:
        self._check("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more")
        self._check("temperature", self.temperature, 0 <= self.temperature <= 100, "0 to 100")
        self._check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more")
        fits = all(0 < len(text) <= MOST_STOP for text in self.stop)
        self._check("stop", list(self.stop), fits, f"texts of 1 to {MOST_STOP} characters")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            self._check(name, value, -2 <= value <= 2, "-2 to 2")
        for bias in self.logit_bias.values():
            self._check("logit_bias", bias, -MOST_BIAS <= bias <= MOST_BIAS, f"-{MOST_BIAS:g} to {MOST_BIAS:g}")
        if self.logprobs is not None:
            self._check("top_logprobs", self.logprobs, 0 <= self.logprobs <= 20, "0 to 20")

    @staticmethod
    def _check(name: str, seen: object, good: bool, allowed: str) -> None:
        if not good:
            raise ConfigError(f"{name} is {seen!r}: {allowed} is allowed", key=name, seen=seen)

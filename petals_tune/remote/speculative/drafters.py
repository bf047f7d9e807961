"""Sources of drafts: what the text says itself (look-up), and a small model in this process."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import DynamicCache
from transformers.generation import logits_process

LONGEST_MATCH = 4  # tokens at the end of a text that are looked up in it

# Functions of the text and its scores alone. Others (a grammar, a watermark) may count their calls, of which there is
# one for each token of the text: drafts do without them.
_PURE = tuple(
    getattr(logits_process, name)
    for name in (
        *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"),
        *("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "RepetitionPenaltyLogitsProcessor"),
        *("NoRepeatNGramLogitsProcessor", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"),
        *("SuppressTokensLogitsProcessor", "NoBadWordsLogitsProcessor", "SequenceBiasLogitsProcessor"),
        *("InfNanRemoveLogitsProcessor", "LogitNormalization"),
    )
)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the main model's next token is chosen from its logits."""

    processors: tuple[Any, ...]  # transformers' logits processors, in their order
    do_sample: bool
    vocab_size: int

    def choose(self, text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the next token (1, 1) of `text` (1, T) by `logits` (1, V), as transformers' own loop does.

        A draft that draws with the random numbers that the main model's token will be drawn with is the more often the
        same token.
        """
        scores = logits.to(device=text.device, dtype=torch.float32)[:, : self.vocab_size]
        if (missing := self.vocab_size - scores.shape[1]) > 0:  # of an embedding that is padded otherwise
            scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        for processor in self.processors:
            if type(processor) in _PURE:
                scores = processor(text, scores)
        if self.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1)
        return scores.argmax(dim=-1, keepdim=True)


class Drafter(Protocol):
    """Guesses how a text goes on. What it guesses changes the speed of a generation, and never its text."""

    def look(self, text: torch.Tensor) -> Hashable | None:
        """Return the kind of drafts there are for `text` (1, T), whose acceptance is counted by itself; None: none."""

    def draft(self, text: torch.Tensor, count: int, sampling: Sampling) -> torch.Tensor:
        """Return the next tokens (1, N), N <= `count`, of the text that `look` was given last."""


class LookUp:
    """Drafts what followed the last few tokens of the text where they stood in it before.

    Source: Saxena 2023, prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # of every n-gram that something follows: where that is, the last
        self._found = 0

    def look(self, text: torch.Tensor) -> int | None:
        """Return the length of the longest match, LONGEST_MATCH at the most."""
        self._take_in(text[0].tolist())
        for length in range(min(LONGEST_MATCH, len(self._tokens) - 1), 0, -1):
            found = self._after.get(tuple(self._tokens[-length:]))
            if found is not None:
                self._found = found
                return length
        return None

    def draft(self, text: torch.Tensor, count: int, sampling: Sampling) -> torch.Tensor:
        period = len(self._tokens) - self._found  # a text that repeats itself goes on doing so
        drafts = [self._tokens[self._found + number % period] for number in range(count)]
        return torch.tensor([drafts], dtype=text.dtype, device=text.device)

    def _take_in(self, tokens: list[int]) -> None:
        """Index what is new; all of it, where the text is another one."""
        if tokens[: len(self._tokens)] != self._tokens:
            self._tokens, self._after = [], {}
        for end in range(max(len(self._tokens), 1), len(tokens)):
            for length in range(1, min(LONGEST_MATCH, end) + 1):
                self._after[tuple(tokens[end - length : end])] = end
        self._tokens = tokens


class DraftModel:
    """Drafts with a causal language model of the same vocabulary, whose cache goes back where drafts were wrong."""

    def __init__(self, model: Any):
        self._model = model
        self._tokens: list[int] = []  # of the text in the cache
        self._cache = self._new_cache()
        self._kept = 0  # where sliding windows can still go back to

    def look(self, text: torch.Tensor) -> str:
        return "model"

    @torch.no_grad()
    def draft(self, text: torch.Tensor, count: int, sampling: Sampling) -> torch.Tensor:
        new = self._not_cached(text[0].tolist())
        device = self._model.device
        whole = text
        with torch.random.fork_rng(devices=[text.device] if text.device.type == "cuda" else []):
            for _ in range(count):
                output = self._model(
                    input_ids=torch.tensor([new], device=device), past_key_values=self._cache, use_cache=True
                )
                self._tokens += new
                token = sampling.choose(whole, output.logits[:, -1])
                whole, new = torch.cat([whole, token], dim=1), token[0].tolist()
        return whole[:, text.shape[1] :]

    def _not_cached(self, tokens: list[int]) -> list[int]:
        """Go back to where the cache parts from `tokens`; returns what it lacks, the last token at least."""
        most = min(len(self._tokens), len(tokens) - 1)
        known = next((at for at in range(most) if self._tokens[at] != tokens[at]), most)
        if known == 0 or (known < self._kept and any(self._cache.is_sliding)):
            self._tokens, self._cache, known = [], self._new_cache(), 0
        else:
            self._cache.crop(known - len(self._tokens))  # also by 0: sliding windows let go of what they keep for this
            self._tokens = self._tokens[:known]
        self._kept = known
        return tokens[known:]

    def _new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        cache.activate_past_recording()
        return cache

"""The choice of a token by its logits. Shapes: V vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from petals_tune.errors import ConfigError
from petals_tune.service.decoding.grammar import Constraint
from petals_tune.service.decoding.options import DecodingOptions

_LEAST_TEMPERATURE = 1e-6  # lower ones choose the same tokens, and 0 / 0 is none


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A chosen token. Log-probabilities are the model's own: before temperature, biases and penalties."""

    token: int
    logprob: float | None  # None where none were asked for
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens, with theirs


class Sampler:
    """Chooses the tokens of one answer. Not thread-safe."""

    def __init__(self, options: DecodingOptions, vocabulary: int, constraint: Constraint | None = None):
        """Raises ConfigError for a bias of a token beyond the `vocabulary`."""
        for token in options.logit_bias:
            if not 0 <= token < vocabulary:
                raise ConfigError(
                    f"logit_bias names token {token}, and this model has 0 to {vocabulary - 1}",
                    key="logit_bias",
                    seen=token,
                )
        self._options, self._constraint = options, constraint
        self._biased = torch.tensor(list(options.logit_bias), dtype=torch.int64)
        self._biases = torch.tensor(list(options.logit_bias.values()))
        self._chosen: Counter[int] = Counter()
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed % 2**63)
        # The library's order: temperature first, so that top_p is a share of what is drawn from.
        self._warpers = LogitsProcessorList()
        if options.temperature not in (0, 1):
            self._warpers.append(TemperatureLogitsWarper(max(options.temperature, _LEAST_TEMPERATURE)))
        if options.top_k:
            self._warpers.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            self._warpers.append(TopPLogitsWarper(options.top_p))

    def choose(self, logits: torch.Tensor) -> Choice:
        """Choose a token by `logits` (V,), and count it as a part of the answer."""
        logits = logits.float()
        scores = self._changed(logits)
        if self._options.temperature == 0:
            token = int(scores.argmax())
        else:
            no_ids: Any = torch.empty(1, 0, dtype=torch.int64)
            warped = self._warpers(no_ids, scores[None] - scores.max())  # or a low temperature makes them infinite
            token = int(torch.multinomial(warped.softmax(-1), 1, generator=self._generator))
        self._chosen[token] += 1
        if self._constraint is not None:
            self._constraint.take(token)
        return self._with_logprobs(token, logits)

    def _changed(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy of the logits with biases, penalties and the grammar; or the logits where there are none."""
        options = self._options
        penalised = self._chosen and (options.frequency_penalty or options.presence_penalty)
        if not len(self._biased) and not penalised and self._constraint is None:
            return logits
        scores = logits.clone()
        scores[self._biased] += self._biases
        if penalised:
            tokens = torch.tensor(list(self._chosen))
            counts = torch.tensor(list(self._chosen.values()))
            scores[tokens] -= options.presence_penalty + options.frequency_penalty * counts
        if self._constraint is not None:
            self._constraint.mask(scores)
        return scores

    def _with_logprobs(self, token: int, logits: torch.Tensor) -> Choice:
        if self._options.logprobs is None:
            return Choice(token=token, logprob=None)
        logprobs = logits.log_softmax(-1)
        top = _most_likely(logprobs, self._options.logprobs)
        return Choice(token=token, logprob=logprobs[token].item(), top=top)


def given_choices(logits: torch.Tensor, ids: Sequence[int], top: int) -> list[Choice]:
    """The tokens of a text with their log-probabilities by `logits` (S, V) behind each of them; the first has none."""
    found = [Choice(token=ids[0], logprob=None)]
    for row, token in zip(logits, ids[1:], strict=False):  # one at a time: all of them in float32 are large
        logprobs = row.float().log_softmax(-1)
        found.append(Choice(token=token, logprob=logprobs[token].item(), top=_most_likely(logprobs, top)))
    return found


def _most_likely(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return tuple(zip(tokens.tolist(), values.tolist(), strict=True))

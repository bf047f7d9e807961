"""Answers in a grammar: JSON, or JSON of a schema (llguidance). Shapes: V vocabulary."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from petals_tune.errors import ConfigError

ANY_OBJECT: dict[str, Any] = {"type": "object"}
# One space and no line breaks: where any are allowed, a small model may write nothing else to the end.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_rule(schema: dict[str, Any]) -> str:
    """JSON values that fit a JSON `schema`, as the right side of a rule of a grammar."""
    return f"%json {json.dumps({**schema, 'x-guidance': _SPACING})}"


def checked_grammar(rules: str, *, key: str) -> str:
    """The grammar of these rules (llguidance's Lark). Raises ConfigError with `key` where it cannot be honoured."""
    try:
        grammar = LLMatcher.grammar_from_lark(rules)
        problem = LLMatcher.validate_grammar(grammar)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ConfigError(f"{key}: this JSON schema cannot be honoured: {problem}", key=key)
    return grammar


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of JSON values that fit a JSON `schema`. Raises ConfigError for one that cannot be honoured."""
    return checked_grammar(f"start: {json_rule(schema)}", key="response_format")


class Grammars:
    """Constraints for answers of one tokenizer, whose tables are made at the first use (about 1 s)."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int]):
        """`vocabulary`: of the model's logits, which may be more than the tokenizer knows; `ends`: tokens that end."""
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, ends

    def constraint(self, grammar: str) -> Constraint:
        return Constraint(self._tables, grammar, self._vocabulary)

    @functools.cached_property
    def _tables(self) -> LLTokenizer:
        return from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=sorted(self._ends))


class Constraint:
    """Where one answer stands in its grammar."""

    def __init__(self, tables: LLTokenizer, grammar: str, vocabulary: int):
        self._matcher = LLMatcher(tables, grammar)
        self._mask = allocate_token_bitmask(1, vocabulary)

    def mask(self, logits: torch.Tensor) -> None:
        """Set the `logits` (V,) of tokens that cannot come next to -inf, in place."""
        fill_next_token_bitmask(self._matcher, self._mask)
        # Not llguidance.torch: it compiles a kernel, for which a compiler of C++ has to be there.
        allowed = np.unpackbits(self._mask.view(np.uint8)[0], bitorder="little", count=len(logits))
        logits.masked_fill_(torch.from_numpy(allowed == 0), float("-inf"))

    def take(self, token: int) -> None:
        """Go on behind a token. Raises ConfigError where the grammar is too large: its mask would allow an end."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise ConfigError(f"the JSON schema cannot be followed: {self._matcher.get_error()}", key="response_format")

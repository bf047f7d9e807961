"""Answers in OpenAI's objects: turns, texts, log-probabilities, counts."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from petals_tune.service.decoding.decoder import Piece
from petals_tune.service.decoding.sampler import Choice
from petals_tune.service.decoding.text import TextStream
from petals_tune.service.openai.tools import calls_in


class TokenTexts:
    """Texts of single tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        # Behind another token: some tokenizers leave out the space at the beginning of a text.
        self._before = tokenizer("a", add_special_tokens=False).input_ids
        self._offset = len(tokenizer.decode(self._before))
        self.of = functools.lru_cache(maxsize=2**16)(self._of)

    def _of(self, token: int) -> str:
        text: str = self.tokenizer.decode([*self._before, token])
        return text[self._offset :]


@dataclass
class Answer:
    """One of the answers of a request, as far as it has come."""

    text: str = ""
    tokens: int = 0
    finish: str | None = None
    choices: list[Choice] = field(default_factory=list)  # where log-probabilities were asked for

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.finish = piece.finish
        self.tokens += 1
        if piece.choice.logprob is not None:
            self.choices.append(piece.choice)

    def message(self, *, with_tools: bool, parallel: bool) -> tuple[dict[str, Any], str]:
        """The turn of the assistant, and why it ended: with calls of tools taken out of the text, where there are."""
        finish = self.finish or "stop"
        rest, calls = calls_in(self.text, parallel=parallel) if with_tools else (self.text, [])
        if not calls:
            return {"role": "assistant", "content": rest, "refusal": None}, finish
        turn = {"role": "assistant", "content": rest or None, "refusal": None, "tool_calls": calls}
        return turn, "tool_calls" if finish == "stop" else finish


def chat_logprobs(choices: Sequence[Choice], texts: TokenTexts) -> dict[str, Any]:
    """Log-probabilities in the form of chats."""
    content = [
        {
            **_logprob(texts.of(each.token), each.logprob),
            "top_logprobs": [_logprob(texts.of(token), value) for token, value in each.top],
        }
        for each in choices
    ]
    return {"content": content, "refusal": None}


def _logprob(token: str, value: float | None) -> dict[str, Any]:
    # A part of a character is no text, and its bytes are not known from it.
    return {"token": token, "logprob": value, "bytes": None if "\ufffd" in token else list(token.encode())}


class TextLogprobs:
    """Log-probabilities in the form of completions, whose tokens have their places in the text."""

    def __init__(self, texts: TokenTexts, start: int):
        """`start`: the place of the first token."""
        self._texts, self._stream, self._place = texts, TextStream(texts.tokenizer), start

    def of(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Those of the next tokens."""
        places = []
        for each in choices:
            places.append(self._place)
            self._place += len(self._stream.add(each.token))
        return {
            "tokens": [self._texts.of(each.token) for each in choices],
            "token_logprobs": [each.logprob for each in choices],
            "top_logprobs": [
                None if each.logprob is None else {self._texts.of(token): value for token, value in each.top}
                for each in choices
            ],
            "text_offset": places,
        }


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> dict[str, Any]:
    completion = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
    }


def head(kind: str, model: str) -> dict[str, Any]:
    """What all objects of one answer have in common."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}

"""The objects of streams."""

from __future__ import annotations

from typing import Any

from petals_tune.service.decoding.decoder import Piece
from petals_tune.service.openai.answers import Answer, TextLogprobs, TokenTexts, chat_logprobs, head
from petals_tune.service.openai.tools import calls_in, certain_text


class ChatChunks:
    """Of a chat: for each answer a first one with the role, then text, then why it ended.

    Calls of tools come whole, at the end: text that may begin one is held back until that is known.
    """

    def __init__(self, model: str, texts: TokenTexts, *, with_usage: bool, with_tools: bool, parallel: bool):
        self.head = {**head("chat.completion.chunk", model), **({"usage": None} if with_usage else {})}
        self._texts, self._with_tools, self._parallel = texts, with_tools, parallel
        self._sent: dict[int, int] = {}  # characters of each answer

    def of(self, answer: Answer, piece: Piece) -> list[dict[str, Any]]:
        """What a piece, which was added to its answer, says."""
        number, chunks = piece.number, []
        if number not in self._sent:
            self._sent[number] = 0
            chunks.append(self._chunk(number, {"role": "assistant", "content": ""}))
        text, finish = piece.text, piece.finish
        calls: list[dict[str, Any]] = []
        if self._with_tools:
            whole = certain_text(answer.text)
            if finish is not None:
                whole, calls = calls_in(answer.text, parallel=self._parallel)
            text = whole[self._sent[number] :]
            self._sent[number] += len(text)
        has_logprobs = piece.choice.logprob is not None
        if text or has_logprobs:
            logprobs = chat_logprobs([piece.choice], self._texts) if has_logprobs else None
            chunks.append(self._chunk(number, {"content": text}, logprobs))
        if calls:
            delta = {"tool_calls": [{"index": place, **call} for place, call in enumerate(calls)]}
            chunks.append(self._chunk(number, delta))
        if finish is not None:
            chunks.append(self._chunk(number, {}, finish="tool_calls" if calls and finish == "stop" else finish))
        return chunks

    def _chunk(self, number: int, delta: dict[str, Any], logprobs: Any = None, *, finish: Any = None) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self.head, "choices": [choice]}


class TextChunks:
    """Of a completion."""

    def __init__(self, model: str, texts: TokenTexts, *, with_usage: bool, start: int):
        """`start`: the place of an answer's first token in the text."""
        self.head = {**head("text_completion", model), **({"usage": None} if with_usage else {})}
        self._texts, self._start = texts, start
        self._logprobs: dict[int, TextLogprobs] = {}

    def of(self, answer: Answer, piece: Piece) -> list[dict[str, Any]]:
        """What a piece, which was added to its answer, says."""
        logprobs = None
        if piece.choice.logprob is not None:
            if piece.number not in self._logprobs:
                self._logprobs[piece.number] = TextLogprobs(self._texts, self._start)
            logprobs = self._logprobs[piece.number].of([piece.choice])
        elif not piece.text and piece.finish is None:
            return []
        choice = {"index": piece.number, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}
        return [{**self.head, "choices": [choice]}]


Chunks = ChatChunks | TextChunks
